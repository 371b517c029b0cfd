"""Trains cells of an experiment and measures their screening loss, on unseen training instances.

Every instance is seen once, so its training loss, before the step that trains on it, is that of an
unseen instance. Nothing is generated and no test instance is read.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest.mock import patch

import torch
from cell_losses import (
    SCREENING_STEPS,
    difference_columns,
    instance_means,
    losses_by_task,
    records_of,
    result_text,
    say,
    screening_loss,
)
from transformers import TrainerCallback

from badit.api import plan
from badit.runs.folder import RunFolder
from badit.support.files import append_to_log, read_json, read_jsonl, rewind_log, write_text
from badit.training import methods as training_methods
from badit.training import trainer as trainer_module
from badit.training.fit import fit
from badit.training.trainer import AnswerTrainer, answer_losses

BENCHMARKS = Path(__file__).resolve().parents[1]
RECIPE = BENCHMARKS.parent / "recipes" / "evidence-seeds-cpu.yaml"
RECORDS = "records.jsonl"  # in a run's folder, the loss of every instance


@dataclass(frozen=True)
class Cell:
    """A method of an experiment with its training options."""

    method: Mapping[str, Any]
    learning_rate: float
    training: Mapping[str, Any] = field(default_factory=dict)


class Experiment:
    """Cells with a seed each, whose results are in a folder with one file per cell and seed.

    Cells with a result are skipped. An interrupted cell continues from its last checkpoint.
    """

    def __init__(
        self, name: str, cells: Mapping[str, Cell], earlier: Mapping[str, Path] | None = None
    ) -> None:
        self.cells = cells
        # Results of an earlier experiment with the same setting, by cell.
        self.earlier = earlier or {}
        self.results = BENCHMARKS / "results" / name
        self.runs = BENCHMARKS.parent / "runs" / name

    def path_of(self, name: str, seed: int) -> Path:
        return self.results / f"{name}-{seed}.json"

    def train(self, jobs: Sequence[tuple[str, int]]) -> None:
        """Trains the cells that have no result, in the given order."""
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        self.results.mkdir(parents=True, exist_ok=True)
        for name, seed in jobs:
            if not self.path_of(name, seed).is_file():
                self._train_cell(name, seed)

    def _train_cell(self, name: str, seed: int) -> None:
        say(f"{name}, seed {seed}: started")
        values = _recipe_values(self.cells[name], seed, self.runs / f"{name}-{seed}")
        run = plan(str(RECIPE), **values)
        make_trainer = partial(RecordingTrainer, records_path=run.folder.path / RECORDS)
        with patch.object(training_methods, "AnswerTrainer", make_trainer):
            fit(run, progress=False)

        tasks = losses_by_task(read_jsonl(run.folder.path / RECORDS))
        result = {
            "cell": name,
            "seed": seed,
            "screening_loss": round(screening_loss(tasks), 5),
            "environment": run.folder.environment,
            "regroupings": _regroupings(run.folder),
            "recipe": run.recipe.model_dump(mode="json", exclude={"output", "compare"}),
            "tasks": tasks,
        }
        write_text(self.path_of(name, seed), result_text(result))
        seconds = result["environment"]["training"]["seconds"]
        shutil.rmtree(run.folder.path)
        say(
            f"{name}, seed {seed}: screening loss {result['screening_loss']:.4f} in {seconds:.0f} s"
        )

    def losses(self, name: str, steps: range = SCREENING_STEPS) -> dict[int, float]:
        """Returns a cell's losses in these steps by seed, from the losses of the instances."""
        results = [read_json(path) for path in sorted(self.results.glob(f"{name}-*.json"))]
        # The names of other cells may begin with this name.
        results = [result for result in results if result["cell"] == name]
        if name in self.earlier:
            results.append(read_json(self.earlier[name]))
        return {result["seed"]: screening_loss(result["tasks"], steps) for result in results}

    def table(self, names: Iterable[str], reference: str, steps: range = SCREENING_STEPS) -> str:
        """Returns the losses in these steps and their differences from a reference, as Markdown."""
        reference_losses = self.losses(reference, steps)
        lines = [
            f"| cell | seeds | loss | minus `{reference}` | mean | 95 % interval |",
            "|---|---|---:|---|---:|---|",
        ]
        for name in names:
            losses = self.losses(name, steps)
            if not losses:
                continue
            seeds = ", ".join(str(seed) for seed in sorted(losses))
            shared = sorted(losses.keys() & reference_losses.keys())
            differences = [losses[seed] - reference_losses[seed] for seed in shared]
            row = [f"`{name}`", seeds, f"{fmean(losses.values()):.4f}"]
            if name == reference or not differences:
                differences = []
            row += difference_columns(differences)
            lines.append(f"| {' | '.join(row)} |")
        return "\n".join(lines).replace("-0.", "−0.")


class RecordingTrainer(AnswerTrainer):
    """Writes the loss of every training instance, as it is before the step that trains on it."""

    def __init__(self, *args: Any, records_path: Path, **kwargs: Any) -> None:
        callbacks = [*kwargs.pop("callbacks"), _Records(records_path)]
        super().__init__(*args, callbacks=callbacks, **kwargs)
        self.records_path = records_path

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        def recorded_losses(model: Any, inputs: Any, **options: Any) -> Any:
            losses_L, row_L, outputs = answer_losses(model, inputs, **options)
            means = instance_means(losses_L.detach(), row_L, len(inputs["labels"]))
            step = self.state.global_step + 1
            append_to_log(self.records_path, *records_of(step, inputs["tasks"], means))
            return losses_L, row_L, outputs

        with patch.object(trainer_module, "answer_losses", recorded_losses):
            return super().compute_loss(model, inputs, *args, **kwargs)


class _Records(TrainerCallback):
    """Removes the records of steps that a resumed training takes again, and reports progress."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        rewind_log(self.path, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % 20 == 0:
            last_losses = [line["loss"] for line in read_jsonl(self.path)][-160:]
            mean = fmean(last_losses)
            say(f"  step {state.global_step}/{state.max_steps}: mean loss {mean:.3f}")


def _recipe_values(cell: Cell, seed: int, output: Path) -> dict[str, Any]:
    """Returns what a cell changes in the evidence's recipe; its seed is also that of the data."""
    training = {
        **cell.training,
        "learning_rate": cell.learning_rate,
        "seed": seed,
        "save_steps": 10,
    }
    return {
        "compare": None,
        "method": dict(cell.method),
        "training": training,
        "data": {"seed": seed},
        "output": str(output),
    }


def _regroupings(folder: RunFolder) -> list[dict[str, Any]]:
    if not folder.regroupings_path.is_file():
        return []
    return list(read_jsonl(folder.regroupings_path))

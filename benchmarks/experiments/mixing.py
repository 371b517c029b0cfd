"""Measures mixing the experts of the two nearest tasks, for prompts without instructions.

    export BADIT_SUPERNI=/path/to/superni
    python benchmarks/experiments/mixing.py

Question and rule: extend.md, "Mixing". Six SuperNI tasks without their definitions, one after
another with an expert of rank 32 each. Writes results/mixing.json: the NLL per answer token of
held-out training instances, if a prompt gets the expert of the nearest centroid, that of its own
task, or those of the two nearest tasks with the weights softmax(cosine / T).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from extend import RECIPE, values_of

import badit
from badit.data import AnswerCollator
from badit.data.encoding import encode_examples
from badit.evaluation.losses import prompt_losses
from badit.metrics.statistics import paired_bootstrap
from badit.support.environment import environment
from badit.support.files import write_json, write_text
from badit.tuner import badit_layer, hooks_of
from badit.tuner.context import RoutingContext
from badit.tuner.extension import Parts

RESULTS = Path(__file__).parents[1] / "results" / "mixing.json"
RUNS = Path("runs/mixing")
SEEDS = (30, 31)
VARIANT = "own-32@1e-3"
TEMPERATURES = (0.01, 0.03, 0.1)
HELD_OUT = 40  # training instances of each task


def main() -> None:
    losses = {seed: losses_of_seed(seed) for seed in SEEDS}
    modes = losses[SEEDS[0]].keys()
    differences = {}
    for mode in modes:
        by_task = {
            task: torch.tensor([losses[seed][mode][task] for seed in SEEDS])
            - torch.tensor([losses[seed]["nearest"][task] for seed in SEEDS])
            for task in losses[SEEDS[0]][mode]
        }
        numbers = {task: values_SP.numpy() for task, values_SP in by_task.items()}
        differences[mode] = paired_bootstrap(numbers)._asdict()
        print(mode, differences[mode], flush=True)
    content = {"losses": losses, "minus nearest": differences, "environment": environment()}
    write_json(RESULTS, content)


def losses_of_seed(seed: int) -> dict[str, dict[str, list[float]]]:
    """Returns, by mode and task, the NLL of held-out instances with the run of a seed."""
    overrides = [f"data.seed={seed}", f"data.validation_per_task={HELD_OUT}"]
    tasks = badit.plan(badit.load_recipe(RECIPE, overrides)).tasks
    file = RUNS / f"tasks-{seed}.jsonl"
    RUNS.mkdir(parents=True, exist_ok=True)
    rows = rows_without_instructions(tasks)
    write_text(file, "".join(f"{json.dumps(row)}\n" for row in rows))
    model, tokenizer = trained(file, seed).load()
    mixture = Mixture(model)
    losses: dict[str, dict[str, list[float]]] = {}
    for task in tasks:
        bare = task.model_copy(update={"definition": None})
        pairs = [(bare, instance) for instance in task.validation]
        for example in encode_examples(tokenizer, pairs, max_source_tokens=384):
            batch = AnswerCollator(tokenizer.pad_token_id)([example])
            for mode, loss in mixture.losses(task.name, batch).items():
                losses.setdefault(mode, {}).setdefault(task.name, []).append(loss)
    return losses


def rows_without_instructions(tasks: Sequence[Any]) -> Iterator[dict[str, str]]:
    for task in tasks:
        for split, instances in (("train", task.train), ("test", task.validation[:1])):
            for instance in instances:
                answer = instance.outputs[0]
                row = {"task": task.name, "input": instance.input, "output": answer}
                yield {**row, "split": split}


def trained(file: Path, seed: int) -> badit.Run:
    """Trains a sequence without instructions."""
    values = values_of(VARIANT, ("seeded-0", seed))
    # All rows: the held-out instances are not in the file.
    values["data"] |= {"source": str(file), "validation_per_task": 0}
    return badit.train(RECIPE, **values, compare=None, output=str(RUNS / f"seed-{seed}"))


class Mixture:
    """Passes of a model in which prompts get the experts of a mode."""

    def __init__(self, model: Any) -> None:
        self.model = model
        hooks: Any = hooks_of(model)
        (adapter,) = hooks.active_adapters
        # The layer with the clusters decides for all layers.
        self.config = (
            RoutingContext.of(hooks.model).extension_holders[adapter].badit_config[adapter]
        )

    def losses(self, task: str, batch: Mapping[str, Any]) -> dict[str, float]:
        """Returns, by mode, the NLL per answer token of a batch of one instance of a task."""
        losses = {"nearest": self._loss(batch, 0.0)}
        own = Parts((), whole=self._number_of(task))
        with patch.object(badit_layer, "parts_of", lambda routing, adapter: own):
            losses["own"] = self._loss(batch, 0.0)
        for temperature in TEMPERATURES:
            losses[f"two nearest, T = {temperature}"] = self._loss(batch, temperature)
        return losses

    def _number_of(self, task: str) -> int:
        """Returns the number of the extension of a task; 0: the run's first task."""
        for number, extension in enumerate(self.config.extensions, start=1):
            if task in extension.tasks:
                return number
        return 0

    @torch.no_grad()
    def _loss(self, batch: Mapping[str, Any], temperature: float) -> float:
        self.config.mixing = temperature
        sums, counts = prompt_losses(self.model, [batch])
        return float(sums[0] / counts[0])


if __name__ == "__main__":
    main()

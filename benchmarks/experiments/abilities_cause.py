#!/usr/bin/env python3
"""Finds the cause of the gain of random codes: stage 1 of abilities.md, "cause".

    export BADIT_SUPERNI=/path/to/superni
    python benchmarks/experiments/abilities_cause.py          # trains all cells; resumable
    python benchmarks/experiments/abilities_cause.py table    # prints the results as Markdown

One process trains all cells, seed by seed. The result of a cell is written when its training has
ended, to results/abilities-cause/CELL-SEED.json. A cell with a result is skipped. A cell that was
interrupted continues from its last checkpoint in runs/abilities-cause, at most ten steps earlier.

Shape suffixes as in badit: B = batch, T = positions, I = in features, K = experts, N = components,
C = clusters, S = prompts, L = answer tokens, V = vocabulary.

Run it, with cell_losses.py, in a checkout of commit deee141f, whose modules it changes.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from badit.files import append_to_log, read_json, read_jsonl, rewind_log, write_text
from badit.methods import AdapterMethod, build_method
from badit.run import Run
from badit.train import fit
from badit.trainer import AnswerTrainer, answer_losses
from cell_losses import (
    difference_columns,
    instance_means,
    losses_by_task,
    records_of,
    result_text,
    say,
    screening_loss,
)
from torch import nn
from transformers import TrainerCallback

from badit.method import prompt_mean
from badit.method.routing import cluster_gates, prompt_centroids, random_codes
from badit.recipe import Recipe, make_recipe
from badit.tuner import hooks_of
from badit.tuner.layer import BaditLinear
from badit.tuner.model import BaditModel
from badit.tuner.prompt import before_first_label

TRAIN = sys.modules["badit.train"]  # the module; the name badit.train is a function
TRAINER = sys.modules["badit.trainer"]

HERE = Path(__file__).parent
RECIPE = HERE.parents[1] / "recipes" / "evidence-seeds-cpu.yaml"
RESULTS = HERE.parent / "results" / "abilities-cause"
RUNS = HERE.parents[1] / "runs" / "abilities-cause"  # of cells without a result
RECORDS = "records.jsonl"  # in a run's folder, the loss of every instance

SEEDS = (20, 21, 22)
OFFSET_RATE = 5  # the learning rate of the offsets, relative to that of A and B
RIDGE = 1e-3  # added to the vocabulary's covariance, relative to its mean variance
PROMPTS_PER_CLUSTER = 32  # as in the cells that have run
ADAPTER = "default"

LORA = {"name": "lora", "r": 34, "lora_alpha": 272, "lora_dropout": 0.05}
CLUSTERS = {"name": "badit", "init_weights": "lora", "gates": "clusters", "regroup": None}
CODES = {**CLUSTERS, "num_experts": 8, "r": 4}
# One expert has a gate of 1 in every cluster, so this is LoRA's function. It has the clusters that
# the offsets need.
ONE_EXPERT = {**CLUSTERS, "num_experts": 1, "r": 34, "lora_alpha": 272}


class ClusteredLinear(BaditLinear):
    """The default's layer. It keeps the prompts that its clusters were found with."""

    prompt_means_SI: torch.Tensor

    def cluster(self, adapter_name: str, means_SI: torch.Tensor) -> int:
        self.prompt_means_SI = means_SI
        return super().cluster(adapter_name, means_SI)


class IdenticalCodeLinear(ClusteredLinear):
    """All clusters of a layer have one code: that of the first cluster in the default."""

    @torch.no_grad()
    def cluster(self, adapter_name: str, means_SI: torch.Tensor) -> int:
        different = super().cluster(adapter_name, means_SI)
        codes_CK = self.badit_codes[adapter_name]
        codes_CK.copy_(codes_CK[:1].clone().expand_as(codes_CK))
        return different


class OffsetLinear(ClusteredLinear):
    """y = W x + s · B (A x + u_c).

    Every cluster c of prompts has a trained offset u_c, which is 0 at the start.
    """

    adapter_layer_names = (*BaditLinear.adapter_layer_names, "badit_offset")
    badit_offset: nn.ParameterDict

    def update_layer(self, adapter_name: str, config: Any) -> None:
        offset_CN = torch.zeros(config.num_clusters, config.num_components)
        self.badit_offset[adapter_name] = nn.Parameter(offset_CN)
        super().update_layer(adapter_name, config)

    def _route(self, adapter_name: str, x: torch.Tensor) -> torch.Tensor:
        # forward() computes the gates before hidden(), so the cluster of every row is known there.
        centroids_CI = self.badit_centroids[adapter_name]
        one_hot_CC = torch.eye(len(centroids_CI), device=x.device)
        self.cluster_B1C = cluster_gates(x, centroids_CI, one_hot_CC)
        return super()._route(adapter_name, x)

    def hidden(self, adapter_name: str, x: torch.Tensor, a_PI: torch.Tensor) -> torch.Tensor:
        hidden_BTN = super().hidden(adapter_name, x, a_PI)
        offset_B1N = self.cluster_B1C @ self.badit_offset[adapter_name]
        return hidden_BTN + offset_B1N.to(hidden_BTN.dtype)


class GlobalKeyLinear(BaditLinear):
    """Gates by the cluster of the prompt's key, the same cluster in all layers; codes per layer."""

    key: GlobalKey

    def gates(self, adapter_name: str, x: torch.Tensor) -> torch.Tensor:
        cluster_B = self.key.clusters(self.routing.forward_pass())
        return self.badit_codes[adapter_name][cluster_B][:, None]


class GlobalKey:
    """The key of a prompt, z = normalise(Wh (mean token embedding − μ)), and the clusters of keys.

    μ is the mean of the vocabulary's embeddings, Wh the inverse root of their covariance.
    """

    centroids_CI: torch.Tensor

    def __init__(self, embedding: nn.Module) -> None:
        weight: Any = embedding.weight
        vocabulary_VI = weight.detach().double()
        mean_I = vocabulary_VI.mean(dim=0)
        covariance_II = torch.cov(vocabulary_VI.T)
        ridge = RIDGE * covariance_II.diagonal().mean()
        covariance_II.diagonal().add_(ridge)
        variance_I, direction_II = torch.linalg.eigh(covariance_II)
        self.mean_I = mean_I.float()
        self.whitening_II = (direction_II * variance_I.rsqrt() @ direction_II.T).float()
        self.nearest_B: torch.Tensor | None = None
        embedding.register_forward_hook(self._remember)

    def _remember(self, module: nn.Module, args: Any, embedded_BTI: torch.Tensor) -> None:
        """Keeps the embeddings of a forward pass, for the first of its adapted layers."""
        self.embedded_BTI = embedded_BTI.detach()
        self.nearest_B = None

    def of_prompts(self, embedded_BTI: torch.Tensor, prompt_BT: torch.Tensor) -> torch.Tensor:
        """Returns the keys z (B, I)."""
        mean_BI = prompt_mean(embedded_BTI.float(), prompt_BT)
        return F.normalize((mean_BI - self.mean_I) @ self.whitening_II, dim=1)

    def clusters(self, forward_pass: Any) -> torch.Tensor:
        """Returns the cluster (B) of every row of a forward pass."""
        if self.nearest_B is None:
            prompt_BT, _ = forward_pass.prompt
            keys_BI = self.of_prompts(self.embedded_BTI, prompt_BT)
            self.nearest_B = (keys_BI @ self.centroids_CI.T).argmax(dim=1)
        return self.nearest_B


def layers_of(model: Any) -> list[Any]:
    """Returns the adapted layers of a model of badit."""
    tuner: Any = hooks_of(model)
    return tuner.expert_layers()


@torch.no_grad()
def set_global_key(model: Any, batches: Mapping[str, Any]) -> None:
    """Finds the clusters of keys, with as many prompts as the default, and draws the codes."""
    layers = layers_of(model)
    embedding = model.get_input_embeddings()
    key = GlobalKey(embedding)
    clusters = layers[0].badit_config[ADAPTER].num_clusters
    per_task = max(1, PROMPTS_PER_CLUSTER * clusters // len(batches))
    keys_SI = []
    for batches_of_task in batches.values():
        left = per_task
        for batch in batches_of_task:
            prompt_BT = before_first_label(batch["labels"], batch["attention_mask"])
            keys_SI.append(key.of_prompts(embedding(batch["input_ids"]), prompt_BT)[:left])
            left -= len(keys_SI[-1])
            if left == 0:
                break
    key.centroids_CI = prompt_centroids(torch.cat(keys_SI), clusters)
    for layer in layers:
        layer.key = key
        codes_CK = layer.badit_codes[ADAPTER]
        codes_CK.copy_(random_codes(*codes_CK.shape))
        # Layers with a number of batches have clusters, so start_task does not look for them.
        layer.badit_batches[ADAPTER].fill_(1)


def set_layer_clusters(model: Any, batches: Mapping[str, Any], seed: int) -> None:
    """Finds the clusters of every layer as the default does, in the prompts of the seed.

    The layers' inputs depend on data and base model only, since B is 0 at the start. So the cells
    of a seed have the same clusters, and only the first of them runs the model to find them.
    """
    layers = layers_of(model)
    path = RUNS / f"prompts-{seed}.pt"
    if path.is_file():
        means = torch.load(path)
        for layer in layers:
            layer.cluster(ADAPTER, means[layer.name])
            layer.badit_batches[ADAPTER].fill_(1)
    else:
        hooks_of(model).start_task(batches)
        means = {layer.name: layer.prompt_means_SI for layer in layers}
        partial = path.with_suffix(".partial")
        torch.save(means, partial)
        partial.replace(path)


@dataclass(frozen=True)
class Cell:
    """A method of the experiment, with its learning rate in the evidence."""

    method: Mapping[str, Any]
    learning_rate: float
    layer_class: type[BaditLinear] = ClusteredLinear  # not used by PEFT's LoRA
    training: Mapping[str, Any] = field(default_factory=dict)


CELLS = {
    "lora": Cell(LORA, 1e-3),
    "badit": Cell(CODES, 2e-3),
    "global-key": Cell(CODES, 2e-3, GlobalKeyLinear),
    "identical-code": Cell(CODES, 2e-3, IdenticalCodeLinear),
    # The option's name speaks of the router; it is the rate of all parameters except A and B.
    "lora-offset": Cell(ONE_EXPERT, 1e-3, OffsetLinear, {"router_lr_ratio": OFFSET_RATE}),
}


class RecordingTrainer(AnswerTrainer):
    """Writes the loss of every training instance, as it is before the step that trains on it."""

    records_path: Path

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        def recorded_losses(model: Any, inputs: Any, **options: Any) -> Any:
            losses_L, row_L, outputs = answer_losses(model, inputs, **options)
            means_B = instance_means(losses_L.detach(), row_L, len(inputs["labels"]))
            step = self.state.global_step + 1
            append_to_log(self.records_path, *records_of(step, inputs["tasks"], means_B))
            return losses_L, row_L, outputs

        with patch.object(TRAINER, "answer_losses", recorded_losses):
            return super().compute_loss(model, inputs, *args, **kwargs)


class Records(TrainerCallback):
    """Removes the records of steps that a resumed training takes again, and reports progress."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        rewind_log(self.path, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % 20 == 0:
            latest = [line["loss"] for line in read_jsonl(self.path)][-160:]
            say(f"  step {state.global_step}/{state.max_steps}: mean loss {fmean(latest):.3f}")


class CellMethod(AdapterMethod):
    """A cell as a method of badit: its layers, its clusters and a trainer that records losses."""

    trainer_made: RecordingTrainer
    records_path: Path

    def __init__(self, cell: Cell, seed: int) -> None:
        built = build_method(cell.method)
        super().__init__(built.name, built.options, built.regroup)
        self.cell = cell
        self.seed = seed

    def apply(self, model: Any, tasks: Sequence[str] = ()) -> Any:
        with patch.object(BaditModel, "tuner_layer_cls", self.cell.layer_class):
            return super().apply(model, tasks)

    def before_training(self, model: Any, batches: Mapping[str, Any]) -> None:
        if self.cell.layer_class is GlobalKeyLinear:
            set_global_key(model, batches)
        elif self.name == "badit":
            set_layer_clusters(model, batches, self.seed)

    def callbacks(self, run: Run) -> list[TrainerCallback]:
        self.records_path = run.path / RECORDS
        return [Records(self.records_path)]

    def trainer(self, **arguments: Any) -> AnswerTrainer:
        self.trainer_made = RecordingTrainer(**arguments)
        self.trainer_made.records_path = self.records_path
        return self.trainer_made


def recipe_of(cell: Cell, seed: int, output: str, **overrides: Any) -> Recipe:
    """Returns the evidence's recipe with a cell's method, and the seed also for the data."""
    values: dict[str, Any] = {"compare": None, "method": cell.method, "output": output}
    values["training"] = {**cell.training, "learning_rate": cell.learning_rate, "seed": seed}
    values["training"]["save_steps"] = 10
    values["data"] = {"seed": seed}
    for section, options in overrides.items():
        values[section] = {**values.get(section, {}), **options}
    return make_recipe(str(RECIPE), values)


def trained(cell: Cell, seed: int, folder: Path, **overrides: Any) -> tuple[CellMethod, Run]:
    """Trains a cell, or continues its training; returns its method and its run."""
    method = CellMethod(cell, seed)
    recipe = recipe_of(cell, seed, str(folder), **overrides)
    with patch.object(TRAIN, "build_method", lambda section: method):
        return method, fit(recipe, progress=False)


def run_cell(name: str, seed: int) -> None:
    """Trains a cell and writes its result."""
    say(f"{name}, seed {seed}: started")
    _, run = trained(CELLS[name], seed, RUNS / f"{name}-{seed}")
    environment = run.environment  # before the folder is removed
    tasks = losses_by_task(read_jsonl(run.path / RECORDS))
    result = {
        "cell": name,
        "seed": seed,
        "screening_loss": round(screening_loss(tasks), 5),
        "environment": environment,
        "recipe": run.recipe.model_dump(mode="json", exclude={"output", "compare"}),
        "tasks": tasks,
    }
    write_text(path_of(name, seed), result_text(result))
    shutil.rmtree(run.path)
    loss, seconds = result["screening_loss"], environment["training"]["seconds"]
    say(f"{name}, seed {seed}: screening loss {loss:.4f} in {seconds:.0f} s")


def path_of(name: str, seed: int) -> Path:
    return RESULTS / f"{name}-{seed}.json"


def read_losses(name: str) -> dict[int, float]:
    """Returns a cell's screening losses by seed, computed from the losses of the instances."""
    paths = {seed: path_of(name, seed) for seed in SEEDS}
    present = {seed: path for seed, path in paths.items() if path.is_file()}
    return {seed: screening_loss(read_json(path)["tasks"]) for seed, path in present.items()}


def table() -> str:
    """Returns the screening losses and their paired differences, as two Markdown tables."""
    found = {name: read_losses(name) for name in CELLS}
    header = [f"seed {seed}" for seed in SEEDS]
    lines = [f"| {' | '.join(['cell', *header, 'mean'])} |", "|---|" + "---:|" * (len(SEEDS) + 1)]
    for name, losses in found.items():
        row = [f"{losses[seed]:.4f}" if seed in losses else "" for seed in SEEDS]
        mean = f"{fmean(losses.values()):.4f}" if losses else ""
        lines.append(f"| {' | '.join([name, *row, mean])} |")
    lines += ["", "| difference | by seed | mean | 95 % t interval |", "|---|---|---:|---|"]
    for other, name in combinations(CELLS, 2):
        shared = sorted(found[name].keys() & found[other].keys())
        differences = [found[name][seed] - found[other][seed] for seed in shared]
        if differences:
            row = [f"{name} − {other}", *difference_columns(differences)]
            lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines).replace("-0.", "−0.")


def main() -> None:
    if sys.argv[1:] == ["table"]:
        print(table())
        return
    RESULTS.mkdir(parents=True, exist_ok=True)
    RUNS.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    for seed in SEEDS:
        for name in CELLS:
            if not path_of(name, seed).is_file():
                run_cell(name, seed)
        say(f"results up to seed {seed}\n\n{table()}\n")
    say("all cells have a result")


if __name__ == "__main__":
    main()

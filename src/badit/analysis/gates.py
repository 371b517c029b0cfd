"""The gates of prompts: how much BADIT, the mixture baselines and MTL-LoRA weight each expert.

All components of an expert have the same gate, and a layer's gates sum to K or to 1. Here they are
divided by their mean over the experts: 1 is neutral, K means that only one expert is used. If each
position has its own gates, a prompt's gates are the mean over its positions, without padding and
answer. Batches are grouped by task; each has ``input_ids``, ``attention_mask``, ``labels`` (B, T)
and ``tasks``.

Shape suffixes: B = rows, T = positions, M = adapted modules, K = experts, P = prompts of one task.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from accelerate.utils import send_to_device
from peft import PeftModel

from badit.analysis.tables import INDEX, Column, Table, layer_and_module, span
from badit.data import AnswerCollator, Task, batches_by_task
from badit.method import prompt_mean
from badit.recipe.schema import Recipe
from badit.runs.fingerprints import model_fingerprint, task_fingerprints
from badit.runs.folder import RunFolder, read_export
from badit.support.console import waiting
from badit.support.errors import BaditError, nearest
from badit.support.files import is_number, read_json, write_json
from badit.training.encoding import encoded
from badit.training.loading import model_dtype
from badit.training.trainer import answer_losses
from badit.tuner.experts import AdaptedLayer, active_experts, adapted_layers, changed_gates
from badit.tuner.extension import extension_code
from badit.tuner.model import TaskBatches
from badit.tuner.prompt import before_first_label

GATES_FILE = "gates.json"  # the fixed gates, in the folder of an export
# For the mean gates. They vary little within a task, so few training prompts are enough.
PROMPTS_PER_TASK = 32
_BATCH_SIZE = 8
# The cache grows with the tasks, so it is written again after a growth by this factor.
_GROWTH = 1.2

#: Maps a module's name to the gates of its K experts as used in the forward pass, undivided.
Gates = Mapping[str, Sequence[float]]

GATES = Table(
    "gates", "task layer module expert", mean="mean gate over the task's prompts; 1 is neutral"
)

CLUSTERS = Table(
    "clusters",
    "task layer module",
    layer=Column("index of the transformer layer; −1 if all layers have the same clusters", INDEX),
    cluster=Column("the cluster of prompts, counted from 0", INDEX),
    share="share of the task's prompts in this cluster",
)


class PromptGates(NamedTuple):
    """The gates of each prompt: by task, an array (P, M, K) in the order of the batches' rows."""

    modules: Sequence[tuple[int, str]]
    by_task: Mapping[str, np.ndarray]

    @property
    def means(self) -> np.ndarray:
        """(tasks, M, K): the mean over each task's prompts."""
        return np.stack([gates_PMK.mean(axis=0) for gates_PMK in self.by_task.values()])


class TaskGates(NamedTuple):
    """The gates of a task's prompts.

    ``clusters`` has the share of the prompts in each cluster, for every item of
    :func:`clusters_of`.
    """

    means: Gates
    clusters: Sequence[Sequence[float]]


def prompt_gates(model: Any, batches: TaskBatches) -> PromptGates:
    """Returns the gates of every prompt, from one forward pass.

    The model has experts and is in evaluation mode.
    """
    layers = active_experts(model)
    by_task = {}
    for task, batches_of_task in waiting([*batches.items()], "Gates", "task"):
        by_task[task] = _divided(_gates_of_prompts(model, layers, batches_of_task))
    return PromptGates([layer_and_module(adapted.layer.name) for adapted in layers], by_task)


def _divided(gates: Mapping[str, torch.Tensor]) -> np.ndarray:
    """Returns gates (P, M, K) divided by their mean: those of all methods have the same scale."""
    gates_PMK = torch.stack([*gates.values()], dim=1)
    return (gates_PMK / gates_PMK.mean(dim=-1, keepdim=True)).numpy()


def mean_gates(model: Any, batches: Iterable[Any]) -> Gates:
    """Returns the gates of every adapted module: undivided means over the prompts of batches."""
    return _means(_gates_of_prompts(model, adapted_layers(model), batches))


def _means(gates: Mapping[str, torch.Tensor]) -> Gates:
    return {name: gates_PK.mean(dim=0).tolist() for name, gates_PK in gates.items()}


def gates_of_task(model: Any, batches: Iterable[Any]) -> TaskGates:
    """Returns the mean gates of the prompts of batches, and their clusters."""
    layers = adapted_layers(model)
    gates = _gates_of_prompts(model, layers, batches)
    shares = [of_place.shares(_divided(gates)).tolist() for of_place in clusters_of(layers)]
    return TaskGates(_means(gates), shares)


@torch.no_grad()
def _gates_of_prompts(
    model: Any, layers: Sequence[AdaptedLayer], batches: Iterable[Any]
) -> dict[str, torch.Tensor]:
    """Returns the gates (P, K) of each layer by its name, on the CPU.

    They are means over each prompt's positions.
    """
    gates_of_batches: dict[str, list[torch.Tensor]] = {adapted.layer.name: [] for adapted in layers}
    prompt_BT = torch.empty(0)  # prompt mask of the current batch

    def record(adapted: AdaptedLayer, gates: torch.Tensor) -> torch.Tensor:
        name = adapted.layer.name
        # OPT flattens batch and positions into one dimension before its MLP.
        by_row = gates.unflatten(0, prompt_BT.shape) if gates.ndim == 2 else gates
        if by_row.shape[1] not in (1, prompt_BT.shape[1]):
            problem = "does not see every position, so its gates cannot be measured"
            fix = "leave it out of target_modules, or use export --gates"
            raise BaditError(f"{name}: {problem}; {fix}")
        # Gates computed once for a prompt are those of all its positions.
        gates_BTK = by_row.float().expand(*prompt_BT.shape, -1)
        gates_BK = prompt_mean(gates_BTK, prompt_BT.to(gates.device))
        gates_of_batches[name].append(gates_BK.cpu())
        return gates

    with changed_gates(layers, record):
        for batch in batches:
            inputs = send_to_device(batch, model.device)
            prompt_BT = before_first_label(inputs["labels"], inputs["attention_mask"])
            answer_losses(model, inputs)  # runs a forward pass with the prompt mask and the tasks
    return {name: torch.cat(gates) for name, gates in gates_of_batches.items()}


def gates_frame(gates: PromptGates) -> pd.DataFrame:
    """Returns each task's mean gates in each module."""
    means_TMK = gates.means
    places = product(gates.by_task, gates.modules, range(means_TMK.shape[-1]))
    prompts = span([len(gates_PMK) for gates_PMK in gates.by_task.values()])
    return GATES.frame(
        [
            (task, *module, expert, mean)
            for (task, module, expert), mean in zip(places, means_TMK.ravel(), strict=True)
        ],
        f"Gates of {prompts} prompts of each of {len(gates.by_task)} tasks, divided by their mean "
        "over the experts: 1 is neutral, and the number of experts means that only one expert is "
        "used.",
    )


class Clusters(NamedTuple):
    """The clusters of prompts in a module, or in all modules, which then have the same."""

    module: int  # index of the module whose gates tell the clusters apart
    place: tuple[int, str]  # layer and module; (−1, "all") for all
    codes_CK: np.ndarray  # gates of the prompts of each cluster, divided by their mean
    mixes: bool  # whether a prompt may have the gates of two clusters, in shares

    def nearest(self, gates_PMK: np.ndarray) -> np.ndarray:
        """Returns the cluster (P) of each prompt by its gates, which are divided by their mean."""
        differences_PCK = np.abs(gates_PMK[:, self.module, None] - self.codes_CK)
        return differences_PCK.sum(axis=-1).argmin(axis=1)

    def shares(self, gates_PMK: np.ndarray) -> np.ndarray:
        """Returns the share (C) of the prompts in each cluster."""
        cluster_P = self.nearest(gates_PMK)
        return np.bincount(cluster_P, minlength=len(self.codes_CK)) / len(cluster_P)


@torch.no_grad()
def clusters_of(layers: Sequence[AdaptedLayer]) -> list[Clusters]:
    """Returns the clusters of every layer, or of all together; none without clusters.

    The tasks of an extension are one more cluster. Without mixing, its prompts have the same gates.
    """
    clusters = []
    for index, (layer, adapter) in enumerate(layers):
        codes = getattr(layer, "badit_codes", {})
        if adapter not in codes:
            continue
        config: Any = layer.badit_config[adapter]
        codes_CK = torch.nn.functional.pad(codes[adapter].float(), (0, len(config.extensions)))
        added = range(1, len(config.extensions) + 1)
        of_extensions = [extension_code(layer, adapter, number).float() for number in added]
        codes_CK = torch.cat([codes_CK, *(code_K[None] for code_K in of_extensions)])
        codes_CK = (codes_CK / codes_CK.mean(dim=1, keepdim=True)).cpu().numpy()
        # Of one key for all layers, the first layer shows the clusters of all.
        if config.key == "embedding":
            return [Clusters(index, (-1, "all"), codes_CK, config.mixing > 0)]
        place = layer_and_module(layer.name)
        clusters.append(Clusters(index, place, codes_CK, config.mixing > 0))
    return clusters


def clusters_frame(model: Any, gates: PromptGates) -> pd.DataFrame:
    """Returns how the prompts of each task are spread over clusters; no rows without clusters."""
    clusters = clusters_of(active_experts(model))
    rows = [
        (task, *of_place.place, cluster, share)
        for of_place in clusters
        for task, gates_PMK in gates.by_task.items()
        for cluster, share in enumerate(of_place.shares(gates_PMK))
    ]
    prompts = span([len(gates_PMK) for gates_PMK in gates.by_task.values()])
    return CLUSTERS.frame(
        rows,
        f"Clusters of {prompts} prompts of each of {len(gates.by_task)} tasks. "
        f"{_what_clusters_share(clusters)}",
    )


def _what_clusters_share(clusters: Sequence[Clusters]) -> str:
    if any(of_place.mixes for of_place in clusters):
        return "A prompt is in the cluster whose gates are most similar to its own."
    if any(of_place.place == (-1, "all") for of_place in clusters):
        return "The prompts of a cluster have the same gates, in all modules."
    return "The prompts of a cluster have the same gates in this module."


def task_gates(
    run: RunFolder,
    model: Any,
    tokenizer: Any,
    recipe: Recipe,
    tasks: Mapping[str, Task],
    names: Sequence[str],
) -> Iterator[tuple[str, TaskGates]]:
    """Yields each named task with the gates of its first training prompts.

    They are cached in the run's ``gates.json``.
    """
    # The cache is used only for the same weights, precision, prompt format and data.
    depends_on = {
        "model": model_fingerprint(model),
        "dtype": model_dtype(recipe),
        "prompt": recipe.prompt.model_dump(),
        "prompts_per_task": PROMPTS_PER_TASK,
        **task_fingerprints(list(tasks.values())),
    }
    by_task = _cached_gates(run.gates_path, model, depends_on)
    collate = AnswerCollator(tokenizer.pad_token_id, with_tasks=True)
    written = len(by_task)
    unmeasured = [name for name in names if name not in by_task]
    for name in names:
        if name not in by_task:
            pairs = [(tasks[name], instance) for instance in tasks[name].train[:PROMPTS_PER_TASK]]
            examples = encoded(tokenizer, recipe, pairs, model)
            batches = batches_by_task(examples, collate, _BATCH_SIZE)
            by_task[name] = gates_of_task(model, batches[name])
            if name == unmeasured[-1] or len(by_task) > _GROWTH * written:
                written = len(by_task)
                # The run's folder may be read-only.
                with suppress(BaditError):
                    saved = {task: gates._asdict() for task, gates in by_task.items()}
                    write_json(run.gates_path, {"depends_on": depends_on, "tasks": saved})
        yield name, by_task[name]


def _cached_gates(path: Path, model: PeftModel, depends_on: dict[str, Any]) -> dict[str, TaskGates]:
    """Returns the cached gates by task; none if the file is missing, damaged or outdated."""
    # The cache may be damaged; it is then measured again and replaced.
    with suppress(BaditError, KeyError, TypeError, AttributeError, ValueError):
        cache = read_json(path)
        if cache["depends_on"] == depends_on:
            return {
                name: TaskGates(
                    _checked_gates(gates["means"], path, model),
                    _checked_shares(gates["clusters"], model),
                )
                for name, gates in cache["tasks"].items()
            }
    return {}


def _checked_shares(content: Any, model: PeftModel) -> Sequence[Sequence[float]]:
    """Returns the shares of a task's prompts by cluster; ValueError if they are damaged."""
    expected = [len(of_place.codes_CK) for of_place in clusters_of(adapted_layers(model))]
    if [len(shares) for shares in content] != expected:
        raise ValueError("clusters")
    if not all(is_number(share) for shares in content for share in shares):
        raise ValueError("clusters")
    return content


def read_gates(path: Path, model: PeftModel) -> Gates:
    """Reads gates from a file.

    It must have one gate for every expert of every adapted module and nothing else.
    """
    return _checked_gates(read_export(path), path, model)


def _checked_gates(content: Mapping[str, Any], path: Path, model: PeftModel) -> Gates:
    numbers = {
        adapted.layer.name: adapted.layer.num_gates(adapted.adapter)
        for adapted in adapted_layers(model)
    }
    for name in (*content, *numbers):
        if name not in numbers:
            suggestion = nearest(name, numbers)
            raise BaditError(f"{path}: {name}: not a module that the run adapts{suggestion}")
        gates = content.get(name)
        number = numbers[name]
        if not isinstance(gates, list) or len(gates) != number or not all(map(is_number, gates)):
            expected = f"a list of {number} numbers, one gate per expert"
            raise BaditError(f"{path}: {name}: must be {expected}")
    return content

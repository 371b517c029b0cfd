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
from torch import Tensor

import badit
from badit.data import AnswerCollator
from badit.data.encoding import encode_examples
from badit.evaluation.losses import prompt_losses
from badit.method.abilities import prompt_keys
from badit.metrics.statistics import paired_bootstrap
from badit.support.environment import environment
from badit.support.files import write_json, write_text
from badit.tuner import badit_layer, hooks_of
from badit.tuner import extension as extensions_module
from badit.tuner.abilities import Keys
from badit.tuner.context import RoutingContext
from badit.tuner.extension import Part, Parts, with_clusters

RESULTS = Path(__file__).parents[1] / "results" / "mixing.json"
RUNS = Path("runs/mixing")
SEEDS = (30, 31)
VARIANT = "own-32@1e-3"
TEMPERATURES = (0.01, 0.03, 0.1)
HELD_OUT = 40  # training instances of each task

Weights = Mapping[int, float]  # of extensions, by number


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
            own = mixture.number_of(task.name)
            for mode, weights in mixture.weights(example, own).items():
                loss = mixture.loss(weights, AnswerCollator(tokenizer.pad_token_id)([example]))
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
    """Passes of a model in which every prompt has given weights of the extensions."""

    def __init__(self, model: Any) -> None:
        self.model = model
        hooks: Any = hooks_of(model)
        (self.adapter,) = hooks.active_adapters
        self.config = hooks.peft_config[self.adapter]
        self.keys = Keys(model.get_base_model())
        self.holder = RoutingContext.of(hooks.model).extension_holders[self.adapter]
        self.current: Weights = {}

    def number_of(self, task: str) -> int:
        """Returns the number of the extension of a task; 0: the run's first task."""
        for number, extension in enumerate(self.config.extensions, start=1):
            if task in extension.tasks:
                return number
        return 0

    def weights(self, example: Mapping[str, Any], own: int) -> dict[str, Weights]:
        """Returns the weights of the extensions for a prompt, by mode."""
        ids = example["input_ids"][: example["prompt_length"]]
        embedded_TE = self.keys.embedding(torch.tensor(ids)).float()
        key_1E = prompt_keys(embedded_TE.mean(dim=0, keepdim=True), *self.keys.moments)
        cosines = {}
        extensions = self.holder.badit_extensions[self.adapter]
        for number in with_clusters(self.holder, self.adapter):
            centroids_CE = self.keys.centroids(extensions.of("directions", number))
            cosines[number] = float((key_1E.double() @ centroids_CE.T).max())
        first, second = sorted(cosines, key=lambda number: -cosines[number])[:2]
        modes: dict[str, Weights] = {"nearest": {first: 1.0}, "own": {own: 1.0}}
        for temperature in TEMPERATURES:
            logits = torch.tensor([cosines[first], cosines[second]]) / temperature
            shares = logits.softmax(dim=0).tolist()
            modes[f"two nearest, T = {temperature}"] = {first: shares[0], second: shares[1]}
        return modes

    @torch.no_grad()
    def loss(self, weights: Weights, batch: Mapping[str, Any]) -> float:
        """Returns the NLL per answer token of a batch of one instance."""
        self.current = weights
        whole = Parts([Part(-1)], None, ())
        with (
            patch.object(badit_layer, "parts_of", lambda routing, adapter: whole),
            patch.object(badit_layer, "extended_change", self.change),
        ):
            sums, counts = prompt_losses(self.model, [batch])
        return float(sums[0] / counts[0])

    def change(self, layer: Any, adapter: str, x: Tensor, parts: Parts) -> Tensor:
        """Replaces tuner.extension.extended_change: the weighted sum of the extensions' changes."""
        total = torch.zeros((), dtype=x.dtype)
        for number, weight in self.current.items():
            total = total + weight * self._change_of(layer, adapter, number, x)
        return total

    def _change_of(self, layer: Any, adapter: str, number: int, x: Tensor) -> Tensor:
        if number == 0:
            gates = layer.gates_of_experts(adapter, x)
            of_components = gates[..., layer.expert_of(adapter)]
            return layer.product(adapter, x, *layer.gated_factors(adapter, of_components))
        code_G = extensions_module.extension_code(layer, adapter, number)
        gates = code_G.expand(len(x), 1, -1)
        return extensions_module._change_of_extension(layer, adapter, number, x, gates)


if __name__ == "__main__":
    main()

"""``--dry-run``: checks a recipe without loading weights, and estimates time and memory."""

import heapq
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from badit.authoring.step_time import estimated_seconds
from badit.comparison.checks import check as check_grid
from badit.comparison.finished import FinishedCells
from badit.comparison.grid import Grid
from badit.data import Task, prompt_text
from badit.data.encoding import sequences
from badit.models import load_tokenizer
from badit.recipe.method import resolve_method
from badit.recipe.schema import Recipe
from badit.runs.folder import RunFolder
from badit.runs.resolved import ResolvedRun, resolve
from badit.support.console import status
from badit.support.errors import BaditError
from badit.support.text import counted, text_table
from badit.training.encoding import encoded
from badit.training.extending import add_tasks
from badit.training.hf_arguments import training_arguments
from badit.training.loading import model_dtype
from badit.training.methods import Method, on_skeleton
from badit.tuner import hooks_of

_SAMPLED = 64  # approximate number of training instances that steps are timed with
_LONG = 5  # seconds of preparation that are worth telling
_SIZES = {None: 1.0, "bnb-4bit": 0.3}  # of quantised weights relative to 16 bits; others: 0.5


def check(recipe: Recipe, tasks: list[Task] | None = None) -> list[str]:
    """Describes a recipe's training in lines of text; BaditError with a line per problem.

    ``tasks`` are those of the recipe, if they are read already.
    """
    problems: list[str] = []

    def tried(step: Callable[[], Any]) -> Any:
        try:
            return step()
        except BaditError as error:
            problems.extend(str(error).split("\n"))

    run: ResolvedRun | None = tried(lambda: resolve(recipe, tasks))
    with status(f"checking {recipe.model.name}", in_logs=True):
        options = recipe.model.model_dump(exclude={"dtype", "quantisation"})
        tokenizer = tried(lambda: load_tokenizer(**options))
    # Also with invalid data, so that all problems are reported at once.
    checked = run or tried(lambda: _without_tasks(recipe))
    applied = None
    if checked is not None:
        tried(lambda: training_arguments(checked, Path(recipe.output), 0))
        applied = tried(lambda: _method_and_model(checked))
    if run is not None:
        tried(run.has_begun)
    if problems or run is None or applied is None:
        # Several checks may find the same problem.
        raise BaditError(*dict.fromkeys(problems))
    return _DryRun(run, tokenizer, *applied).lines()


def _without_tasks(recipe: Recipe) -> ResolvedRun:
    run = ResolvedRun(RunFolder.at(recipe.output), recipe, resolve_method(recipe.method))
    run.tasks = []
    return run


def _method_and_model(run: ResolvedRun) -> tuple[Method, Any]:
    tasks = run.tasks
    if run.stages and not run.method.needs_tasks:
        _, tasks = run.stages[0]
    names = [task.name for task in tasks]
    return on_skeleton(run.recipe, run.method, names, dtype=model_dtype(run.recipe))


def check_comparison(recipe: Recipe) -> list[str]:
    """Describes a comparison: its methods and budgets, and one run of the reference method."""
    grid = Grid(recipe)
    reference = grid.section.reference
    first_cell = grid.chosen(reference, grid.start_rates[reference])[0]
    # Without the first line, which names the folder of this one run.
    lines_of_run = check(grid.recipe_of(first_cell))[1:]
    with status("checking data and methods", in_logs=True):
        tasks, counts = check_grid(grid, FinishedCells(grid))
    rows = []
    total = 0
    for name, rate in grid.start_rates.items():
        cells = len(grid.chosen(name, rate, tasks))
        total += cells
        rows.append([name, str(cells), f"{counts[name]:,}" if counts[name] else "–"])
    table = text_table(["method", "runs", "trainable parameters"], rows, right={1, 2})
    search = ", plus those of the learning rate search" if grid.section.learning_rates else ""
    return [
        *table.split("\n"),
        "",
        f"{total} runs{search}; they would be written to {recipe.output}",
        f"one run of {reference}:",
        *(f"  {line}" for line in lines_of_run),
    ]


@dataclass
class _DryRun:
    """A run whose method is applied to its base model on the meta device."""

    run: ResolvedRun
    tokenizer: Any
    method: Method
    model: Any

    def lines(self) -> list[str]:
        """Returns the description of the training."""
        run = self.run
        recipe = run.recipe
        lines = [f"{run.counts}; the run would be written to {recipe.output}"]
        # Also if nothing is trained: encoding refuses instances that the model cannot take.
        with status("reading the longest prompts", in_logs=True):
            longest, sample = self._longest(), self._sample()
        if not run.method.trains:
            return [*lines, f"the method {self.method.name} trains nothing"]

        steps = [_steps(run, tasks) for _, tasks in run.stages]
        rows = recipe.training.per_device_train_batch_size
        rows *= recipe.training.gradient_accumulation_steps
        unit = "pairs" if recipe.training.objective == "dpo" else "instances"
        lines.append(f"{sum(steps)} steps of {rows * _processes()} {unit}")
        lines.append(self._time(sum(steps), sample))
        if run.method.regroup is not None:
            # The components of frozen experts keep their groups.
            of_stages = [
                len(run.method.regroup.due(count))
                for number, count in enumerate(steps)
                if not run.adds_tasks(number)
            ]
            regroupings = sum(of_stages)
            fix = "" if regroupings else ": lower method.regroup.every"
            lines.append(f"{regroupings} regroupings in {sum(steps)} steps{fix}")
        memory = self._memory(longest, self.method.trained_parameters(self.model))
        # Last, because it adds the later tasks to the model.
        return [*lines, self._parameters(), memory]

    def _parameters(self) -> str:
        """Describes the trained parameters: at a time, and of all tasks of a sequence."""
        run = self.run
        counts = [self.method.trained_parameters(self.model)]
        size = _size_of_tasks(self.model)
        for number, (_, tasks) in enumerate(run.stages[1:], start=1):
            with torch.device("meta"):
                if run.adds_tasks(number):
                    add_tasks(self.model, run.recipe.extend, [task.name for task in tasks])
                else:
                    hooks_of(self.model).next_task()
            counts.append(self.method.trained_parameters(self.model))
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        line = f"{max(counts):,} of {parameters:,} parameters are trained"
        added = _size_of_tasks(self.model) - size
        if not added:
            return line
        # What a later task shares with earlier ones is counted once.
        return f"{line} at a time, {counts[0] + added:,} in all {len(counts)} tasks"

    def _longest(self) -> list[Mapping[str, Any]]:
        """Returns the encoded sequences of the batch that needs most memory: two of a pair."""
        recipe = self.run.recipe

        def length(pair: Any) -> int:
            task, instance = pair
            prompt = prompt_text(task, instance, recipe.prompt.encoding)
            return len(prompt) + max(len(instance.outputs[0]), len(instance.rejected or ""))

        # By characters, because tokenising all instances would take long.
        pairs = ((task, instance) for task in self.run.tasks for instance in task.train)
        rows = recipe.training.per_device_train_batch_size
        longest = heapq.nlargest(rows, pairs, key=length)
        return sequences(encoded(self.tokenizer, recipe, longest, self.model))

    def _sample(self) -> list[dict[str, Any]]:
        """Returns some encoded training instances of all tasks."""
        step = max(1, self.run.training_instances // _SAMPLED)
        # Every task is included: a slice with a step has at least the first instance.
        pairs = [(task, instance) for task in self.run.tasks for instance in task.train[::step]]
        return encoded(self.tokenizer, self.run.recipe, pairs, self.model)

    def _time(self, steps: int, sample: Sequence[dict[str, Any]]) -> str:
        with status("timing steps with few layers", in_logs=True):
            seconds = estimated_seconds(self.run, self.tokenizer, sample)
        if seconds is None:
            return "time unknown: steps with few layers cannot be tried on this machine"
        preparation = seconds.preparation * len(self.run.stages)
        minutes = math.ceil((preparation + steps * seconds.step) / 60)
        line = f"about {counted(minutes, 'minute')} of training at this machine's present load"
        if preparation >= _LONG:
            line += f", {counted(round(preparation), 'second')} of it before the first step"
        split = self.run.recipe.evaluation.split
        scored = counted(self.run.test_instances, f"{split} instance")
        return f"{line}; without loading the model and answering {scored}"

    def _memory(self, longest: Sequence[Mapping[str, Any]], trained: int) -> str:
        """Describes the memory of the longest batch with this many trained parameters."""
        recipe = self.run.recipe
        tokens = max(len(example["input_ids"]) for example in longest)
        answer_tokens = sum(
            len(example["input_ids"]) - example["prompt_length"] for example in longest
        )
        frozen = [p for p in self.model.parameters() if not p.requires_grad]
        weights = sum(p.numel() * p.element_size() for p in frozen)
        vocabulary = self.model.config.get_text_config().vocab_size
        activations = self._activations(len(longest), tokens)
        estimates = {
            "weights": weights * _SIZES.get(recipe.model.quantisation, 0.5),
            # Weight, gradient and two moments in float32.
            "gradients and optimizer": 16 * trained,
            "activations": activations,
            # Logits, softmax and gradient in float32.
            "logits": 12 * answer_tokens * vocabulary,
        }
        shown = []
        for name, size in estimates.items():
            shown.append(f"{name} ?" if size is None else f"{name} {size / 2**30:.1f}")
        total = sum(size or 0 for size in estimates.values()) / 2**30
        qualifier = "more than" if activations is None else "about"
        batch = f"a batch of {len(longest)} × {tokens} tokens"
        return f"{qualifier} {total:.1f} GiB of memory for {batch} ({', '.join(shown)})"

    def _activations(self, rows: int, tokens: int) -> float | None:
        """Returns the bytes that autograd saves in a forward pass, counted on the meta device.

        None if the model cannot run there.
        """
        model = self.model
        sizes: dict[int, int] = {}
        # Autograd saves parameters and buffers too, which are counted as weights.
        own_tensors = {*model.parameters(), *model.buffers()}
        own_storages = {tensor.untyped_storage()._cdata for tensor in own_tensors}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            # By storage, because several saved tensors may be views of one.
            storage = tensor.untyped_storage()
            sizes[storage._cdata] = storage.nbytes()
            return tensor

        # Logits are estimated separately, so only those of one position are computed.
        inputs: dict[str, Any] = {"use_cache": False, "logits_to_keep": 1}
        try:
            hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
            with torch.device("meta"), hooks:
                if hooks_of(model).routes_prompts:
                    inputs["prompt_mask"] = torch.ones(rows, tokens).bool()
                # A smaller mask would have its values read.
                mask = torch.ones(rows, 1, tokens, tokens, dtype=torch.bool)
                ids = torch.zeros(rows, tokens, dtype=torch.long)
                model.train()(ids, attention_mask=mask, **inputs)
        except Exception:  # an architecture that reads tensor values
            return None
        total = sum(size for storage, size in sizes.items() if storage not in own_storages)
        if not self.run.recipe.training.gradient_checkpointing:
            return total
        # Every layer's input, and the activations of one layer at a time.
        config = model.config.get_text_config()
        layers = config.num_hidden_layers
        layer_input = rows * tokens * config.hidden_size * model.dtype.itemsize
        return total / layers + layers * layer_input


def _size_of_tasks(model: torch.nn.Module) -> int:
    """Returns the size of the parameters and of the frozen copies that belong to earlier tasks."""
    sizes = [parameter.numel() for parameter in model.parameters()]
    sizes += [values.numel() for name, values in model.named_buffers() if "past" in name]
    return sum(sizes)


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _steps(run: ResolvedRun, tasks: Sequence[Task]) -> int:
    """Returns the number of optimizer steps of a stage, counted like transformers' Trainer."""
    training = run.recipe.training
    if training.max_steps > 0:
        return training.max_steps
    quotas = run.recipe.data.quotas(tasks)
    if quotas:
        instances = sum(quotas.values())
    else:
        instances = sum(len(task.train) for task in tasks)
    batches = math.ceil(instances / (training.per_device_train_batch_size * _processes()))
    steps_per_epoch = math.ceil(batches / training.gradient_accumulation_steps)
    return math.ceil(training.num_train_epochs * steps_per_epoch)

"""Tools for writing recipes: a first recipe for given data, a dry run, the list of keys, a JSON schema for editors."""

import heapq
import json
import math
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, StrictUndefined
from pydantic import BaseModel
from torch.utils.benchmark import Timer

from badit.comparison.compare import Grid
from badit.comparison.compare import check as check_grid
from badit.data import Task, hold_out, limit, load_sources, prompt_text
from badit.models import device, load_tokenizer
from badit.recipe.arguments import argument_names, fixed_reason
from badit.recipe.schema import Recipe, build_recipe, parse_yaml, section_of, to_yaml
from badit.runs.folder import RunFolder
from badit.support.console import status
from badit.support.errors import BaditError
from badit.support.files import read_text
from badit.support.text import counted, text_table
from badit.training.fit import Plan, encoded, make_plan, model_dtype, training_arguments
from badit.training.methods import (
    NAMES,
    AdapterMethod,
    Method,
    build_method,
    on_skeleton,
    options_of,
)
from badit.training.regrouping import RegroupOptions
from badit.tuner import hooks_of

_SAMPLED = 64  # approximate number of training instances from which the mean length is estimated
# Lower bound of a step's time relative to its matrix products with weights; the rest is attention, norms, adapters and
# the overhead of small batches. Measured on a CPU: 2 in float32, 5 in bfloat16 (small model, fast products).
_OVERHEAD = 2.0


def first_recipe(source: str, path: str, overrides: Sequence[str] = ()) -> str:
    """Returns the text of a commented recipe for the file ``path``; BaditError if the data cannot train and score.

    ``source`` is the recipe's ``data.source``; ``overrides`` are keys of the data section that are needed to read it,
    such as ``data.columns.input=text``.
    """
    if others := [
        one for one in overrides if not one.startswith("data.") or one.startswith("data.source")
    ]:
        raise BaditError(
            f"{others[0]!r:.60}: only other data keys can be set here, such as data.columns.input=text"
        )
    data = build_recipe({"data": {"source": source}}, overrides).data
    given = data.model_dump(
        mode="json", exclude_defaults=True, exclude={"source", "validation_per_task"}
    )
    with status("reading the tasks"):
        tasks = load_sources(data.sources(), data.tasks, data.weights)
    quarters = [quarter for task in tasks if (quarter := len(task.train) // 4)]
    held_out = data.validation_per_task or min(10, min(quarters, default=0))
    # If some tasks have no training data, the others need no test data, as in make_plan.
    split = (
        "test"
        if all(task.test for task in tasks) or not all(task.train for task in tasks)
        else "validation"
    )
    used = limit(
        hold_out(tasks, held_out, data.seed), data.train_per_task, data.test_per_task, data.seed
    )
    train, test = (sum(len(getattr(task, part)) for task in used) for part in ("train", split))
    answer = max(
        (_most_tokens(output) for task in tasks for one in task.train for output in one.outputs),
        default=0,
    )
    tokens = min(1024, max(50, math.ceil(answer / 50) * 50))
    values = {
        "tasks": tasks,
        "train": train,
        "test": test,
        "split": split,
        "tokens": tokens,
        "held_out": held_out,
    }
    values |= {"path": path, "stem": Path(path).stem, "source": source, "given": given}
    templates = Environment(keep_trailing_newline=True, trim_blocks=True, undefined=StrictUndefined)
    templates.filters |= {"yaml": as_yaml, "counted": counted, "shell": shlex.quote}
    text = templates.from_string(read_text(Path(__file__).with_name("recipe.yaml.j2"))).render(
        values
    )
    make_plan(build_recipe(parse_yaml(text, where=path), where=path))
    return text


def check(recipe: Recipe) -> list[str]:
    """Describes a recipe's training in lines of text, without loading weights; BaditError with a line per problem."""
    section, errors = recipe.model, list[str]()

    def tried(step: Callable[[], Any]) -> Any:
        try:
            return step()
        except BaditError as error:
            errors.append(str(error))

    plan = tried(lambda: make_plan(recipe))
    tried(
        lambda: training_arguments(
            plan or Plan(recipe, [], build_method(recipe.method)), Path(recipe.output), 0
        )
    )
    with status(f"checking {section.name}"):
        tokenizer = tried(
            lambda: load_tokenizer(**section.model_dump(exclude={"dtype", "quantisation"}))
        )
    names = [task.name for task in plan.tasks] if plan else []
    tried(lambda: RunFolder.at(recipe.output).belongs_to(recipe))
    applied = tried(lambda: on_skeleton(recipe, names, dtype=model_dtype(recipe)))
    if errors:
        raise BaditError(*dict.fromkeys("\n".join(errors).split("\n")))
    method, model = applied
    counts = f"{plan.training_instances} training and {plan.test_instances} {recipe.evaluation.split} instances"
    lines = [
        f"{counted(len(plan.tasks), 'task')}, {counts}; the run would be written to {recipe.output}"
    ]
    size, processes = (
        recipe.training.per_device_train_batch_size,
        int(os.environ.get("WORLD_SIZE", "1")),
    )
    with status("reading the longest prompts"):
        pairs = ((task, instance) for task in plan.tasks for instance in task.train)
        encoding = recipe.prompt.encoding
        longest = heapq.nlargest(
            size, pairs, key=lambda pair: len(prompt_text(*pair, encoding) + pair[1].outputs[0])
        )
        longest = encoded(tokenizer, recipe, longest, model)
        every = max(1, plan.training_instances // _SAMPLED)
        some = encoded(
            tokenizer,
            recipe,
            [(task, one) for task in plan.tasks for one in task.train[::every]],
            model,
        )
    if not method.trains:
        return [*lines, f"the method {method.name} trains nothing"]
    steps = [_steps(plan, tasks, processes) for _, tasks in plan.stages]
    lines.append(
        f"{sum(steps)} steps of {size * recipe.training.gradient_accumulation_steps * processes} instances"
    )
    tokens = (
        sum(len(one["input_ids"]) for one in some)
        / len(some)
        * size
        * recipe.training.gradient_accumulation_steps
    )
    least = math.ceil(sum(steps) * tokens * _seconds_per_token(recipe, model, method) / 60)
    lines.append(
        f"{least:,} to {3 * least:,} minutes of training on this machine, without other load"
    )
    if isinstance(method, AdapterMethod) and method.regroup is not None:
        due = sum(len(RegroupOptions(**method.regroup).due(count)) for count in steps)
        lines.append(
            f"{due} regroupings in {sum(steps)} steps"
            + (": lower method.regroup.every" if not due else "")
        )
    trained, parameters = (
        method.trained_parameters(model),
        sum(p.numel() for p in model.parameters()),
    )
    lines.append(f"{trained:,} of {parameters:,} parameters are trained")
    tokens = max(len(one["input_ids"]) for one in longest)
    answers = sum(len(one["input_ids"]) - one["prompt_length"] for one in longest)
    weights = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    weights *= {None: 1.0, "bnb-4bit": 0.3}.get(section.quantisation, 0.5)
    parts = {
        "weights": weights,
        "gradients and optimizer": 16 * trained,  # weight, gradient and two moments in float32
        "activations": _activations(recipe, model, len(longest), tokens),
        "logits": 12
        * answers
        * model.config.get_text_config().vocab_size,  # logits, softmax and gradient in float32
    }
    shown = ", ".join(
        f"{name} {'?' if part is None else f'{part / 2**30:.1f}'}" for name, part in parts.items()
    )
    total = sum(part or 0 for part in parts.values()) / 2**30
    about = "about" if parts["activations"] is not None else "more than"
    return [
        *lines,
        f"{about} {total:.1f} GiB of memory for a batch of {len(longest)} × {tokens} tokens ({shown})",
    ]


def check_comparison(recipe: Recipe) -> list[str]:
    """Describes a comparison, as lines of text: the methods with their budgets, and one run of the reference method."""
    grid = Grid(recipe)
    reference = grid.section.reference
    a_run = check(grid.recipe_of(grid.chosen(reference, grid.start_rates[reference])[0]))[1:]
    with status("checking data and methods"):
        tasks, counts = check_grid(grid)
    cells = {name: len(grid.chosen(name, rate, tasks)) for name, rate in grid.start_rates.items()}
    rows = [
        [name, str(cells[name]), f"{count:,}" if count else "–"] for name, count in counts.items()
    ]
    lines = [
        *text_table(["method", "runs", "trainable parameters"], rows, right={1, 2}).split("\n"),
        "",
    ]
    search = ", plus those of the learning rate search" if grid.section.learning_rates else ""
    lines.append(f"{sum(cells.values())} runs{search}; they would be written to {recipe.output}")
    return [*lines, f"one run of {reference}:", *(f"  {line}" for line in a_run)]


def _seconds_per_token(recipe: Recipe, model: Any, method: Method) -> float:
    """Estimates the seconds per token of a training step from the measured time of one matrix product on the device."""
    weight = model.get_input_embeddings().weight
    hidden, rows, dtype = weight.shape[1], 1024, weight.dtype
    names = {"x": torch.randn(rows, hidden, dtype=dtype, device=device())}
    names["w"] = torch.randn(hidden, 4 * hidden, dtype=dtype, device=device())
    product = Timer("x @ w", globals=names, num_threads=torch.get_num_threads()).blocked_autorange(
        min_run_time=0.2
    )
    embeddings = sum(p.numel() for p in {weight, model.get_output_embeddings().weight})
    weights = sum(p.numel() for p in model.parameters() if p.dim() == 2) - embeddings
    # Forward, backward to the inputs; backward to the weights if they are trained; a second forward if recomputed.
    passes = 2 + method.trains_base_weights + recipe.training.gradient_checkpointing
    return product.median / (rows * names["w"].numel()) * weights * passes * _OVERHEAD


def _most_tokens(text: str) -> float:
    """An upper estimate of the tokens of a text: one per three ASCII characters, 1.5 per other character."""
    ascii_letters = sum(map(str.isascii, text))
    return ascii_letters / 3 + 1.5 * (len(text) - ascii_letters)


def _steps(plan: Plan, tasks: Sequence[Task], processes: int) -> int:
    """Returns the number of optimizer steps of a stage, counted like transformers' Trainer."""
    training, quotas = plan.recipe.training, plan.recipe.data.quotas(tasks)
    if training.max_steps > 0:
        return training.max_steps
    count = sum(quotas.values()) if quotas else sum(len(task.train) for task in tasks)
    batches = math.ceil(count / (training.per_device_train_batch_size * processes))
    return math.ceil(
        training.num_train_epochs * math.ceil(batches / training.gradient_accumulation_steps)
    )


def _activations(recipe: Recipe, model: Any, rows: int, tokens: int) -> float | None:
    """Bytes that autograd saves in a forward pass, counted on the meta device; None if the model cannot run there."""
    kept: dict[int, int] = {}
    own = {one.untyped_storage()._cdata for one in (*model.parameters(), *model.buffers())}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    try:
        with (
            torch.device("meta"),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            prompts = (
                {"prompt_mask": torch.ones(rows, tokens).bool()}
                if hooks_of(model).routes_prompts
                else {}
            )
            masks = torch.ones(
                rows, 1, tokens, tokens, dtype=torch.bool
            )  # a smaller mask would have its values read
            ids = torch.zeros(rows, tokens, dtype=torch.long)
            model.train()(ids, attention_mask=masks, use_cache=False, logits_to_keep=1, **prompts)
    except Exception:  # an architecture that reads tensor values
        return None
    total = sum(size for storage, size in kept.items() if storage not in own)
    if (
        recipe.training.gradient_checkpointing
    ):  # every layer's input, and the activations of one layer at a time
        config = model.config.get_text_config()
        layers = config.num_hidden_layers
        total = total / layers + layers * rows * tokens * config.hidden_size * 4
    return total


def recipe_keys() -> Iterator[tuple[str, str, str]]:
    """Yields the dotted name, default (YAML) and description of every key; once for an option that methods share."""
    for name, field in Recipe.model_fields.items():
        if (section := section_of(field.annotation)) is not None:
            yield from (
                (f"{name}.{key}", as_yaml(default), text)
                for key, default, text in described_section(section)
            )
            if name == "training":
                yield (
                    "training.NAME",
                    "",
                    "any other field of TrainingArguments, such as optim or adam_beta2",
                )
        elif name == "method":
            yield "method.name", "badit", f"one of {', '.join(NAMES)}"
            found: dict[tuple[str, str, str], list[str]] = {}
            for method in NAMES:
                for key, default, text in options_of(method):
                    found.setdefault((key, as_yaml(default), " ".join(text.split())), []).append(
                        method
                    )
            for (key, default, text), methods in found.items():
                yield f"method.{key}", default, f"[{', '.join(methods)}] {text}"
        else:
            yield name, as_yaml(field.default), field.description or ""


def schema() -> dict[str, Any]:
    """Returns a JSON schema of recipes, for editors."""
    made = Recipe.model_json_schema()
    words: dict[str, Any] = {
        "name": {"enum": NAMES},
        "regroup": {"type": ["object", "null"], "properties": {}},
    }
    for key, _, text in recipe_keys():
        section, *option = key.split(".")
        if section == "method" and option != ["name"]:
            place = words["regroup"]["properties"] if len(option) > 1 else words
            place.setdefault(option[-1], {})["description"] = text
    others = {name: {} for name in sorted(argument_names()) if not fixed_reason(name)}
    method, inner = made["properties"]["method"], made["$defs"]
    for section, more in (
        (method, words),
        (inner["ComparedMethod"], words),
        (inner["TrainingSection"], others),
    ):
        section["properties"] = {**more, **section.get("properties", {})}
        section["additionalProperties"] = False
    made["properties"]["extends"] = {
        "type": "string",
        "description": "the recipe that this recipe extends",
    }
    made["properties"]["format"] = {
        "type": "integer",
        "description": "the version of a run's config.yaml",
    }
    inner["TrainingSection"]["properties"]["report_to"]["type"] = ["array", "string"]
    return made


def described_section(kind: type[BaseModel]) -> Iterator[tuple[str, Any, str]]:
    """Yields the name, default and description of each field of a section."""
    for name, field in kind.model_json_schema()["properties"].items():
        limits = [f"{word} {field[key]}" for key, word in _LIMITS.items() if key in field]
        text = ", ".join(filter(None, [_shown(field), *limits]))
        yield (
            name,
            field.get("default", "required"),
            "; ".join(filter(None, [text, field.get("description")])),
        )


_LIMITS = {"minimum": "at least", "exclusiveMinimum": "above", "exclusiveMaximum": "below"}
_TYPES = {
    "string": "a string",
    "integer": "an integer",
    "number": "a number",
    "boolean": "true or false",
}
_TYPES |= {"array": "a list", "object": "a mapping", "null": "null"}


def _shown(field: dict[str, Any]) -> str:
    """Describes the type of a field, given by its JSON schema; empty for a section."""
    if "anyOf" in field:
        return " or ".join(map(_shown, field["anyOf"]))
    return (
        f"one of {', '.join(field['enum'])}"
        if "enum" in field
        else _TYPES.get(field.get("type", ""), "")
    )


def as_yaml(value: Any) -> str:
    """Formats a plain value as YAML on one line."""
    if isinstance(value, str) and "\n" in value:
        return json.dumps(value, ensure_ascii=False)
    return to_yaml(value, default_flow_style=True, width=math.inf).split("\n")[0]

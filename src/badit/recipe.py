"""A recipe: everything that decides a run, as a YAML file with typed, validated fields.

Unknown keys are refused, with the nearest known one named. ``key=value`` overrides use dotted keys
(``training.epochs=2``) and YAML values. ``extends: FILE`` takes over another recipe's values (:func:`load_recipe`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator

from badit.data.prompts import ChatTemplate, PromptEncoding
from badit.errors import BaditError, nearest
from badit.files import read_text, shown
from badit.models import Quantisation
from badit.yaml_values import parse_yaml

Dtype = Literal["fast", "auto", "float32", "bfloat16", "float16"]
# What every library below can count to; a seed must suit numpy's generator as well, which takes none below 0.
_MOST = 2**31 - 1
Count = Annotated[int, Field(ge=1, le=_MOST)]
CountOrZero = Annotated[int, Field(ge=0, le=_MOST)]
Seed = CountOrZero


def _a_path(text: str) -> str:
    if not text.strip() or "\0" in text:
        raise ValueError("must be a name or a path, not blank and without NUL")
    return text


PathText = Annotated[str, AfterValidator(_a_path)]
# YAML reads a task's number, such as 363, as an integer.
TaskName = Annotated[str, Field(coerce_numbers_to_str=True)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelSection(_Section):
    """The base model."""

    name: PathText = Field("smollm2-135m", description="built-in name, local folder or hub id (org/name)")
    dtype: Dtype = Field(
        "fast",
        description="type of the frozen base weights; fast: bfloat16, or float32 on a processor without instructions "
        "for it; auto: the one they are saved in",
    )
    quantisation: Quantisation | None = Field(
        None, description="keep the base weights in 8 or 4 bits (badit[quantised]); experts are trained beside them"
    )
    revision: str | None = Field(None, description="branch, tag or commit of a hub model")
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")


class DataSection(_Section):
    """The tasks."""

    source: PathText = Field("builtin", description="'builtin', a folder or a .jsonl file; $VARIABLES are expanded")
    format: Literal["auto", "sapt", "superni", "jsonl", "builtin"] = "auto"
    tasks: list[TaskName] | None = Field(None, description="names or numbers of the tasks to use (default: all)")
    train_per_task: Count | None = Field(None, description="at most so many training instances a task")
    test_per_task: Count | None = Field(None, description="the first so many test instances a task")
    validation_per_task: CountOrZero = Field(0, description="instances to hold out of each task's training data")
    sampling: Literal["proportional", "balanced"] = Field(
        "proportional", description="tasks weigh by their size, or all the same"
    )
    order: str | list[TaskName] | None = Field(
        None,
        description="trains the tasks one after another: sapt-1, sapt-2, seeded-N or a list of names; null mixes them",
    )
    seed: Seed = Field(0, description="of the subsampling; kept apart from training.seed so that runs share their data")


class PromptSection(_Section):
    """From an instance to tokens."""

    encoding: PromptEncoding = Field("def", description="'def', or 'def+posN' with N demonstrations")
    max_source_tokens: int = Field(1024, ge=8, le=_MOST)
    max_answer_tokens: Count = 50
    chat_template: ChatTemplate = "auto"


class TrainingSection(_Section):
    """Optimisation; HF TrainingArguments underneath."""

    epochs: float = Field(1.0, gt=0, le=1e6)
    max_steps: Count | None = Field(None, description="overrides epochs")
    batch_size: Count = Field(8, description="per device")
    gradient_accumulation: Count = 1
    learning_rate: float = Field(5e-4, gt=0)
    scheduler: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    warmup: float = Field(0.03, ge=0, lt=1, description="fraction of the steps")
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, ge=0, description="0 switches clipping off")
    gradient_checkpointing: bool = False
    group_by_length: bool = Field(True, description="batches of similar length")
    seed: Seed = 0
    deterministic: bool = Field(False, description="only operations that give the same bits every time, if slower")
    max_skipped_steps: CountOrZero = Field(
        10, description="steps with a loss or gradient that is not finite to skip before the run stops"
    )
    log_every: Count = Field(10, description="steps between lines of metrics.jsonl")
    save_every: Count = Field(100, description="steps between checkpoints")
    report_to: list[Literal["tensorboard", "trackio"]] = Field(
        [], description="trackers to log to as well (badit[trackers])"
    )


class EvaluationSection(_Section):
    """Generation and scoring."""

    split: Literal["test", "validation"] = "test"
    batch_size: Count = 16
    max_new_tokens: Count = 50
    unseen_tasks: bool = Field(
        True, description="in a sequence, score the tasks still to come as well, after every task"
    )


class CompareSection(_Section):
    """What ``badit compare`` crosses; a single run leaves it out of account."""

    methods: dict[str, dict[str, Any]] = Field(description="a name for each method to compare, and its method section")
    reference: str = Field("lora", description="the method that differences are taken to")
    seeds: list[Seed] = Field([0, 1, 2], min_length=1)
    orders: list[str | list[TaskName]] | None = Field(
        None, min_length=1, description="orders of a sequence of tasks, as in data.order; null mixes the tasks"
    )
    learning_rates: list[float] | None = Field(
        None,
        description="a ladder that every method's rate is searched on, from training.learning_rate, by the loss on "
        "held-out training instances; null trains all with training.learning_rate",
    )
    budget: str | None = Field(None, description="the method whose number of trainable parameters the others must have")
    unmatched: list[str] = Field([], description="methods that need not keep to the budget")
    single_task: list[str] = Field([], description="methods to train on each task alone as well")

    @field_validator("learning_rates")
    @classmethod
    def _ascending(cls, rates: list[float] | None) -> list[float] | None:
        if rates is not None and (not rates or sorted(set(rates)) != rates or rates[0] <= 0):
            raise ValueError("must be positive and ascending, such as [2.5e-4, 5e-4, 1e-3]")
        return rates


class Recipe(_Section):
    """One run: what is tuned, on what, how, and where the result goes."""

    model: ModelSection = ModelSection()  # pyright: ignore[reportCallIssue]
    data: DataSection = DataSection()  # pyright: ignore[reportCallIssue]
    prompt: PromptSection = PromptSection()  # pyright: ignore[reportCallIssue]
    method: dict[str, Any] = Field(
        default={"name": "badit", "regroup": {}},
        description="name: badit, base or one of badit.baselines.BASELINES, and its options",
    )
    training: TrainingSection = TrainingSection()  # pyright: ignore[reportCallIssue]
    evaluation: EvaluationSection = EvaluationSection()  # pyright: ignore[reportCallIssue]
    compare: CompareSection | None = None
    output: PathText = Field("runs/badit", description="the run's folder, or that of a comparison's runs")


class RecipeValues(TypedDict, total=False):
    """Plain values for a recipe; a section may be given in part."""

    model: Mapping[str, Any]
    data: Mapping[str, Any]
    prompt: Mapping[str, Any]
    method: Mapping[str, Any]
    training: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    compare: Mapping[str, Any] | None
    output: str | os.PathLike[str]


#: A file, plain values, or a recipe as it is.
RecipeLike = str | os.PathLike[str] | Mapping[str, Any] | Recipe


def make_recipe(recipe: RecipeLike | None, values: Mapping[str, Any]) -> Recipe:
    """A recipe from what stands for one, None for the defaults, with ``values`` laid over it.

    Raises:
        BaditError: as :func:`load_recipe`.
    """
    where = "recipe"
    if recipe is None or isinstance(recipe, Mapping):
        content = recipe or {}
    elif isinstance(recipe, Recipe):
        content = recipe.model_dump()
    else:
        content, where = _content(Path(recipe)), shown(Path(recipe))
    return build_recipe(_merged(content, values), where=where)


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe file and applies ``key=value`` overrides.

    A top-level ``extends: FILE`` names another recipe in the file's folder or below it. The file's own values are laid
    over that recipe's, key by key within sections. Only a section that gives another ``name`` (a method's, a model's)
    replaces the extended recipe's section as a whole, since options of one method mean nothing to another.

    Raises:
        BaditError: a file or an override cannot be read, a file extends itself or one from elsewhere, or a key is
            unknown or has a wrong value.
    """
    path = Path(path)
    return build_recipe(_content(path), overrides, where=shown(path))


def _content(path: Path, extending: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A recipe file's values over those of the recipe that it extends; the files in ``extending`` led to this one."""
    if path in extending:
        raise BaditError(f"{shown(extending[-1])}: extends: {path.name} extends this file already")
    content = read_values(path)
    if "extends" not in content:
        return content
    base_path = path.parent / _file_beside(path, content.pop("extends"))
    base = _content(base_path, (*extending, path))
    build_recipe(base, where=shown(base_path))  # its mistakes are reported as its own
    return _merged(base, content)


def _file_beside(path: Path, name: Any) -> str:
    """``name``, if it is one that stays in the folder of the recipe that gives it: a recipe reads no file elsewhere."""
    if not isinstance(name, str) or "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise BaditError(
            f"{shown(path)}: extends: must be a file in the recipe's folder, such as base.yaml, not {name!r:.60}"
        )
    try:
        inside = (path.parent / name).resolve().is_relative_to(path.parent.resolve())
    except (OSError, RuntimeError):  # a link that leads to itself
        inside = False
    if not inside:
        raise BaditError(f"{shown(path)}: extends: {name!r:.60} is a link that leads out of the recipe's folder")
    return name


def _merged(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in own.items():
        former = base.get(key)
        if isinstance(former, Mapping) and isinstance(value, Mapping) and not _renamed(former, value):
            value = _merged(former, value)
        merged[key] = value
    return merged


def _renamed(former: Mapping[str, Any], own: Mapping[str, Any]) -> bool:
    return "name" in own and own["name"] != former.get("name")


def read_values(path: Path) -> dict[str, Any]:
    """A recipe file's values as they stand there, whatever they are.

    Raises:
        BaditError: the file cannot be read, or it holds no values by name.
    """
    content = parse_yaml(read_text(path), where=shown(path))
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise BaditError(f"{shown(path)}: must hold 'key: value' lines, not a {type(content).__name__}")
    return content


def build_recipe(content: Mapping[str, Any], overrides: Sequence[str] = (), *, where: str = "recipe") -> Recipe:
    """A recipe from plain values, with overrides applied; ``where`` opens the error messages."""
    merged = _copied(content)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise BaditError(f"{override!r:.80}: an override has the form key=value, such as training.epochs=2")
        _set(merged, key.split("."), parse_yaml(value, where=override), override)
    try:
        return Recipe.model_validate(merged)
    except ValidationError as error:
        raise BaditError(f"{where}: {_first_problem(error)}") from None


def expand_source(source: str) -> str:
    """``data.source`` with its $VARIABLES and ~ replaced.

    Raises:
        BaditError: a variable is not set.
    """
    expanded = os.path.expandvars(source)
    if missing := re.search(r"\$\{?(\w+)", expanded):
        raise BaditError(
            f"data.source: the environment variable {missing[1]} is not set; set it, or give data.source=PATH"
        )
    return os.path.expanduser(expanded)


def dump_recipe(recipe: Recipe) -> str:
    """One run's recipe as YAML, every field written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json", exclude={"compare"}), sort_keys=False, allow_unicode=True)


def differing_keys(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys in which two nested mappings differ."""
    keys = []
    for key in one.keys() | other.keys():
        a, b = one.get(key), other.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            keys += differing_keys(a, b, f"{prefix}{key}.")
        elif a != b or (key in one) != (key in other):
            keys.append(f"{prefix}{key}")
    return sorted(keys)


def _copied(value: Any) -> Any:
    """Plain values as YAML would give them: mappings that are ours to change, and paths as text."""
    if isinstance(value, Mapping):
        return {key: _copied(inner) for key, inner in value.items()}
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _set(content: dict[str, Any], keys: list[str], value: Any, override: str) -> None:
    *parents, last = keys
    for key in parents:
        inner = content.setdefault(key, {})
        if inner is None:
            inner = content[key] = {}
        if not isinstance(inner, dict):
            raise BaditError(f"{override!r:.80}: {key} is a single value and has no keys of its own")
        content = inner
    content[last] = value


def _first_problem(error: ValidationError) -> str:
    """The first problem as ``dotted.key: what is wrong``."""
    problem = error.errors(include_url=False)[0]
    location = [str(part) for part in problem["loc"]]
    dotted = f"{'.'.join(location):.120}"
    if problem["type"] == "extra_forbidden":
        return f"{dotted}: unknown key{nearest(location[-1], _known_keys(location[:-1]))}"
    message = problem["msg"].removeprefix("Value error, ").replace("\n", " ")
    given = repr(problem["input"])
    return f"{dotted}: {message[:1].lower() + message[1:]}, got {given if len(given) < 60 else given[:57] + '...'}"


def _known_keys(location: Sequence[str]) -> list[str]:
    section: type[BaseModel] = Recipe
    for part in location:
        annotation = section.model_fields[part].annotation
        candidates = [annotation, *get_args(annotation)]
        section = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(section.model_fields)

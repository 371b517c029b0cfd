"""A recipe: everything that decides a run, as a YAML file with typed, validated fields.

Unknown keys are refused, with the nearest known one named. ``key=value`` overrides use dotted keys
(``training.seed=2``) and YAML values. ``extends: FILE`` takes over another recipe's values (:func:`load_recipe`).
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from enum import Enum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypedDict, get_args, get_type_hints

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator

from badit.data.prompts import ChatTemplate, PromptEncoding
from badit.data.rows import Format, Source, Turns
from badit.errors import BaditError, first_problem, nearest
from badit.files import inside, read_text
from badit.models import Quantisation
from badit.yaml_values import parse_yaml

Column = Literal["task", "instruction", "input", "output", "id", "split", "messages"]
OptimizerName = Literal["adamw", "lora+", "orthogonal"]
Dtype = Literal["fast", "auto", "float32", "bfloat16", "float16"]
# What every library below can count to; a seed must suit numpy's generator as well, which takes none below 0.
_MOST = 2**31 - 1
Count = Annotated[int, Field(ge=1, le=_MOST)]
CountOrZero = Annotated[int, Field(ge=0, le=_MOST)]
Seed = CountOrZero


def _steps(steps: float) -> float:
    """A number of steps or, below 1, a fraction of the run: as transformers takes it."""
    if steps >= 1 and steps != int(steps):
        raise ValueError("must be a whole number of steps, or below 1, a fraction of the run")
    return int(steps) if steps == int(steps) else steps


Steps = Annotated[float, Field(ge=0, le=_MOST), AfterValidator(_steps)]
PositiveSteps = Annotated[float, Field(gt=0, le=_MOST), AfterValidator(_steps)]


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
        None, description="keep the base weights in 8 or 4 bits (badit[quantised]); experts are trained next to them"
    )
    revision: str | None = Field(None, description="branch, tag or commit of a hub model")
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")


class SourceSection(_Section):
    """One of several sources of tasks; what it leaves out is as in the data section."""

    path: PathText
    format: Format | None = None
    task: TaskName | None = None
    instruction: str | None = None
    columns: dict[Column, str] | None = None
    turns: Turns | None = None
    weight: float = Field(1.0, gt=0, description="of its tasks in the mixture")


class DataSection(_Section):
    """The tasks."""

    source: PathText | list[PathText | SourceSection] = Field(
        "builtin",
        description="'builtin', a file, a folder, a pattern with * or a data set of the hub, or a list of these; "
        "$VARIABLES are expanded",
    )
    format: Format = "auto"
    task: TaskName | None = Field(
        None, description="the one task that rows belong to which name none (default: the file's name)"
    )
    instruction: str | None = Field(None, description="that of rows which have none; null: the input is all")
    columns: dict[Column, str] = Field(
        {}, description="columns by what they hold, such as {input: text, output: label}"
    )
    turns: Turns = Field("last", description="of a chat, train the last answer, or all of them")
    tasks: list[TaskName] | None = Field(None, description="names or numbers of the tasks to use (default: all)")
    train_per_task: Count | None = Field(None, description="at most so many training instances per task")
    test_per_task: Count | None = Field(None, description="the first so many test instances per task")
    validation_per_task: CountOrZero = Field(0, description="instances to hold out of each task's training data")
    sampling: Literal["proportional", "balanced"] = Field(
        "proportional", description="tasks weigh by their size, or all the same"
    )
    temperature: float = Field(1.0, ge=1, description="T: tasks weigh by their size to the power of 1/T")
    weights: dict[TaskName, Annotated[float, Field(gt=0)]] = Field({}, description="factors on the weights of tasks")
    order: str | list[TaskName] | None = Field(
        None,
        description="trains the tasks one after another: sapt-1, sapt-2, seeded-N or a list of names; null mixes them",
    )
    seed: Seed = Field(0, description="of the subsampling; kept apart from training.seed so that runs share their data")

    def sources(self) -> list[tuple[Source, float]]:
        """Where the tasks are, and the weight of each source."""
        found = []
        for entry in [self.source] if isinstance(self.source, str) else self.source:
            section = SourceSection(path=entry) if isinstance(entry, str) else entry  # pyright: ignore[reportCallIssue]
            own = section.model_dump(exclude={"path", "weight"}, exclude_none=True)
            shared = {name: getattr(self, name) for name in ("format", "task", "instruction", "columns", "turns")}
            found.append((Source(expand_source(section.path), **{**shared, **own}), section.weight))
        return found


class PromptSection(_Section):
    """From an instance to tokens."""

    encoding: PromptEncoding = Field("def", description="'def', or 'def+posN' with N demonstrations")
    max_source_tokens: int = Field(1024, ge=8, le=_MOST)
    max_answer_tokens: Count = 50
    chat_template: ChatTemplate = "auto"


class TrainingSection(_Section):
    """Optimisation: fields of transformers' TrainingArguments, by their own names, and those in ``OWN``.

    Only the fields that badit has its own default for, or checks more strictly, are declared here. Every other field of
    TrainingArguments is accepted and passed on (:func:`build_recipe` checks it).
    """

    #: The fields that are badit's own: arguments of :class:`badit.trainer.AnswerTrainer`.
    OWN: ClassVar[set[str]] = {"group_by_length", "max_skipped_steps", "optimizer", "lora_plus_ratio"}

    model_config = ConfigDict(extra="allow")

    num_train_epochs: float = Field(1.0, gt=0, le=1e6)
    max_steps: int = Field(-1, ge=-1, le=_MOST, description="if positive, the number of steps in place of epochs")
    per_device_train_batch_size: Count = 8
    gradient_accumulation_steps: Count = 1
    optimizer: OptimizerName = Field(
        "adamw", description="lora+: B learns lora_plus_ratio times as fast as A; orthogonal: badit.OrthogonalUpdates"
    )
    lora_plus_ratio: float = Field(16.0, gt=0, description="for optimizer: lora+")
    learning_rate: float = Field(5e-4, gt=0)
    lr_scheduler_type: str = Field("cosine", description="such as cosine, linear, constant or constant_with_warmup")
    warmup_steps: Steps = Field(0.03, description="below 1: a fraction of the run")
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, ge=0, description="0 switches clipping off")
    gradient_checkpointing: bool = False
    group_by_length: bool = Field(True, description="batches of similar length")
    seed: Seed = 0
    full_determinism: bool = Field(False, description="only operations that give the same bits every time, if slower")
    max_skipped_steps: CountOrZero = Field(
        10, description="steps with a loss or gradient that is not finite to skip before the run stops"
    )
    logging_steps: PositiveSteps = Field(10, description="steps between lines of metrics.jsonl")
    save_steps: PositiveSteps = Field(100, description="steps between checkpoints")
    report_to: list[str] = Field(
        [], description="experiment trackers, such as tensorboard, trackio, wandb or mlflow (badit[trackers])"
    )

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_or_several(cls, names: Any) -> Any:
        return ([] if names == "none" else [names]) if isinstance(names, str) else names

    def arguments(self) -> dict[str, Any]:
        """The values for TrainingArguments: all but badit's own."""
        return self.model_dump(exclude=self.OWN)


#: What this section called fields in earlier releases (and transformers in one case), and their names now.
RENAMED_ARGUMENTS = {
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "gradient_accumulation": "gradient_accumulation_steps",
    "scheduler": "lr_scheduler_type",
    "warmup": "warmup_steps",
    "warmup_ratio": "warmup_steps",
    "deterministic": "full_determinism",
    "log_every": "logging_steps",
    "save_every": "save_steps",
}

# Fields of TrainingArguments that are not for a recipe to set (a * stands for the rest of a name), and why.
_SETTLED_ARGUMENTS = {
    "output_dir": "the run's folder is the recipe's output",
    "resume_from_checkpoint": "a run resumes from its own last checkpoint",
    "*eval* do_* prediction_loss_only include_for_metrics load_best_model_at_end metric_for_best_model "
    "greater_is_better": "nothing is scored during training; see the evaluation section",
    "remove_unused_columns label_names": "batches have exactly what the method needs",
    "train_sampling_strategy length_column_name": "set group_by_length",
    "activation_checkpointing": "set gradient_checkpointing",
    "*_checkpointing_kwargs": "badit needs use_reentrant=False and sets it",
    "auto_find_batch_size": "an exact resumption needs a known batch size",
    "save_total_limit save_only_model": "the last two checkpoints are kept, with all that an exact resumption needs",
    "enable_jit_checkpoint": "SIGTERM saves a checkpoint as it is",
    "push_to_hub hub_*": "publish a finished run with badit push",
    "disable_tqdm": "badit has its own progress bar",
    "include_num_input_tokens_seen": "tokens are always counted",
    "local_rank parallelism_config": "the launcher sets it",
}


class EvaluationSection(_Section):
    """Generation and scoring."""

    split: Literal["test", "validation"] = "test"
    batch_size: Count = 16
    max_new_tokens: Count = 50
    unseen_tasks: bool = Field(
        True, description="in a sequence, score the tasks still to come as well, after every task"
    )


class ComparedMethod(_Section):
    """A method section, and what is this method's own in the comparison."""

    model_config = ConfigDict(extra="allow")

    training: dict[str, Any] = Field({}, description="laid over the training section, such as {optimizer: orthogonal}")
    seeds: list[Seed] | None = Field(None, min_length=1, description="in place of compare.seeds")


class CompareSection(_Section):
    """What ``badit compare`` crosses; a single run leaves it out of account."""

    methods: dict[str, ComparedMethod] = Field(description="a name for each method to compare, and its method section")
    reference: str = Field("lora", description="the method that differences are taken to")
    seeds: list[Seed] = Field([0, 1, 2], min_length=1)
    vary_data: bool = Field(
        False, description="add the seed to data.seed, so that the spread over seeds includes the choice of data"
    )
    orders: list[str | list[TaskName]] | None = Field(
        None, min_length=1, description="orders of a sequence of tasks, as in data.order; null mixes the tasks"
    )
    learning_rates: list[float] | None = Field(
        None,
        description="a ladder that every method's rate is searched on, from training.learning_rate, by the loss on "
        "held-out training instances; null trains all with training.learning_rate",
    )
    search: dict[str, Any] | None = Field(
        None, description="recipe values for the search alone, such as {data: {train_per_task: 30}}, to make it cheaper"
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
        content, where = _content(Path(recipe)), Path(recipe)
    return build_recipe(merged(content, values), where=where)


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
    return build_recipe(_content(path), overrides, where=path)


def load_config(path: Path) -> Recipe:
    """The recipe that a run's folder keeps, whose ``training`` section may have the names of an earlier release.

    Raises:
        BaditError: as :func:`load_recipe`.
    """
    content = read_values(path)
    if isinstance(training := content.get("training"), dict):
        content["training"] = {RENAMED_ARGUMENTS.get(key, key): value for key, value in training.items()}
        if content["training"].get("max_steps", 0) is None:  # now -1, as in transformers
            del content["training"]["max_steps"]
    return build_recipe(content, where=path)


def _content(path: Path, extending: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A recipe file's values over those of the recipe that it extends; the files in ``extending`` led to this one."""
    if path in extending:
        raise BaditError(f"{extending[-1]}: extends: {path.name} extends this file already")
    content = read_values(path)
    if "extends" not in content:
        return content
    name = content.pop("extends")
    if not isinstance(name, str) or len(name) > 255 or Path(name).is_absolute() or ".." in Path(name).parts:
        raise BaditError(f"{path}: extends: must be a file in the recipe's folder, such as base.yaml, not {name!r:.60}")
    try:
        base_path = inside(path.parent, path.parent / name)
    except BaditError:
        raise BaditError(f"{path}: extends: {name!r:.60} leads out of the recipe's folder") from None
    base = _content(base_path, (*extending, path))
    build_recipe(base, where=base_path)  # its mistakes are reported as its own
    return merged(base, content)


def merged(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's values with others laid over them, as :func:`load_recipe` says."""
    result = dict(base)
    for key, value in own.items():
        former = base.get(key)
        if isinstance(former, Mapping) and isinstance(value, Mapping):
            renamed = "name" in value and value["name"] != former.get("name")
            value = value if renamed else merged(former, value)
        result[key] = value
    return result


def read_values(path: Path) -> dict[str, Any]:
    """A recipe file's values as they stand there, whatever they are.

    Raises:
        BaditError: the file cannot be read, or it holds no values by name.
    """
    content = parse_yaml(read_text(path), where=path)
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise BaditError(f"{path}: must hold 'key: value' lines, not a {type(content).__name__}")
    return content


def build_recipe(content: Mapping[str, Any], overrides: Sequence[str] = (), *, where: str | Path = "recipe") -> Recipe:
    """A recipe from plain values, with overrides applied; ``where`` opens the error messages."""
    values = _copied(content)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise BaditError(f"{override!r:.80}: an override has the form key=value, such as data.train_per_task=20")
        _set(values, key.split("."), parse_yaml(value, where=override), override)
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise BaditError(f"{where}: {_first_problem(error)}") from None
    _check_arguments(recipe.training, where)
    return recipe


def _check_arguments(training: TrainingSection, where: str | Path) -> None:
    """Checks the fields of TrainingArguments that :class:`TrainingSection` does not declare.

    Only these need transformers, which takes seconds to import.
    """
    given = dict(training.model_extra or {})
    for key in given.keys() & RENAMED_ARGUMENTS.keys():
        raise BaditError(f"{where}: training.{key}: is called {RENAMED_ARGUMENTS[key]}, as transformers has it")
    if training.optimizer == "orthogonal" and "optim" in given:
        raise BaditError(f"{where}: training.optim: does not go with optimizer: orthogonal; leave one of them out")
    if training.lr_scheduler_type not in ("cosine", "linear", "constant", "constant_with_warmup"):
        given["lr_scheduler_type"] = training.lr_scheduler_type
    if not given and not training.report_to:
        return
    from transformers import TrainingArguments
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    for name in training.report_to:
        if name not in INTEGRATION_TO_CALLBACK and name != "all":
            hint = nearest(name, INTEGRATION_TO_CALLBACK)
            raise BaditError(f"{where}: training.report_to: unknown tracker {name!r:.60}{hint}")

    types = get_type_hints(TrainingArguments)
    known = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    for key, value in given.items():
        if key not in known:
            close = get_close_matches(key, [*known, *TrainingSection.model_fields, *RENAMED_ARGUMENTS], n=1)
            hint = f" (did you mean '{RENAMED_ARGUMENTS.get(close[0], close[0])}'?)" if close else ""
            raise BaditError(f"{where}: training.{key:.120}: unknown key{hint}")
        for names, reason in _SETTLED_ARGUMENTS.items():
            if any(fnmatchcase(key, name) for name in names.split()):
                raise BaditError(f"{where}: training.{key}: is not for a recipe to set: {reason}")
        try:
            TypeAdapter(_plain(types[key])).validate_python(value, strict=True)
        except ValidationError as error:
            raise BaditError(f"{where}: training.{key}: {_first_problem(error)}") from None


def _plain(type_: Any) -> Any:
    """A field's type in plain values: an enumeration's values in place of the enumeration and of any other text."""
    parts = get_args(type_) or (type_,)
    for part in parts:
        if isinstance(part, type) and issubclass(part, Enum):
            return Literal[tuple(member.value for member in part)]
    return type_


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
    """The first problem as ``dotted.key: what is wrong``, with the value."""
    location, message = first_problem(error)
    problem = error.errors(include_url=False)[0]
    dotted = f"{'.'.join(map(str, location)):.120}: " if location else ""
    if problem["type"] == "extra_forbidden":
        return f"{dotted}unknown key{nearest(str(location[-1]), _known_keys(list(map(str, location[:-1]))))}"
    given = repr(problem["input"])
    return f"{dotted}{message}, got {given if len(given) < 60 else given[:57] + '...'}"


def _known_keys(location: Sequence[str]) -> list[str]:
    section: type[BaseModel] = Recipe
    for part in location:
        annotation = section.model_fields[part].annotation
        candidates = [annotation, *get_args(annotation)]
        section = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(section.model_fields)

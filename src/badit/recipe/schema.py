"""The sections of a recipe: typed, validated fields that define a run or a comparison."""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    WithJsonSchema,
    field_validator,
)

from badit.data.encoding import LINE_BREAK, ChatTemplate
from badit.data.prompts import PromptEncoding
from badit.data.sampling import hold_out, limit, quotas
from badit.data.source import Format, Source, Turns
from badit.data.tasks import Split as DataSplit
from badit.data.tasks import Task
from badit.models import Quantisation
from badit.presets import method_name
from badit.recipe.arguments import LARGEST, Count, CountOrZero, Section, TrainingSection
from badit.support.errors import BaditError

Column = Literal["task", "instruction", "input", "output", "rejected", "id", "split", "messages"]
Dtype = Literal["fast", "auto", "float32", "bfloat16", "float16"]
Split = Literal["test", "validation"]

_NOT_IN_PATHS = re.compile("[\0\ud800-\udfff]")  # NUL and lone surrogates


def _path_text(path: Any) -> Any:
    """Returns a path as text; pydantic refuses values of other types afterwards."""
    # Values from Python may be paths.
    if isinstance(path, os.PathLike):
        path = os.fspath(path)
    is_valid = not isinstance(path, str) or (path.strip() and not _NOT_IN_PATHS.search(path))
    if not is_valid:
        raise ValueError("must be a name or a path, not blank, in UTF-8 and without NUL characters")
    return path


PathText = Annotated[str, BeforeValidator(_path_text)]
# YAML reads a task's number, such as 363, as an integer.
TaskName = Annotated[
    str,
    Field(coerce_numbers_to_str=True),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "integer"}]}),
]


class ModelSection(Section):
    """The base model."""

    name: PathText = Field(
        "smollm2-135m", description="built-in name, local folder or hub id (org/name)"
    )
    dtype: Dtype = Field(
        "fast",
        description="of the base weights; fast: bfloat16, or float32 on CPUs where it is slow; "
        "auto: as saved",
    )
    quantisation: Quantisation | None = Field(
        None, description="of the base weights (needs badit[quantised])"
    )
    revision: str | None = Field(None, description="branch, tag or commit of a hub model")
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")


class SourceSection(Section):
    """One of several sources of tasks; omitted fields have the values of the data section."""

    path: PathText
    format: Format | None = None
    task: TaskName | None = None
    instruction: str | None = None
    columns: dict[Column, str] | None = None
    splits: dict[str, DataSplit] | None = None
    turns: Turns | None = None
    weight: float = Field(
        1.0, gt=0, le=1e6, description="weight of the tasks of this source in the mixture"
    )


class DataSection(Section):
    """The tasks."""

    source: PathText | list[PathText | SourceSection] | None = Field(
        "builtin",
        description="'builtin', file, folder, glob, hub dataset, or list of these; $VARIABLES are "
        "expanded; null: none, as of an adapter that was adopted without data",
    )
    format: Format = Field("auto", description="layout of a folder; auto detects it")
    task: TaskName | None = Field(
        None, description="task of all rows (default: the row's own, or the file's name)"
    )
    instruction: str | None = Field(
        None, description="instruction of rows without one (default: none)"
    )
    columns: dict[Column, str] = Field(
        {}, description="column of each field, such as {input: text, output: label}"
    )
    splits: dict[str, DataSplit] = Field(
        {}, description="splits to read, such as {train_sft: train, test_sft: test}"
    )
    turns: Turns = Field("last", description="answers of a chat to train on")
    tasks: list[TaskName] | None = Field(
        None, description="names or numbers of the tasks to use (default: all)"
    )
    train_per_task: Count | None = Field(
        None, description="largest number of training instances per task"
    )
    test_per_task: Count | None = Field(
        None, description="number of test instances per task (the first ones)"
    )
    validation_per_task: CountOrZero = Field(
        0, description="instances to hold out of each task's training data"
    )
    sampling: Literal["proportional", "balanced"] = Field(
        "proportional", description="task weights: by size, or equal"
    )
    temperature: float = Field(
        1.0, ge=1, description="T: weights are sizes to the power of 1/T (proportional only)"
    )
    weights: dict[TaskName, Annotated[float, Field(gt=0, le=1e6)]] = Field(
        {}, description="factors on tasks' weights"
    )
    order: str | list[TaskName] | None = Field(
        None,
        description="train tasks one after another: sapt-1, sapt-2, seeded-N or a list of names; "
        "null: mix them",
    )
    seed: CountOrZero = Field(
        0, description="for choosing instances; not training.seed, so runs can share data"
    )

    @property
    def entries(self) -> list[dict[str, Any]]:
        """The values of each source as they are in the recipe; ``path`` is among them."""
        sources = self.source
        if sources is None:
            return []
        if isinstance(sources, str):
            sources = [sources]
        values = []
        for source in sources:
            if isinstance(source, str):
                values.append({"path": source})
            else:
                values.append(source.model_dump(exclude_none=True))
        return values

    def sources(self) -> list[Source]:
        """Returns the sources, with the defaults of this section and expanded paths."""
        if self.source is None:
            fix = "adopt the adapter again with its data: badit adopt ADAPTER --data FILE -o FOLDER"
            raise BaditError(f"data.source: is null, so there are no tasks; {fix}")
        shared = self.model_dump(
            include={"format", "task", "instruction", "columns", "splits", "turns"}
        )
        sources = []
        for entry in self.entries:
            path = expand_source(entry["path"])
            sources.append(Source(**{**shared, **entry, "path": path}))
        return sources

    def load(self) -> list[Task]:
        """Returns the tasks with all their instances; BaditError if they are invalid."""
        from badit.data import load_sources

        tasks = load_sources(self.sources(), self.tasks, self.weights)
        # Before the limit, so that the held-out instances do not depend on train_per_task.
        tasks = hold_out(tasks, self.validation_per_task, self.seed)
        if self.order is not None and self.quotas(tasks):
            raise BaditError(
                "data.order: a sequence is not a mixture; remove sampling, temperature and weights"
            )
        return limit(tasks, self.train_per_task, self.test_per_task, self.seed)

    def quotas(self, tasks: Sequence[Task]) -> dict[str, int] | None:
        """Returns the number of training instances per task in an epoch.

        None if each instance is used once.
        """
        return quotas(tasks, balanced=self.sampling == "balanced", temperature=self.temperature)


def _given_text(value: Any) -> Any:
    # `prompt.separator=` on a command line is YAML's null.
    return "" if value is None else value


class PromptSection(Section):
    """Prompts and tokenisation."""

    encoding: PromptEncoding = Field(
        "def", description="'def', or 'def+posN' with N demonstrations"
    )
    max_source_tokens: int = Field(
        1024, ge=8, le=LARGEST, description="longer prompts are truncated"
    )
    max_answer_tokens: Count = Field(
        50, description="longer answers are truncated, in training and for the NLL"
    )
    chat_template: ChatTemplate = Field(
        "auto", description="use the model's chat template; auto: if it has one"
    )
    separator: Annotated[str, BeforeValidator(_given_text)] = Field(
        LINE_BREAK,
        max_length=100,
        description="without a template, follows a whole prompt that does not end with white space",
    )

    @property
    def of_prompts(self) -> dict[str, Any]:
        """The options of :func:`badit.data.encode_prompts`."""
        return self.model_dump(include={"max_source_tokens", "chat_template", "separator"})


class EvaluationSection(Section):
    """Generation and scoring."""

    split: Split = Field("test", description="the instances to score")
    batch_size: Count = Field(16, description="number of prompts that are answered at a time")
    max_new_tokens: Count = Field(50, description="longest generated answer")
    unseen_tasks: bool = Field(
        True, description="in a sequence, also score tasks that are not trained yet"
    )
    untuned: CountOrZero = Field(
        4,
        le=LARGEST,
        description="after badit train, also score the untuned model on the first instances of each"
        " task; 0: no instance",
    )


class ExtendSection(Section):
    """Tasks that are added later: to a trained run, or in a sequence."""

    run: PathText | None = Field(
        None, description="the finished run that the tasks are added to; badit extend sets it"
    )
    earlier: PathText | None = Field(
        None, description="test data of the run's tasks, to score them after the training too"
    )
    own_experts: bool = Field(
        True,
        description="in a sequence, BADIT gives every later task its own expert and clusters, and "
        "freezes the rest; false: it trains the same experts further",
    )
    rank: Count = Field(32, description="rank of a task's expert")
    clusters: Count = Field(2, description="clusters of prompts of a task")
    reused: CountOrZero = Field(
        0, description="earlier experts that a task may use, with trained gates"
    )
    start: float | None = Field(
        None,
        ge=0,
        le=2,
        description="start of these gates, relative to those that the task's prompts had before; "
        "null: that of 0, 0.5 and 1 with the lowest loss",
    )
    mixing: float | None = Field(
        None,
        ge=0,
        allow_inf_nan=False,
        description="temperature with which a prompt mixes the experts of the two nearest tasks, "
        "such as 0.01 for prompts without instructions; 0: only the nearest task; null: as in the "
        "earlier run",
    )
    coverage: float = Field(
        0.95,
        ge=-1,
        le=1,
        description="a task is covered if 80 % of its prompts have a larger cosine to an existing "
        "centroid",
    )
    largest_taken: float = Field(
        0.05,
        ge=0,
        le=1,
        description="largest share of an earlier task's prompts that may come nearer to a new task",
    )
    merge: bool = Field(
        False, description="train the existing clusters that cover the tasks; changes their tasks"
    )


class ComparedMethod(Section, extra="allow"):
    """A method section, with optional seeds and training values for this method."""

    training: dict[str, Any] = Field(
        {}, description="override the training section, such as {optimizer: orthogonal}"
    )
    seeds: list[CountOrZero] | None = Field(
        None, min_length=1, description="override compare.seeds"
    )


class CompareSection(Section):
    """The grid of ``badit compare``; a single run ignores it."""

    methods: dict[str, ComparedMethod] = Field(
        description="the methods to compare: a name and a method section each"
    )
    reference: str = Field(
        "lora", description="the baseline: differences are relative to this method"
    )
    seeds: list[CountOrZero] = Field(
        [0, 1, 2], min_length=1, description="each method is trained with each of them"
    )
    vary_data: bool = Field(
        False, description="add the seed to data.seed, so the spread includes the choice of data"
    )
    orders: list[str | list[TaskName]] | None = Field(
        None, min_length=1, description="each as data.order; null: mixed"
    )
    learning_rates: list[float] | None = Field(
        None,
        description="ascending rates to search for each method, starting at training.learning_rate,"
        " by the loss on held-out training instances; null: all methods use training.learning_rate",
    )
    search: dict[str, Any] | None = Field(
        None,
        description="recipe values for the search only, to make it cheaper, such as {data: "
        "{train_per_task: 30}}",
    )
    budget: str | None = Field(
        None, description="the method whose trainable-parameter count the others must match"
    )
    unmatched: list[str] = Field([], description="methods that need not match the budget")
    resources: dict[str, Annotated[float, Field(gt=0)]] = Field(
        {},
        description="of each run with --ray, such as {gpu: 1}: cpu (default: 1), gpu, or one "
        "of the cluster's own",
    )
    single_task: list[str] = Field(
        [], description="methods that are also trained on each task alone"
    )

    @field_validator("learning_rates")
    @classmethod
    def _ascending(cls, rates: list[float] | None) -> list[float] | None:
        if rates is None:
            return None
        is_ascending = bool(rates) and sorted(set(rates)) == rates
        if not is_ascending or rates[0] <= 0:
            raise ValueError("must be positive and ascending, such as [2.5e-4, 5e-4, 1e-3]")
        return rates


class Recipe(Section):
    """The configuration of a run or a comparison."""

    model: ModelSection = ModelSection()  # pyright: ignore[reportCallIssue]
    data: DataSection = DataSection()  # pyright: ignore[reportCallIssue]
    prompt: PromptSection = PromptSection()  # pyright: ignore[reportCallIssue]
    # Not a section: resolve_method checks the options, which needs torch and PEFT.
    method: dict[str, Any] = Field(
        default={"name": "badit"},
        description="the method's name (see badit keys method.name) and its options",
    )
    training: TrainingSection = TrainingSection()  # pyright: ignore[reportCallIssue]
    evaluation: EvaluationSection = EvaluationSection()  # pyright: ignore[reportCallIssue]
    extend: ExtendSection = ExtendSection()  # pyright: ignore[reportCallIssue]
    compare: CompareSection | None = None
    output: Annotated[PathText, AfterValidator(os.path.expanduser)] = Field(
        "runs/badit", description="folder of the run, or of a comparison's runs"
    )

    def __repr__(self) -> str:
        summary = f"{method_name(self.method)} on {self.model.name}"
        return f"Recipe({summary}, data {self.data.source!r}, output {self.output!r})"


#: A file, plain values, or a Recipe.
RecipeLike = str | os.PathLike[str] | Mapping[str, Any] | Recipe


_VARIABLE = re.compile(r"\$(?:\$|(\w+)|\{([^}]*)\})")


def expand_source(source: str) -> str:
    """Returns ``data.source`` with $VARIABLES and ~ expanded, and $$ as a dollar sign.

    BaditError if a variable is not set.
    """

    def expanded(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name is None:
            return "$"
        if name not in os.environ:
            fix = "set it, or use data.source=PATH, with $$ for a dollar sign"
            raise BaditError(f"data.source: the environment variable {name} is not set; {fix}")
        return os.environ[name]

    path = _VARIABLE.sub(expanded, source)
    if not path.strip():
        raise BaditError(
            f"data.source: {source} is empty; set the variable, or use data.source=PATH"
        )
    return os.path.expanduser(path)


def source_of(path: str) -> str:
    """Returns the ``data.source`` of a path, in which a dollar sign is part of an existing name."""
    return path.replace("$", "$$") if os.path.exists(path) else path


def section_of(annotation: Any) -> type[BaseModel] | None:
    """Returns the section class in a field's type, also within a union or a list, or None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(section_of, get_args(annotation))), None)

"""Recipes: YAML files with typed, validated fields that define a run.

Only plain YAML is read: tags create no Python objects, duplicate keys are refused, and alias expansion is limited.
"""

import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    ValidationError,
    WithJsonSchema,
    field_validator,
)

from badit.data.prompts import ChatTemplate, PromptEncoding
from badit.data.rows import SUFFIXES, Format, Source, Turns
from badit.data.tasks import Split as DataSplit
from badit.data.tasks import Task, hold_out, limit, quotas
from badit.models import Quantisation
from badit.recipe.arguments import (
    LARGEST,
    RENAMED_ARGUMENTS,
    Count,
    CountOrZero,
    Section,
    TrainingSection,
    package_folder,
)
from badit.support.errors import BaditError, first_line, nearest, problems
from badit.support.files import inside, read_text, refuse_other_format

# The version of a run's config.yaml. Version 1 has no ``format`` key; _of_run has the earlier versions' defaults.
FORMAT = 4
# A recipe has a few hundred values. With nested aliases, a few lines of YAML can expand to billions of values.
MAX_VALUES = 100_000
MAX_CHARACTERS = 200_000  # YAML is read at about 50,000 characters per second
MAX_DIGITS = 100

Column = Literal["task", "instruction", "input", "output", "id", "split", "messages"]
Dtype = Literal["fast", "auto", "float32", "bfloat16", "float16"]
Split = Literal["test", "validation"]


def _path_text(path: Any) -> Any:
    text = os.fspath(path) if isinstance(path, os.PathLike) else path
    if isinstance(text, str) and (not text.strip() or re.search("[\0\ud800-\udfff]", text)):
        raise ValueError("must be a name or a path, not blank, in UTF-8 and without NUL characters")
    return text


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
        description="of the base weights; fast: bfloat16, or float32 on CPUs where it is slow; auto: as saved",
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

    source: PathText | list[PathText | SourceSection] = Field(
        "builtin",
        description="'builtin', file, folder, glob, hub dataset, or list of these; $VARIABLES are expanded",
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
        description="train tasks one after another: sapt-1, sapt-2, seeded-N or a list of names; null: mix them",
    )
    seed: CountOrZero = Field(
        0, description="for choosing instances; not training.seed, so runs can share data"
    )

    @property
    def entries(self) -> list[dict[str, Any]]:
        """The values of each source as they are in the recipe; ``path`` is among them."""
        listed = [self.source] if isinstance(self.source, str) else self.source
        return [
            {"path": one} if isinstance(one, str) else one.model_dump(exclude_none=True)
            for one in listed
        ]

    def sources(self) -> list[Source]:
        """Returns the sources, with the defaults of this section and expanded paths."""
        shared = self.model_dump(
            include={"format", "task", "instruction", "columns", "splits", "turns"}
        )
        return [
            Source(**{**shared, **own, "path": expand_source(own["path"])}) for own in self.entries
        ]

    def load(self) -> list[Task]:
        """Returns the tasks with their training, validation and test instances; BaditError if they are invalid."""
        from badit.data import load_sources

        tasks = load_sources(self.sources(), self.tasks, self.weights)
        tasks = hold_out(tasks, self.validation_per_task, self.seed)
        if self.order is not None and self.quotas(tasks):
            raise BaditError(
                "data.order: a sequence is not a mixture; remove sampling, temperature and weights"
            )
        return limit(tasks, self.train_per_task, self.test_per_task, self.seed)

    def quotas(self, tasks: Sequence[Task]) -> dict[str, int] | None:
        """Returns the number of training instances per task in an epoch, or None if each is used once."""
        return quotas(tasks, balanced=self.sampling == "balanced", temperature=self.temperature)


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


class EvaluationSection(Section):
    """Generation and scoring."""

    split: Split = Field("test", description="the instances to score")
    batch_size: Count = Field(16, description="number of prompts that are answered at a time")
    max_new_tokens: Count = Field(50, description="longest generated answer")
    unseen_tasks: bool = Field(
        True, description="in a sequence, also score tasks that are not trained yet"
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
        description="ascending rates to search for each method, starting at training.learning_rate, by the loss on "
        "held-out training instances; null: all methods use training.learning_rate",
    )
    search: dict[str, Any] | None = Field(
        None,
        description="recipe values for the search only, to make it cheaper, such as {data: {train_per_task: 30}}",
    )
    budget: str | None = Field(
        None, description="the method whose trainable-parameter count the others must match"
    )
    unmatched: list[str] = Field([], description="methods that need not match the budget")
    single_task: list[str] = Field(
        [], description="methods that are also trained on each task alone"
    )

    @field_validator("learning_rates")
    @classmethod
    def _ascending(cls, rates: list[float] | None) -> list[float] | None:
        if rates is not None and (not rates or sorted(set(rates)) != rates or rates[0] <= 0):
            raise ValueError("must be positive and ascending, such as [2.5e-4, 5e-4, 1e-3]")
        return rates


class Recipe(Section):
    """The configuration of a run or a comparison."""

    model: ModelSection = ModelSection()  # pyright: ignore[reportCallIssue]
    data: DataSection = DataSection()  # pyright: ignore[reportCallIssue]
    prompt: PromptSection = PromptSection()  # pyright: ignore[reportCallIssue]
    method: dict[str, Any] = Field(
        default={"name": "badit"},
        description="the method's name (see badit keys method.name) and its options",
    )
    training: TrainingSection = TrainingSection()  # pyright: ignore[reportCallIssue]
    evaluation: EvaluationSection = EvaluationSection()  # pyright: ignore[reportCallIssue]
    compare: CompareSection | None = None
    output: Annotated[PathText, AfterValidator(os.path.expanduser)] = Field(
        "runs/badit", description="folder of the run, or of a comparison's runs"
    )

    def __repr__(self) -> str:
        about = f"{self.method.get('name', 'badit')} on {self.model.name}"
        return f"Recipe({about}, data {self.data.source!r}, output {self.output!r})"


#: A file, plain values, or a Recipe.
RecipeLike = str | os.PathLike[str] | Mapping[str, Any] | Recipe


def make_recipe(recipe: RecipeLike | None, values: Mapping[str, Any]) -> Recipe:
    """Builds a recipe from a file, plain values or a Recipe (None: the defaults); ``values`` override its own."""
    if isinstance(recipe, str | os.PathLike):
        path = _or_shipped(Path(recipe))
        return build_recipe(merged(_content(path), values), where=path)
    given = recipe.model_dump(exclude_unset=True) if isinstance(recipe, Recipe) else recipe or {}
    return build_recipe(merged(given, values))


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe file and applies ``key=value`` overrides.

    If there is no such file, reads the recipe of this name that comes with badit, such as superni-cpu. A top-level
    ``extends`` names another recipe in the file's folder or below it, or one that comes with badit. The file's values
    override those of that recipe, key by key within sections. A section with another ``name`` (of a method or a model)
    replaces the whole section, because the options of one method do not apply to another.

    Raises:
        BaditError: if a file cannot be read or extended, a key is unknown, or a value is invalid.
    """
    path = _or_shipped(Path(path))
    return build_recipe(_content(path), overrides, where=path)


def shipped_recipes() -> dict[str, Path]:
    """Returns the recipes that come with badit, by name; in a checkout they are next to the source."""
    package = Path(__file__).parents[1]
    folder = next(
        (one for one in (package / "recipes", package.parents[1] / "recipes") if one.is_dir()),
        package,
    )
    return {
        file.relative_to(folder).with_suffix("").as_posix(): file
        for file in sorted(folder.glob("**/*.yaml"))
    }


def _or_shipped(path: Path, name: str = "") -> Path:
    """Returns the path or, if there is no such file, that of the recipe of this name that comes with badit."""
    name, shipped = name or str(path), shipped_recipes()
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return path
    if name not in shipped:
        raise BaditError(
            f"{name}: no such file, and no recipe of this name comes with badit{nearest(name, shipped)}"
        )
    return shipped[name]


def load_config(path: Path) -> Recipe:
    """Reads the recipe in a run's folder, which may have the field names and defaults of an earlier release."""
    return build_recipe(_of_run(read_values(path), path), where=path)


def _of_run(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """Returns the values of a run's config.yaml, with the current names and the defaults of its release."""
    version, method = content.pop("format", None), content.get("method")
    if version not in (None, 2, 3):
        refuse_other_format({"format": version}, path, FORMAT)
    elif (
        isinstance(method, dict)
        and method.get("name", "badit") == "badit"
        and method.get("preset") != "paper"
    ):
        first = {"init_weights": "bad", "router_input": "mean", "regroup": {}}
        content["method"] = method = {
            **({"init_weights": "directions"} if version else first),
            **method,
        }
        kept = {
            "router_input": "mean",
            "init_weights": "bad",
            "routing": "token",
            "num_experts": 1,
        }.items()
        if version != 3 and not (
            kept & method.items() or method.get("top_k") or method.get("target_parameters")
        ):
            method.setdefault("gates", "mean_one")
    if isinstance(training := content.get("training"), dict):
        known = training.keys() - {
            "group_by_length",
            "dataloader_drop_last",
        }  # options of earlier releases
        content["training"] = {
            RENAMED_ARGUMENTS.get(key, key): training[key] for key in training if key in known
        }
        if content["training"].get("max_steps", 0) is None:  # now -1, as in transformers
            del content["training"]["max_steps"]
    return content


def _content(path: Path, extending: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Returns a file's values merged over the recipe that it extends; ``extending``: files that extend this one."""
    place = Path(os.path.realpath(path))  # Path.resolve raises for a symlink loop
    if place in extending:
        raise BaditError(
            f"{extending[-1]}: extends: {path.name} already extends this file; remove one of the two"
        )
    content = read_values(path)
    in_run = path.name == "config.yaml" and path.with_name("environment.json").is_file()
    content = (
        _of_run(content, path) if in_run or isinstance(content.get("format"), int) else content
    )
    if "extends" not in content:
        return content
    name = content.pop("extends")
    try:
        base_path = inside(path.parent, path.parent / name)
        base_path.exists()
    except (
        BaditError,
        OSError,
        TypeError,
    ):  # OSError: the name is too long; TypeError: it is not a string
        fix = "must be a file in the recipe's folder, such as base.yaml"
        raise BaditError(f"{path}: extends: {fix}, not {name!r:.60}") from None
    base_path = _or_shipped(base_path, name)
    base = _content(base_path, (*extending, place))
    build_recipe(base, where=base_path)  # its errors name its own file
    return merged(base, content)


def merged(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a recipe's values with ``own`` overriding them, as :func:`load_recipe` describes."""
    result = dict(base)
    for key, value in own.items():
        if isinstance(value, Mapping):  # also copied if there is nothing to merge
            former: Any = base.get(key)
            kept = isinstance(former, Mapping) and value.get(
                "name", former.get("name")
            ) == former.get("name")
            value = merged(former if kept else {}, value)
        result[key] = value
    return result


def read_values(path: Path) -> dict[str, Any]:
    """Returns a recipe file's values without validation."""
    fix = "for a data file, write a recipe with badit init"
    if path.suffix in SUFFIXES[1:]:  # JSON is valid YAML
        raise BaditError(f"{path}: is not a recipe (.yaml); {fix}")
    content = parse_yaml(read_text(path), where=path)
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise BaditError(
            f"{path}: must contain 'key: value' lines, not a {type(content).__name__}; {fix}"
        )
    return content


def build_recipe(
    content: Mapping[str, Any], overrides: Sequence[str] = (), *, where: str | Path = "recipe"
) -> Recipe:
    """Builds a recipe from plain values and overrides; every line of an error message starts with ``where``."""
    values = merged({}, content)
    for override in sorted(
        overrides, key=lambda one: not one.startswith(("method=", "method.name="))
    ):
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise BaditError(
                f"{override!r:.80}: an override has the form key=value, such as data.train_per_task=20"
            )
        *parents, last = key.split(".")
        section: Any = values
        for part in parents:
            if section.get(part) is None:
                section[part] = {}
            section = section[part]
            if not isinstance(section, dict):
                raise BaditError(f"{override!r:.80}: {part} is a single value and has no keys")
        if key == "method.name" and section.get("name", "badit") != value:
            section.clear()  # the options of one method do not apply to another
        section[last] = _value(value, override)
    found = list(_unknown_keys(values))
    try:
        recipe = Recipe.model_validate(values)
        found = found or list(recipe.training.value_problems())
        if not found:
            return recipe
    except ValidationError as error:
        found += [f"{place}: {problem}" for place, problem in problems(error, values, _known_keys)]
    raise BaditError(*(f"{where}: {problem}" for problem in found))


def _value(text: str, override: str) -> Any:
    """Returns an override's value: YAML in quotes, brackets or braces; a number, true, false or null; other text."""
    text = text.strip()
    if text.startswith(("[", "{", "'", '"')):
        return parse_yaml(text, where=override)
    try:
        value = parse_yaml(text, where=override)
    except BaditError:
        return text
    return value if value is None or isinstance(value, int | float) else text


def _unknown_keys(values: Mapping[str, Any]) -> Iterator[str]:
    """Yields problems with the keys of the training and method sections, without importing transformers or methods."""
    if isinstance(training := values.get("training"), Mapping):
        yield from TrainingSection.key_problems(training)
    if "badit.training.methods" in sys.modules:  # then build_method reports them without delay
        return
    sections: list[tuple[str, Any]] = [("method", values.get("method"))]
    if isinstance(compare := values.get("compare"), Mapping) and isinstance(
        compare.get("methods"), Mapping
    ):
        sections += [
            (f"compare.methods.{name}", section) for name, section in compare["methods"].items()
        ]
    options, names = _method_words()
    for place, section in sections:
        for key, value in section.items() if isinstance(section, Mapping) else ():
            if key not in options:
                yield f"{place}.{key!s:.120}: unknown key{nearest(key, options)}"
            elif key == "name" and str(value) not in names:
                yield f"{place}.name: unknown method {value!r:.60}{nearest(value, names)}"
            elif key == "regroup":
                sections.append((f"{place}.regroup", value))


@cache
def _method_words() -> tuple[set[str], set[str]]:
    """Returns supersets of all option names and of all method names, read from the source."""
    own, peft = Path(__file__).parents[1], package_folder("peft")
    files = [
        own / name
        for name in (
            "training/methods.py",
            "training/regrouping.py",
            "training/surgery.py",
            "tuner/config.py",
        )
    ]
    files += [*own.glob("baselines/*.py"), peft / "tuners/lora/config.py"]
    text = "\n".join(map(read_text, files))
    options = {"name", "regroup", "preset", "base_weight", *ComparedMethod.model_fields}
    return options | set(re.findall(r"^    (\w+): ", text, re.M)), set(
        re.findall(r'"([a-z][\w-]*)"', text)
    )


def expand_source(source: str) -> str:
    """Returns ``data.source`` with $VARIABLES and ~ expanded; BaditError if a variable is not set."""
    expanded = os.path.expandvars(source)
    if missing := re.search(r"\$\{?(\w+)", expanded):
        problem = (
            f"the environment variable {missing[1]} is not set; set it, or use data.source=PATH"
        )
        raise BaditError(f"data.source: {problem}")
    if not expanded.strip():
        raise BaditError(
            f"data.source: {source} is empty; set the variable, or use data.source=PATH"
        )
    return os.path.expanduser(expanded)


def dump_recipe(recipe: Recipe) -> str:
    """Returns a run's recipe as YAML with every field."""
    values = {"format": FORMAT, **recipe.model_dump(mode="json", exclude={"compare"})}
    return to_yaml(values, sort_keys=False)


def differing_keys(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Returns the dotted keys in which two nested mappings differ."""
    keys = []
    for key in one.keys() | other.keys():
        a, b = one.get(key), other.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            keys += differing_keys(a, b, f"{prefix}{key}.")
        elif a != b or (key in one) != (key in other):
            keys.append(f"{prefix}{key}")
    return sorted(keys)


def _known_keys(location: Sequence[int | str]) -> list[str]:
    """Returns the keys of the section at a location in the recipe."""
    section: Any = Recipe
    for part in location:
        if (
            field := section.model_fields.get(str(part))
        ) is not None:  # else an index, or the alternative of a union
            section = section_of(field.annotation)
    return list(section.model_fields)


def section_of(annotation: Any) -> type[BaseModel] | None:
    """Returns the section class in a field's type, also within a union or a list, or None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(section_of, get_args(annotation))), None)


def parse_yaml(text: str, *, where: str | Path) -> Any:
    """Returns the value of a YAML text; error messages start with ``where``."""
    if len(text) > MAX_CHARACTERS:
        raise BaditError(f"{where!s:.120}: has more than {MAX_CHARACTERS:,} characters; shorten it")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, MAX_VALUES)
        return loader.construct_document(node)
    except (
        yaml.YAMLError,
        RecursionError,
        ValueError,
        OverflowError,
        TypeError,
        AttributeError,
    ) as error:
        # Besides PyYAML's own errors: exceptions that its constructors raise for invalid dates and numbers.
        mark, problem = (
            getattr(error, "problem_mark", None),
            getattr(error, "problem", None) or first_line(error),
        )
    place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    raise BaditError(f"{where!s:.120}{place}: cannot be read as YAML ({problem:.200})")


class _Loader(yaml.SafeLoader):
    """YAML 1.1, except that 5e-4 is a number, and 073 (a task number) is a string, not the octal number 59."""


class _Dumper(yaml.SafeDumper):
    """Quotes strings that :class:`_Loader` would read as numbers, such as 1234e56 (a revision)."""


def _whole_number(loader: _Loader, node: yaml.ScalarNode) -> int | str:
    if len(node.value) > MAX_DIGITS:
        raise _refused(node, f"a number of more than {MAX_DIGITS} digits; shorten it")
    return (
        node.value if re.fullmatch(r"[+-]?0[\d_]+", node.value) else loader.construct_yaml_int(node)
    )


_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)
for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+$"),
        list("+-0123456789"),
    )
to_yaml = partial(yaml.dump, Dumper=_Dumper, allow_unicode=True)  # parse_yaml reads the same values


def _refused(node: yaml.Node, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def _count(node: yaml.Node, left: int) -> int:
    """Returns ``left`` minus the number of values in a node with all aliases expanded; refuses duplicate keys."""
    if left <= 0:
        raise _refused(
            node, f"more than {MAX_VALUES:,} values, with all aliases expanded; remove some"
        )
    if isinstance(node, yaml.ScalarNode):
        node.value.encode()  # raises for a lone surrogate, which UTF-8 cannot encode
        return left - 1
    seen: set[tuple[str, str]] = set()
    for part in node.value:
        inner = (
            part if isinstance(part, tuple) else (part,)
        )  # a key and its value, or an item of a list
        if len(inner) == 2 and isinstance(key := inner[0], yaml.ScalarNode):
            if (key.tag, key.value) in seen:
                raise _refused(key, f"the key {key.value!r:.60} is there twice; keep one")
            seen.add((key.tag, key.value))
        for each in inner:
            left = _count(each, left)
    return left - 1

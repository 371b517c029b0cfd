"""``badit init``: writes a first recipe, with comments, for given data."""

import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, StrictUndefined

from badit.authoring.keys import as_yaml
from badit.data import Source, Task, hold_out, limit, load_sources
from badit.data.columns import unused_columns
from badit.recipe.loading import build_recipe
from badit.recipe.schema import source_of
from badit.recipe.yaml_text import parse_yaml
from badit.runs.folder import RunFolder
from badit.runs.unresolved import UnresolvedRun
from badit.support.console import one_line, status
from badit.support.errors import BaditError
from badit.support.files import read_text
from badit.support.text import counted

_HELD_OUT = 10  # validation instances of each task, if all tasks have enough training data
_NAMED_COLUMNS = 10


class FirstRecipe(NamedTuple):
    """The text of a recipe, and lines that say what was found in the data."""

    text: str
    found: list[str]


def first_recipe(source: str, path: str, overrides: Sequence[str] = ()) -> FirstRecipe:
    """Returns a commented recipe for the file ``path``.

    ``source`` is a path or another ``data.source``; ``overrides`` are keys of the data section that
    are needed to read it, such as ``data.columns.input=text``. BaditError if the data cannot be
    trained and scored.
    """
    for override in overrides:
        if not override.startswith("data.") or override.startswith("data.source"):
            problem = "only other data keys can be set here, such as data.columns.input=text"
            raise BaditError(f"{override!r:.60}: {problem}")
    source = source_of(source)
    data = build_recipe({"data": {"source": source}}, overrides).data
    with status("reading the tasks"):
        tasks = load_sources(data.sources(), data.tasks, data.weights)
    held_out = data.validation_per_task or _held_out(tasks)
    used = hold_out(tasks, held_out, data.seed)
    used = limit(used, data.train_per_task, data.test_per_task, data.seed)
    # If some tasks have no training data, the others need no test data.
    all_are_trained = all(task.train for task in tasks)
    all_are_tested = all(task.test for task in tasks)
    split = "test" if all_are_tested or not all_are_trained else "validation"
    # The template has lines for these.
    excluded = {"source", "validation_per_task"}

    # Strict: a name that the template misspells is an error, not an empty text.
    templates = Environment(keep_trailing_newline=True, trim_blocks=True, undefined=StrictUndefined)
    templates.filters |= {"yaml": as_yaml, "counted": counted, "shell": shlex.quote}
    template = templates.from_string(read_text(Path(__file__).with_name("recipe.yaml.j2")))
    text = template.render(
        path=path,
        stem=Path(path).stem,
        source=source,
        given=data.model_dump(mode="json", exclude_defaults=True, exclude=excluded),
        tasks=tasks,
        train=sum(len(task.train) for task in used),
        test=sum(len(getattr(task, split)) for task in used),
        split=split,
        tokens=_answer_tokens(tasks),
        held_out=held_out,
        preferences=any(task.has_preferences for task in tasks),
    )
    # Raises the errors that training with this recipe would raise.
    recipe = build_recipe(parse_yaml(text, where=path), where=path)
    run = UnresolvedRun(RunFolder.at(recipe.output), recipe)
    run.refuse_unusable()
    found = [f"{run.counts}; method {recipe.method['name']}"]
    for place in recipe.data.sources():
        found += _unused(place)
    return FirstRecipe(text, found)


def _unused(source: Source) -> list[str]:
    """Returns a line with the columns of a source that are not used, if there are any."""
    names, of_tasks = unused_columns(source)
    if not names:
        return []
    named = ", ".join(names[:_NAMED_COLUMNS])
    if len(names) > _NAMED_COLUMNS:
        named += f" and {len(names) - _NAMED_COLUMNS} more"
    line = f"Columns that are not used: {named}."
    if of_tasks is not None:
        line += f" Task names: {shlex.quote(f'data.columns.task={as_yaml(of_tasks)}')}"
    return [one_line(line)]


def _held_out(tasks: Sequence[Task]) -> int:
    """Returns the number of instances to hold out of each task: at most a quarter."""
    # Tasks that are too small to hold out any instance do not limit the others.
    quarters = [len(task.train) // 4 for task in tasks if len(task.train) >= 4]
    return min([_HELD_OUT, *quarters]) if quarters else 0


def _answer_tokens(tasks: Sequence[Task]) -> int:
    """Returns a limit on answer tokens, a multiple of 50, that truncates few training answers."""
    answers = (
        answer
        for task in tasks
        for instance in task.train
        for answer in (*instance.outputs, instance.rejected or "")
    )
    longest = max(map(_most_tokens, answers), default=0)
    return min(1024, max(50, math.ceil(longest / 50) * 50))


def _most_tokens(text: str) -> float:
    """An upper estimate of the tokens: one per three ASCII characters, 1.5 per other character."""
    # An estimate, because the model and its tokenizer are not loaded.
    ascii_characters = sum(map(str.isascii, text))
    return ascii_characters / 3 + 1.5 * (len(text) - ascii_characters)

"""Parses rows: a task's instance, an instruction (Alpaca), a prompt with its completion (FLAN, P3), or a chat."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import lru_cache
from glob import has_magic
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field

from badit.data.tasks import Messages, Split, Strings, TaskName
from badit.support.errors import BaditError, explained, nearest

Format = Literal["auto", "sapt", "superni", "jsonl", "builtin"]
Turns = Literal["last", "all"]

#: A parsed instance: the task's name, the task's fields, the split, and the instance's fields.
Record = tuple[str, Mapping[str, Any], Split, dict[str, Any]]
SUFFIXES = (
    ".json",
    ".jsonl",
    ".csv",
    ".tsv",
    ".parquet",
    ".arrow",
)  # of files; all but the first always hold rows
#: Names of splits in datasets, and the split that each stands for.
SPLIT_NAMES: dict[str, Any] = {"train": "train", "test": "test"} | dict.fromkeys(
    ("validation", "valid", "val", "dev", "eval"), "validation"
)
# The keys of a prompt and its completion in common datasets.
_PAIRS = [
    ("prompt", "completion"), ("prompt", "response"), ("inputs_pretokenized", "targets_pretokenized"),
    ("inputs", "targets"), ("input", "output"), ("input", "target"), ("question", "answer"),
]  # fmt: skip
# The keys of a task's instance. Others are refused, since a misspelt "input" would be read as an empty input.
_KEYS = ("task", "instruction", "input", "output", "outputs", "id", "split")
_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant"}


@dataclass(frozen=True)
class Source:
    """The location of tasks and the options for reading their rows.

    ``columns`` maps ``task``, ``instruction``, ``input``, ``output``, ``id``, ``split`` and ``messages`` to the names
    of their columns, where these differ. ``splits`` maps names of splits (in rows, file names or datasets) to train,
    validation or test; rows of other splits are then not read.
    """

    path: (
        str | Path
    )  # "builtin", a file, a folder, a pattern with *, or a hub dataset: org/name or org/name:CONFIG
    format: Format = "auto"  # the layout of a folder
    task: str | None = (
        None  # of all rows (default: the task that a row names, or the name of the file or dataset)
    )
    instruction: str | None = (
        None  # of rows without one (default: none; a row's input is then the whole prompt)
    )
    columns: Mapping[str, str] = field(default_factory=dict)
    splits: Mapping[str, Split] = field(default_factory=dict)  # default: SPLIT_NAMES
    turns: Turns = "last"  # the answers of a chat to train: "all" makes one instance with its own prompt for each
    weight: float = 1.0  # of its tasks in a mixture

    def split_of(self, name: str) -> Split | None:
        """Returns the split that a name stands for; None if it is unknown or not to be read."""
        return self.splits.get(name) if self.splits else SPLIT_NAMES.get(name.lower())

    def refuse_missing(self) -> None:
        """Raises BaditError if the path does not exist and is not 'builtin', a pattern or the name of a hub dataset."""
        path = str(self.path)
        on_hub = (
            re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(:[\w.-]+)?", path)
            and Path(path).suffix not in SUFFIXES
        )
        if path != "builtin" and not has_magic(path) and not on_hub and not Path(path).exists():
            raise BaditError(
                f"data.source: {path}: no such file or folder; give a path or 'builtin'"
            )

    def refuse_row_options(self) -> None:
        """Raises BaditError if an option is set that only rows can have; for sources with other layouts."""
        given = {
            "task": self.task,
            "instruction": self.instruction,
            "columns": self.columns,
            "splits": self.splits,
        }
        for name, is_set in (given | {"turns": self.turns != "last"}).items():
            if is_set:
                fix = "remove it, or set it in the entries of other sources"
                raise BaditError(
                    f"data.{name}: does not apply to {self.path}, whose tasks are not rows; {fix}"
                )


class _Row(BaseModel):
    task: TaskName
    input: str
    outputs: Strings = Field(validation_alias="output")
    instruction: str | None = None
    history: Messages = ()
    id: str | None = None
    split: Split | None = None


def read_rows(
    rows: Iterable[tuple[str, Any]],
    file_split: Split | None,
    name: str,
    where: Source,
    *,
    strict: bool,
) -> Iterator[Record]:
    """Yields the instances of rows. ``name`` is the default task; the default split is ``file_split`` or train.

    ``strict`` refuses unknown keys in a task's instance, and different instructions in one task.
    """
    definitions: dict[str, str] = {}
    for place, row in rows:
        try:
            with explained():
                for one in _parsed(row, name, where, strict):
                    # The published benchmark has blank answers, but in a user's data they are mistakes.
                    if not any(output.strip() for output in one.outputs):
                        raise BaditError("output: must hold at least one answer that is not blank")
                    # A blank instruction is none; None would be the task's definition, which may be another row's.
                    own = one.instruction or ""
                    if own != definitions.setdefault(one.task, own) and strict:
                        fix = "use one per task, or keep several with data.columns.instruction=instruction"
                        raise BaditError(
                            f"instruction: differs from other rows of task '{one.task}'; {fix}"
                        )
                    if file_split and one.split not in (None, file_split):
                        raise BaditError(
                            f"split: must be '{file_split}', as in the file's name; change one of them"
                        )
                    instance = one.model_dump(exclude={"task", "split"}) | {"instruction": own}
                    yield (
                        one.task,
                        {"definition": one.instruction},
                        file_split or one.split or "train",
                        instance,
                    )
        except BaditError as error:
            raise BaditError(f"{place}: {error}") from None


def _parsed(row: Any, name: str, where: Source, strict: bool) -> Iterator[_Row]:
    """Yields the instances of one row, whose form is detected from its keys."""
    if not isinstance(row, Mapping):
        raise BaditError(f"must be an object with keys, not {row!r:.60}")
    if missing := [column for column in where.columns.values() if column not in row]:
        raise BaditError(
            f"data.columns: there is no column {missing[0]!r:.60}; found: {', '.join(map(str, row))}"
        )
    renamed = {key: row[column] for key, column in where.columns.items()}
    kept = {key: value for key, value in row.items() if key not in where.columns.values()}
    present = {key: value for key, value in {**kept, **renamed}.items() if value is not None}
    row = {
        key: str(value) if isinstance(value, int | float) else value
        for key, value in present.items()
    }
    split = str(row.get("split") or "")
    if split and where.splits and split not in where.splits:
        return
    if "output" in renamed and renamed["output"] is None:
        fix = "remove the row, or choose other splits with data.splits"
        raise BaditError(
            f"{where.columns['output']}: has no answer (in a dataset with class labels: -1); {fix}"
        )
    if "outputs" in row:
        if "output" in row and not where.columns:
            raise BaditError(
                "output, outputs: a row has one of them; remove the other, or set data.columns"
            )
        row = {"output": row["outputs"], **row}
    own_task, is_mapped = (
        row.get("task", row.get("task_name")),
        bool(where.columns.keys() & {"input", "output"}),
    )
    instruction = (
        row.get("instruction") if "instruction" in where.columns else None
    ) or where.instruction
    lost = ["context", "history", "tools", "functions"]  # keys that no form of row uses
    keys, unused = tuple(map(str, row)), ["system", "prompt", *lost]
    expected = ["split"] + ["instruction"] * ("task" in row) + ["task"] * (not where.task)
    for key in () if where.columns else expected:
        _refuse_near(key, keys)
    if not is_mapped and (chat := _chat_of(row)) is not None:
        # Next to messages, a prompt repeats the first one in some public datasets.
        found, pair, unused = (
            list(_answers(chat, where.turns)),
            ("messages",),
            ["instruction", *lost],
        )
    elif "instruction" in row and "output" in row:
        others = [key for key in row if key not in _KEYS]
        if strict and "task" in row and others:
            raise BaditError(f"{others[0]}: unknown key{nearest(others[0], _KEYS)}")
        _refuse_near("input", keys)
        text, content = row["instruction"], row.get("input", "")
        if own_task is not None or where.columns.get("instruction"):
            instruction = text or instruction
        else:  # Alpaca: each row has its own instruction, which becomes part of its input
            content = f"{text}\n\n{content}" if text and content != "" else text or content
        found, pair = [((), content, row["output"])], ("instruction", "input")
    elif pair := next(
        (one for one in _PAIRS if row.keys() >= {*one} and (one[0] == "input" or not is_mapped)), ()
    ):
        own = row.get("instruction") or instruction
        if own != instruction and pair[0] in (
            "input",
            "question",
        ):  # other inputs are whole prompts
            fix = (
                f"name the columns with data.columns.input={pair[0]} data.columns.output={pair[1]}"
            )
            raise BaditError(f"instruction: not used in a row with {pair[0]} and {pair[1]}; {fix}")
        found = [((), row[pair[0]], row[pair[1]])]
    else:
        for key in () if is_mapped else row.keys() & {"messages", "conversations"}:
            raise BaditError(f"{key}: must be a list of messages, not {row[key]!r:.60}")
        if empty := [
            key
            for key in kept
            if kept[key] is None and key in ("outputs", *(pair[1] for pair in _PAIRS))
        ]:
            raise BaditError(f"{empty[0]}: has no answer; remove the row")
        _refuse_near("output", keys)
        fix = "name the columns with data.columns.input=COLUMN data.columns.output=COLUMN"
        raise BaditError(f"unknown form of row: found {', '.join(map(str, row)):.200}; {fix}")
    for key in () if where.columns else unused:
        if row.get(key) and key not in pair:
            raise BaditError(
                f"{key}: not used in a row with {' and '.join(pair)}; remove it, or set data.columns"
            )
    identity = str(row.get("id", "")) or None
    task = where.task or (name if own_task is None else own_task)
    about: dict[str, Any] = {
        "task": task,
        "split": where.split_of(split) or split or None,
        "instruction": instruction,
    }
    for number, (history, content, outputs) in enumerate(found):
        own_id = f"{identity}-{number}" if identity and number else identity
        yield _Row.model_validate(
            about | {"id": own_id, "history": history, "input": content, "output": outputs}
        )


@lru_cache  # most rows have the same keys
def _refuse_near(key: str, keys: tuple[str, ...]) -> None:
    """Raises BaditError if a row lacks a key but has a similar one, which is probably misspelt."""
    named = {one.lower(): one for one in keys}
    if key not in keys and (near := get_close_matches(key, named, n=1, cutoff=0.8)):
        raise BaditError(f"found {named[near[0]]!r:.60}, did you mean {key!r}?")


def _chat_of(row: Mapping[str, Any]) -> list[Any] | None:
    """Returns the messages of a row; None if it is not a chat."""
    for keys in (("messages",), ("conversations",), ("prompt", "completion")):
        if all(isinstance(row.get(key), list) for key in keys):
            system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
            return [*system, *(message for key in keys for message in row[key])]
    return None


def _answers(messages: Sequence[Any], turns: Turns) -> Iterator[tuple[Messages, Any, Any]]:
    """Yields (earlier messages, user message, answer) for every answer of a chat, or only for the last one."""
    chat = tuple(_message(number, message) for number, message in enumerate(messages))
    answered = [number for number, (role, _) in enumerate(chat) if role == "assistant"]
    if not answered:
        raise BaditError("messages: there is no assistant message; add an answer")
    for number in answered if turns == "all" else answered[-1:]:
        if (before := chat[number - 1][0] if number else "nothing") != "user":
            raise BaditError(
                f"messages.{number}: an assistant message must follow a user message, not {before!r:.60}"
            )
        yield chat[: number - 1], chat[number - 1][1], chat[number][1]


def _message(number: int, message: Any) -> tuple[str, str]:
    fields = message if isinstance(message, Mapping) else {}
    role, content = (
        fields.get("role", fields.get("from")),
        fields.get("content", fields.get("value")),
    )
    if isinstance(content, list):
        with suppress(TypeError, LookupError):  # not all parts are text
            content = "".join(part["text"] for part in content)
    if not isinstance(role, str) or not isinstance(content, str) or fields.get("tool_calls"):
        raise BaditError(
            f"messages.{number}: must have a role and text as content, and no tool calls; remove the row"
        )
    return _ROLES.get(role, role), content

"""The forms of rows: one table says which columns a form has and how its rows become instances."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import lru_cache
from typing import Any, NoReturn

from badit.data.chats import answers
from badit.data.source import Source
from badit.support.errors import BaditError

Columns = tuple[str, ...]
Fields = dict[str, Any]  # values that are not yet validated, by field or by column

# Columns that no form uses. They are refused, because their content would be lost.
_LOST = ("context", "history", "tools", "functions")
_OF_ANY_FORM = ("task", "task_name", "split", "id")


@dataclass(frozen=True)
class RowForm:
    """A form of rows.

    Args:
        columns: those that a row of this form has. In a chat they are lists of messages.
        convert: yields the fields of a row's instances.
        is_chat: whether the columns are lists of messages.
        if_mapped: whether the form applies if data.columns names the input or the output.
    """

    columns: Columns
    convert: Callable[[Fields, Columns, Source], Iterator[Fields]]
    is_chat: bool = False
    if_mapped: bool = False

    def applies_to(self, row: Fields, source: Source) -> bool:
        if source.maps_text and not self.if_mapped:
            return False
        if "messages" in source.columns and self.columns != ("messages",):
            return False
        values = [row.get(name) for name in self.columns]
        if self.is_chat:
            return all(isinstance(value, list) for value in values)
        return None not in values

    @property
    def lost(self) -> Columns:
        """The columns whose content this form would lose."""
        if self.is_chat:
            # A prompt is allowed: in some public datasets it repeats the first message.
            return ("instruction", *_LOST)
        return ("system", "prompt", *_LOST)

    @property
    def used(self) -> Columns:
        """The columns that this form uses, whether a row must have them or not."""
        used = (*self.columns, *_OF_ANY_FORM)
        if self.is_chat:
            return (*used, "system", "prompt")
        if "output" in self.columns:
            return (*used, "input", "outputs")
        return used


def form_of(row: Fields, source: Source) -> RowForm | None:
    """Returns the first form in the table that applies to a row; None if none does."""
    return next((form for form in FORMS if form.applies_to(row, source)), None)


def default_instruction(row: Fields, source: Source) -> Any:
    """Returns the instruction of a row whose form has none of its own."""
    if "instruction" in source.columns and row.get("instruction"):
        return row["instruction"]
    return source.instruction


def refuse_form(row: Fields, source: Source, values: Mapping[str, Any]) -> NoReturn:
    """Raises BaditError for a row to which no form applies; ``values`` are those of its columns."""
    for name in ("messages", "conversations"):
        if name in row and not source.maps_text:
            raise BaditError(f"{name}: must be a list of messages, not {row[name]!r:.60}")
    if row.keys() & {"chosen", "rejected"} and not source.maps_text:
        _refuse_pair(row)
    # In every form with text, the first column is the prompt and the second the answer.
    answer_columns = [name for form in FORMS for name in form.columns[1:]]
    for name in ("outputs", *answer_columns):
        if name in values and values[name] is None:
            raise BaditError(f"{name}: has no answer; remove the row")
    refuse_misspelt("output", tuple(row))
    fix = "name the columns with data.columns.input=COLUMN data.columns.output=COLUMN"
    for name, value in row.items():
        if isinstance(value, list) and not source.columns:
            fix += f"; if {name!r:.60} is a chat, with data.columns.messages={name:.60}"
            break
    raise BaditError(f"unknown form of row: found {', '.join(row):.200}; {fix}")


@lru_cache  # most rows have the same keys
def refuse_misspelt(key: str, keys: Columns) -> None:
    """Raises BaditError if a row lacks a key but has a similar one, which is probably misspelt."""
    if key in keys:
        return
    # Case is ignored, so that Task is recognised as a misspelt task.
    by_lower_case = {name.lower(): name for name in keys}
    for similar in get_close_matches(key, by_lower_case, n=1, cutoff=0.8):
        raise BaditError(f"found {by_lower_case[similar]!r:.60}, did you mean {key!r}?")


def _refuse_pair(row: Fields) -> NoReturn:
    """Raises BaditError for a row with a chosen or a rejected answer that has no form."""
    for name in ("prompt", "chosen", "rejected"):
        if row.get(name) is None:
            raise BaditError(
                f"{name}: missing in a row of preference data (prompt, chosen, rejected); add it, "
                "or name the columns with data.columns.input, output and rejected"
            )
    raise BaditError("prompt, chosen, rejected: must all be text, or all lists of messages")


def _from_chat(row: Fields, columns: Columns, source: Source) -> Iterator[Fields]:
    messages = [message for name in columns for message in row[name]]
    if row.get("system"):
        messages.insert(0, {"role": "system", "content": row["system"]})
    return answers(messages, source.turns)


def _from_chat_pair(row: Fields, columns: Columns, source: Source) -> Iterator[Fields]:
    """Yields the last answers of two chats, which may both contain the prompt, with one prompt."""
    beginning = row.get("prompt")
    if not isinstance(beginning, list):  # in some public datasets it repeats the first message
        beginning = []
    last = replace(source, turns="last")
    pair = []
    for name in columns:
        try:
            pair += _from_chat({**row, name: [*beginning, *row[name]]}, (name,), last)
        except BaditError as error:
            raise BaditError(f"{name}: {error}") from None
    chosen, rejected = pair
    answer = rejected.pop("output")
    if rejected != {name: chosen[name] for name in rejected}:
        problem = "must differ from chosen in the last message only"
        raise BaditError(f"rejected: {problem}; correct it, or remove the row")
    yield {**chosen, "rejected": answer}


def _from_pair(row: Fields, columns: Columns, source: Source) -> Iterator[Fields]:
    if any(isinstance(row[name], list) for name in columns):
        _refuse_pair(row)
    prompt, chosen, rejected = columns
    yield {"input": row[prompt], "output": row[chosen], "rejected": row[rejected]}


def _from_instruction(row: Fields, columns: Columns, source: Source) -> Iterator[Fields]:
    # It would be read as an empty input.
    refuse_misspelt("input", tuple(row))
    instruction = row["instruction"]
    text = row.get("input", "")
    if row.keys() & {"task", "task_name"} or source.columns.get("instruction"):
        instruction = instruction or default_instruction(row, source)
        yield {"instruction": instruction, "input": text, "output": row["output"]}
        return

    # In Alpaca each row has its own instruction, which becomes part of its input.
    if instruction and text != "":
        text = f"{instruction}\n\n{text}"
    yield {"input": text or instruction, "output": row["output"]}


def _from_prompt(row: Fields, columns: Columns, source: Source) -> Iterator[Fields]:
    prompt, answer = columns
    if isinstance(row[prompt], list) or (answer == "completion" and isinstance(row[answer], list)):
        raise BaditError(f"{prompt}, {answer}: must both be text, or both lists of messages")
    yield {"input": row[prompt], "output": row[answer]}


def _from_input(row: Fields, columns: Columns, source: Source) -> Iterator[Fields]:
    # A prompt is complete, but an input would lack the instruction.
    instruction = row.get("instruction")
    if instruction and instruction != default_instruction(row, source):
        text, answer = columns
        raise BaditError(
            f"instruction: not used in a row with {text} and {answer}; "
            f"name the columns with data.columns.input={text} data.columns.output={answer}"
        )
    return _from_prompt(row, columns, source)


# A row has the first form that applies.
FORMS = (
    # Preference data. Public datasets may also have the chosen chat as messages.
    RowForm(("chosen", "rejected"), _from_chat_pair, is_chat=True),
    RowForm(("prompt", "chosen", "rejected"), _from_pair),
    RowForm(("messages",), _from_chat, is_chat=True),
    RowForm(("conversations",), _from_chat, is_chat=True),  # ShareGPT
    RowForm(("prompt", "completion"), _from_chat, is_chat=True),
    # A task's instance, or Alpaca.
    RowForm(("instruction", "output"), _from_instruction, if_mapped=True),
    RowForm(("prompt", "completion"), _from_prompt),
    RowForm(("prompt", "response"), _from_prompt),
    # P3, where "inputs" and "targets" are token ids.
    RowForm(("inputs_pretokenized", "targets_pretokenized"), _from_prompt),
    RowForm(("inputs", "targets"), _from_prompt),  # FLAN
    RowForm(("input", "output"), _from_input, if_mapped=True),
    RowForm(("input", "target"), _from_input, if_mapped=True),
    RowForm(("question", "answer"), _from_input),
)

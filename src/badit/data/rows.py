"""Parses rows and checks them."""

from collections.abc import Iterator, Mapping
from typing import Any

from badit.data.forms import (
    Fields,
    RowForm,
    default_instruction,
    form_of,
    refuse_form,
    refuse_misspelt,
)
from badit.data.records import Row
from badit.data.source import Source
from badit.data.tasks import Split
from badit.support.errors import BaditError, explained, nearest

# The place and the values of each row. Error messages begin with the place.
PlacedRows = Iterator[tuple[str, Any]]
# Other keys are refused, since a misspelt "id" or "split" would have no effect.
_KEYS_OF_A_TASK = ("task", "instruction", "input", "output", "outputs", "id", "split")


def read_rows(
    rows: PlacedRows, source: Source, default_task: str, file_split: Split | None, *, strict: bool
) -> Iterator[Row]:
    """Parses the rows of a file or a split.

    ``file_split`` is the split of all rows; if it is None, a row may name its own. ``strict``
    refuses unknown keys in a task's instance, and different instructions in one task.
    """
    instructions: dict[str, str] = {}
    for place, values in rows:
        try:
            with explained():
                for row in _parsed(values, source, default_task, strict):
                    if strict:
                        _refuse_second_instruction(row, instructions)
                    if file_split:
                        _set_split(row, file_split)
                    yield row
        except BaditError as error:
            raise BaditError(f"{place}: {error}") from None


def _refuse_second_instruction(row: Row, instructions: dict[str, str]) -> None:
    instruction = row.instruction or ""
    if instruction != instructions.setdefault(row.task, instruction):
        raise BaditError(
            f"instruction: differs from other rows of task '{row.task}'; use one per task, or "
            "keep several with data.columns.instruction=instruction"
        )


def _set_split(row: Row, file_split: Split) -> None:
    if row.split not in (None, file_split):
        raise BaditError(
            f"split: must be '{file_split}', as in the file's name; change one of them"
        )
    row.split = file_split


def _parsed(values: Any, source: Source, default_task: str, strict: bool) -> Iterator[Row]:
    """Yields the instances of one row; none if its split is not to be read."""
    row = by_field(values, source)
    split = str(row.get("split") or "")
    if split and source.splits and split not in source.splits:
        return
    _set_output(row, source)
    # With data.columns, other columns may have any name.
    if not source.columns:
        _refuse_misspelt_keys(row, source)
    form = form_of(row, source)
    if form is None:
        refuse_form(row, source, values)
    if not source.columns:
        _refuse_unused_keys(row, form, strict)

    identity = str(row.get("id", ""))
    shared = {
        "task": source.task or row.get("task", row.get("task_name", default_task)),
        # An unknown name stays, so that the validation of the row reports it.
        "split": source.split_of(split) or split or None,
        "instruction": default_instruction(row, source),
        "id": identity or None,
    }
    if "rejected" in source.columns:
        shared["rejected"] = row.get("rejected", "")
    for number, fields in enumerate(form.convert(row, form.columns, source)):
        if identity and number:  # the later answers of a chat
            fields["id"] = f"{identity}-{number}"
        parsed = Row.model_validate(shared | fields)
        # The published benchmark has blank answers, but in a user's data they are mistakes.
        if not any(output.strip() for output in parsed.outputs):
            name = "output" if parsed.rejected is None else "chosen"
            raise BaditError(f"{name}: must hold at least one answer that is not blank")
        _refuse_useless_pair(parsed)
        yield parsed


def _refuse_useless_pair(row: Row) -> None:
    """Raises BaditError for preference data whose rejected answer is blank or the chosen one."""
    if row.rejected is None:
        return
    if not row.rejected.strip():
        raise BaditError("rejected: must be an answer that is not blank; add it, or remove the row")
    if row.rejected.strip() == row.outputs[0].strip():
        raise BaditError("rejected: equals the chosen answer; remove the row")


def by_field(values: Any, source: Source) -> Fields:
    """Returns a row's values under the names of the fields that data.columns maps.

    Numbers become text, as in files without types, and null values are left out.
    """
    if not isinstance(values, Mapping):
        raise BaditError(f"must be an object with keys, not {values!r:.60}")
    columns = source.columns
    for column in columns.values():
        if column not in values:
            present = ", ".join(map(str, values))
            raise BaditError(f"data.columns: there is no column {column!r:.60}; found: {present}")

    row = {name: value for name, value in values.items() if name not in columns.values()}
    row |= {field: values[column] for field, column in columns.items()}
    for field, value in row.items():
        if isinstance(value, int | float):
            row[field] = str(value)
    return {field: value for field, value in row.items() if value is not None}


def _set_output(row: Fields, source: Source) -> None:
    """Sets ``output`` if the row has ``outputs``."""
    if "output" in source.columns and "output" not in row:
        raise BaditError(
            f"{source.columns['output']}: has no answer (in a dataset with class labels: -1); "
            "remove the row, or choose other splits with data.splits"
        )
    if row.keys() >= {"output", "outputs"} and not source.columns:
        raise BaditError(
            "output, outputs: a row has one of them; remove the other, or set data.columns"
        )
    if "outputs" in row:
        row.setdefault("output", row["outputs"])


def _refuse_misspelt_keys(row: Fields, source: Source) -> None:
    """Raises BaditError if a key resembles one that the row lacks."""
    keys = tuple(row)
    refuse_misspelt("split", keys)
    if "task" in keys:
        refuse_misspelt("instruction", keys)
    if not source.task:
        refuse_misspelt("task", keys)


def _refuse_unused_keys(row: Fields, form: RowForm, strict: bool) -> None:
    """Raises BaditError for a key that the row's form does not use, so that nothing is lost."""
    if strict and row.keys() >= {"task", "instruction", "output"} and not form.is_chat:
        for key in row:
            if key not in _KEYS_OF_A_TASK:
                raise BaditError(f"{key}: unknown key{nearest(key, _KEYS_OF_A_TASK)}")
    for key in form.lost:
        if row.get(key) and key not in form.columns:
            used = " and ".join(form.columns)
            raise BaditError(
                f"{key}: not used in a row with {used}; remove it, or set data.columns"
            )

"""The columns of a file of rows that are not used."""

from collections import defaultdict
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from badit.data.files import values_of
from badit.data.forms import form_of
from badit.data.rows import by_field
from badit.data.source import Source

_ROWS = 1_000  # that are read, the first ones of the file


class UnusedColumns(NamedTuple):
    """The names of columns that are not used, and the one that may have the tasks' names."""

    names: list[str]
    of_tasks: str | None = None


def unused_columns(source: Source) -> UnusedColumns:
    """Returns the columns, or keys, that the first rows of a file have but do not use.

    If no row names its task, ``of_tasks`` is the first of them with several repeated values. Only a
    single file is read, whose rows must be valid; for other sources the result is empty.
    """
    file = Path(source.path)
    if not file.is_file():
        return UnusedColumns([])
    number_of_rows = 0
    has_task = source.task is not None
    values = defaultdict[str, list[str]](list)
    for _, row in islice(values_of(file), _ROWS):
        number_of_rows += 1
        fields = by_field(row, source)
        fields.setdefault("output", fields.get("outputs"))
        form = form_of(fields, source)
        if form is None:  # a row of a split that is not read
            continue
        used = {*form.used, *source.columns}
        has_task = has_task or not fields.keys().isdisjoint(("task", "task_name"))
        for name, value in fields.items():
            # An index that pandas has written has no name.
            if value and name.strip() and name not in used:
                values[name].append(str(value))

    if has_task:
        return UnusedColumns(list(values))
    repeated = (
        name for name, cells in values.items() if 2 <= len(set(cells)) <= number_of_rows / 2
    )
    return UnusedColumns(list(values), next(repeated, None))

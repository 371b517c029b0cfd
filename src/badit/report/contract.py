"""What the report reads of each table of an analysis: its columns, and whether they hold text or numbers.

Tables may come from another machine or another version, so each value is checked once, here, and the figures can rely
on it. A number may be null where it is not defined.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from badit.analysis.tables import TidyTable, Value
from badit.errors import BaditError

Records = list[dict[str, Any]]

_TEXT, _NUMBER, _INDEX = "text", "a number", "a whole number"
# These two become the sides of a figure, so that a number without bounds would be one without end.
_MOST_EXPERTS = 1024
_EXPERT, _SHARING = f"an expert's number, from 0 to {_MOST_EXPERTS - 1}", "a number of tasks that has its row"
_PLACE = {"layer": _INDEX, "module": _TEXT}
_PAIR = {"task_a": _TEXT, "task_b": _TEXT}
_OVERLAP = {"kind": _TEXT, **_PAIR, "overlap": _NUMBER, "chance": _NUMBER}
_ANGLES = {f"{group}_{unit}": _NUMBER for unit in ("degrees", "abs_cos") for group in ("within", "between")}

TABLES: Mapping[str, Mapping[str, str]] = {
    "gradient_pairs": {**_PAIR, **_PLACE, "cosine": _NUMBER, "magnitude_similarity": _NUMBER},
    "gradient_overall": {
        **_PAIR,
        "parameters": _TEXT,
        "cosine": _NUMBER,
        "corrected_cosine": _NUMBER,
        "magnitude_similarity": _NUMBER,
    },
    "gradient_summary": {
        **_PLACE,
        "parameters": _TEXT,
        "conflict_rate": _NUMBER,
        "mean_cosine": _NUMBER,
        "mean_magnitude_similarity": _NUMBER,
        "reliability": _NUMBER,
    },
    "gradient_tasks": {
        "task": _TEXT,
        "parameters": _TEXT,
        "norm": _NUMBER,
        "reliability": _NUMBER,
        "instances": _NUMBER,
    },
    "coactivation": {"kind": _TEXT, "layer": _INDEX, "tasks": _SHARING, "share": _NUMBER, "chance": _NUMBER},
    "coactivation_tasks": {
        "kind": _TEXT,
        "task": _TEXT,
        "layer": _INDEX,
        "marked": _NUMBER,
        "exclusive": _NUMBER,
        "universal": _NUMBER,
    },
    "coactivation_pairs": _OVERLAP,
    "expert_angles": {"step": _NUMBER, **_PLACE, "measured": _TEXT, **_ANGLES},
    "component_flow": {
        "step": _INDEX,
        **_PLACE,
        "from_expert": _EXPERT,
        "to_expert": _EXPERT,
        "components": _NUMBER,
    },
    "gates": {"task": _TEXT, **_PLACE, "expert": _EXPERT, "mean": _NUMBER, "std": _NUMBER},
    "gate_similarity": {**_PAIR, "similarity": _NUMBER},
    "expert_losses": {"task": _TEXT, "expert": _EXPERT, "loss": _NUMBER, "loss_without": _NUMBER, "change": _NUMBER},
    "nearest_prompts": {
        "expert": _EXPERT,
        "rank": _INDEX,
        "task": _TEXT,
        "instance": _TEXT,
        "score": _NUMBER,
        "prompt": _TEXT,
    },
    "abilities": {
        "expert": _EXPERT,
        "tasks": _TEXT,
        "hurt_most": _TEXT,
        "mean_gate": _NUMBER,
        "spread": _NUMBER,
        "change": _NUMBER,
        "summary": _TEXT,
    },
    "ability_recovery": {"measure": _TEXT, "value": _NUMBER, "chance": _NUMBER, "p_value": _NUMBER},
    "task_gap": {"method": _TEXT, "task": _TEXT, "single": _NUMBER, "multi": _NUMBER, "gap": _NUMBER},
    "transfer": {"stage": _INDEX, "trained_task": _TEXT, "task": _TEXT, "rouge_l": _NUMBER},
}
# The columns that name tasks, whatever the table.
TASK_COLUMNS = ("task", "task_a", "task_b", "trained_task")


def checked_records(name: str, table: TidyTable, where: str) -> Records:
    """The rows of what should be the table ``name``, as dictionaries.

    Raises:
        BaditError: it is another table, a column is missing, or a value is of another kind.
    """
    if table.name != name:
        raise BaditError(f"{where}: holds the table {table.name!r:.60}; make it anew with: badit analyze")
    if missing := [column for column in TABLES[name] if column not in table.columns]:
        raise BaditError(f"{where}: has no column {missing[0]!r}; make the table anew with: badit analyze")
    records = table.records()
    for row, record in enumerate(records, start=1):
        for column, kind in TABLES[name].items():
            if not _suits(record[column], kind, len(records)):
                raise BaditError(f"{where}: {column} of row {row} must be {kind}; make the table anew")
        if "task_a" in record and record["task_a"] == record["task_b"]:
            raise BaditError(f"{where}: row {row} pairs a task with itself; make the table anew")
    return records


def known(records: Iterable[Mapping[str, Any]], column: str) -> list[float]:
    """The values of a column that are defined."""
    return [record[column] for record in records if record[column] is not None]


def _suits(value: Value, kind: str, rows: int) -> bool:
    if kind == _TEXT:
        return isinstance(value, str)
    if isinstance(value, bool):
        return False
    if kind == _NUMBER:
        return value is None or (isinstance(value, int | float) and math.isfinite(value))
    if not isinstance(value, int):
        return False
    return kind == _INDEX or 0 <= value <= (rows if kind == _SHARING else _MOST_EXPERTS - 1)

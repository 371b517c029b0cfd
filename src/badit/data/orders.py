"""Orders in which a sequence of tasks is learnt.

sapt-1, sapt-2  the two orders of SAPT (Zhao et al. 2024, arXiv 2401.08295) over its 15 SuperNI tasks; tasks that were
                not loaded are passed over
seeded-N        the loaded tasks' names, sorted and shuffled by seed N. The BADIT paper's five orders shuffled an
                unsorted listing of a folder and cannot be recovered; seeded-0 … seeded-4 stand in for them.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from badit.data.names import resolve_names, task_number
from badit.data.schema import Task
from badit.errors import BaditError, nearest

SAPT_ORDERS = {
    "sapt-1": (1572, 363, 1290, 181, 2, 1510, 639, 1729, 73, 1590, 748, 511, 591, 1687, 875),
    "sapt-2": (748, 73, 1590, 639, 1572, 1687, 591, 363, 1510, 1729, 181, 511, 2, 1290, 875),
}


def ordered(tasks: Sequence[Task], order: str | Sequence[str]) -> list[Task]:
    """The tasks in a named order, or in that of a list of all their names or numbers.

    Raises:
        BaditError: an unknown order, or one that does not say where a task comes.
    """
    by_name = {task.name: task for task in tasks}
    if isinstance(order, str):
        names = _named(order, sorted(by_name))
    else:
        names = resolve_names(order, by_name, field="data.order")
    if missing := [name for name in by_name if name not in names]:
        raise BaditError(
            f"data.order: does not say where task {missing[0]} comes; add it, or leave it out of data.tasks"
        )
    return [by_name[name] for name in names]


def _named(order: str, names: Sequence[str]) -> list[str]:
    if order in SAPT_ORDERS:
        by_number = {task_number(name): name for name in names}
        return [by_number[str(number)] for number in SAPT_ORDERS[order] if str(number) in by_number]
    if match := re.fullmatch(r"seeded-([0-9]{1,18})", order):
        shuffled = list(names)
        random.Random(f"order/{int(match[1])}").shuffle(shuffled)
        return shuffled
    hint = nearest(order, [*SAPT_ORDERS, "seeded-0"])
    raise BaditError(f"data.order: unknown order {order!r:.60}{hint}; known: sapt-1, sapt-2, seeded-N, a list of names")

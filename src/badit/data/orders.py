"""Orders of tasks that are trained in a sequence, and the selection of tasks by name or number."""

import re
from collections.abc import Iterable, Sequence

from badit.data.sampling import shuffled
from badit.data.tasks import Task
from badit.support.errors import BaditError, nearest

# The two orders of SAPT (Zhao et al. 2024, arXiv 2401.08295) for its 15 SuperNI tasks, by number.
_SAPT_ORDERS = {
    "sapt-1": (1572, 363, 1290, 181, 2, 1510, 639, 1729, 73, 1590, 748, 511, 591, 1687, 875),
    "sapt-2": (748, 73, 1590, 639, 1572, 1687, 591, 363, 1510, 1729, 181, 511, 2, 1290, 875),
}


def ordered(tasks: Sequence[Task], order: str | Sequence[str]) -> list[Task]:
    """Returns the tasks in training order.

    ``order`` is a list of the names or numbers of all tasks; "sapt-1" or "sapt-2", without the
    tasks that are not loaded; or "seeded-N", the sorted names shuffled with seed N. seeded-0 to
    seeded-4 replace the BADIT paper's five orders, which cannot be recovered.
    """
    by_name = {task.name: task for task in tasks}
    # Sorted, so that a seeded order does not depend on the order of loading.
    names = _names_in_order(sorted(by_name), order)
    if missing := by_name.keys() - names:
        fix = "add it, or remove it from data.tasks"
        raise BaditError(f"data.order: does not contain task {min(missing)}; {fix}")
    return [by_name[name] for name in names]


def _names_in_order(names: list[str], order: str | Sequence[str]) -> list[str]:
    """Returns those of the sorted names that an order has."""
    if not isinstance(order, str):
        return resolve_names(order, names, field="data.order")
    if order in _SAPT_ORDERS:
        # Tasks that are not loaded are left out, as the order has all 15.
        by_number = {_number(name): name for name in names}
        numbers = map(str, _SAPT_ORDERS[order])
        return [by_number[number] for number in numbers if number in by_number]
    if seeded := re.fullmatch(r"seeded-([0-9]{1,18})", order):
        return shuffled(names, f"order/{int(seeded[1])}")
    suggestion = nearest(order, [*_SAPT_ORDERS, "seeded-0"])
    raise BaditError(
        f"data.order: unknown order {order!r:.60}{suggestion}; "
        "known: sapt-1, sapt-2, seeded-N, a list of names"
    )


def resolve_names(
    wanted: Sequence[str], names: Iterable[str], *, field: str = "tasks"
) -> list[str]:
    """Returns the full names of the `wanted` ones, in their order.

    These are names or number prefixes, such as "task363" or "363". BaditError, which names the
    `field`, if the list is empty or a name is unknown, ambiguous or repeated.
    """
    if isinstance(wanted, str):
        raise BaditError(
            f"{field}: must be a list of names, such as [{wanted!r:.60}], not one string"
        )
    if not wanted:
        raise BaditError(f"{field}: the list is empty; add a task or omit the list")

    names = sorted(names)
    resolved = []
    # Recipes may have numbers.
    for given_name in map(str, wanted):
        name = _resolved(given_name, names, field)
        if name in resolved:
            raise BaditError(f"{field}: {name!r:.130} is listed twice; list it once")
        resolved.append(name)
    return resolved


def _resolved(wanted: str, names: list[str], field: str) -> str:
    """Returns the one name that a name or a number prefix stands for."""
    if wanted in names:
        return wanted
    # "363", "0363" and "task363" stand for "task363_sst2".
    matches = []
    if digits := re.fullmatch(r"(?:task)?(\d+)", wanted):
        matches = [name for name in names if _number(name) == digits[1].lstrip("0")]
    if not matches:
        suggestion = f"{nearest(wanted, names)}; known: {', '.join(names):.300}"
        raise BaditError(f"{field}: unknown task {wanted!r:.60}{suggestion}")
    if len(matches) > 1:
        fix = f"give a full name, such as {matches[0]!r:.130}"
        raise BaditError(f"{field}: {wanted!r:.60} matches {len(matches)} tasks; {fix}")
    return matches[0]


def _number(name: str) -> str | None:
    """Returns the number in a name such as "task073_commonsenseqa", without leading zeros."""
    match = re.fullmatch(r"task(\d+)(?:_.*)?", name)
    return match and match[1].lstrip("0")

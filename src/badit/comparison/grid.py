"""The cells of a comparison: which runs there are, and each one's recipe.

OUTPUT/METHOD/lr-RATE/seed-N                    mixed
OUTPUT/METHOD/order-NAME/lr-RATE/seed-N         sequential
OUTPUT/METHOD/single/lr-RATE/seed-N/TASK        on one task alone
OUTPUT/METHOD                                   a method that does not train
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from badit.errors import BaditError, nearest
from badit.methods import Method, build_method
from badit.recipe import CompareSection, Recipe, build_recipe

Order = str | tuple[str, ...] | None


@dataclass(frozen=True)
class Cell:
    """One run of a comparison."""

    method: str
    learning_rate: float | None
    seed: int | None
    order: Order = None
    task: str | None = None

    @property
    def path(self) -> Path:
        """Its folder below the comparison's."""
        if self.learning_rate is None:
            return Path(self.method)
        parts = [self.method]
        if self.order is not None:
            parts.append(f"order-{order_name(self.order)}")
        if self.task is not None:
            parts.append("single")
        parts += [f"lr-{self.learning_rate:g}", f"seed-{self.seed}"]
        return Path(*parts, *([self.task] if self.task is not None else []))

    def __str__(self) -> str:
        return str(self.path)


class Grid:
    """What a recipe with a ``compare`` section comes to.

    Raises:
        BaditError: there is no such section, or it names methods that are not there or rates off the ladder.
    """

    def __init__(self, recipe: Recipe) -> None:
        if recipe.compare is None:
            raise BaditError("compare: the recipe has no such section; see recipes/superni-cpu.yaml for one")
        self.recipe = recipe
        self.section: CompareSection = recipe.compare
        self.methods = {name: _method(name, section) for name, section in self.section.methods.items()}
        self._check()

    def _check(self) -> None:
        section, names = self.section, list(self.methods)
        for name in names:
            if not re.fullmatch(r"[\w][\w.+-]*", name):
                raise BaditError(f"compare.methods: {name!r:.60} names a folder; use letters, digits, - and _")
        chosen = [("reference", section.reference), ("budget", section.budget)]
        chosen += [("unmatched", name) for name in section.unmatched] + [
            ("single_task", n) for n in section.single_task
        ]
        for field, name in chosen:
            if name is not None and name not in names:
                raise BaditError(f"compare.{field}: {name!r:.60} is none of the methods{nearest(name, names)}")
        listed: dict[str, list[Any]] = {"seeds": section.seeds, "orders": [order_name(o) for o in section.orders or ()]}
        for field, values in listed.items():
            if twice := [value for value in values if values.count(value) > 1]:
                raise BaditError(f"compare.{field}: {twice[0]} is listed more than once")
        rate = self.recipe.training.learning_rate
        if section.learning_rates is not None and rate not in section.learning_rates:
            raise BaditError(
                f"training.learning_rate: the search starts from {rate:g}; add it to compare.learning_rates"
            )
        if section.learning_rates is not None and not self.recipe.data.validation_per_task:
            raise BaditError("data.validation_per_task: choosing learning rates needs held-out instances, such as 8")

    @property
    def orders(self) -> Sequence[Order]:
        if self.section.orders is None:
            return [None]
        return [order if isinstance(order, str) else tuple(order) for order in self.section.orders]

    def trains(self, method: str) -> bool:
        return self.methods[method].trains

    def searched(self, method: str, rate: float) -> Cell:
        """The cell that tells how good a learning rate is: of the first seed and order."""
        return Cell(method, rate, self.section.seeds[0], self.orders[0])

    def chosen(self, method: str, rate: float | None, tasks: Sequence[str] = ()) -> Iterator[Cell]:
        """All cells of a method at the learning rate that it was found to do best at."""
        if not self.trains(method):
            yield Cell(method, None, None)
            return
        for seed in self.section.seeds:
            for order in self.orders:
                yield Cell(method, rate, seed, order)
        if method in self.section.single_task:
            for seed in self.section.seeds:
                for task in tasks:
                    yield Cell(method, rate, seed, task=task)

    def candidates(self, tasks: Sequence[str]) -> Iterator[Cell]:
        """All cells that there may be, whichever learning rates turn out best."""
        for rate in self.section.learning_rates or [self.recipe.training.learning_rate]:
            for method in self.methods:
                yield from self.chosen(method, rate, tasks)

    def recipe_of(self, cell: Cell) -> Recipe:
        values: dict[str, Any] = self.recipe.model_dump(exclude={"compare"})
        values["method"] = dict(self.section.methods[cell.method])
        values["output"] = str(Path(self.recipe.output) / cell.path)
        if cell.learning_rate is not None:
            values["training"] |= {"learning_rate": cell.learning_rate, "seed": cell.seed}
            values["data"]["order"] = list(cell.order) if isinstance(cell.order, tuple) else cell.order
        if cell.task is not None:
            values["data"] |= {"tasks": [cell.task], "order": None}
        return build_recipe(values)


def order_name(order: str | Sequence[str]) -> str:
    """A short name for an order's folder, another one for every order."""
    if isinstance(order, str):
        return order
    name = "-".join(re.sub(r"^(task\d+)_.*", r"\1", name) for name in order)
    return name if len(name) <= 80 else f"{name[:71]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _method(name: str, section: Mapping[str, Any]) -> Method:
    try:
        return build_method(section)
    except BaditError as error:
        raise BaditError(f"compare.methods.{name}: {error}") from None

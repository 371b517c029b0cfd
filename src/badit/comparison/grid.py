"""The cells of a comparison: one run per method, learning rate, seed and order of tasks.

OUTPUT/METHOD/lr-RATE/seed-N                    all tasks mixed
OUTPUT/METHOD/order-NAME/lr-RATE/seed-N         sequence of tasks
OUTPUT/METHOD/[order-NAME/]search/lr-RATE/...   learning-rate search, if compare.search is set
OUTPUT/METHOD/single/lr-RATE/seed-N/TASK        single task
OUTPUT/METHOD                                   method that does not train
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from badit.comparison.refusals import of_key, section_of
from badit.data import Task
from badit.recipe.loading import build_recipe, merged
from badit.recipe.method import resolve_method
from badit.recipe.schema import Recipe
from badit.runs.folder import RunFolder
from badit.runs.resolved import ResolvedRun, resolve
from badit.runs.unresolved import read_tasks
from badit.support.errors import BaditError, refuse_unknown
from badit.support.files import inside

Order = str | list[str] | None
_LONGEST_NAME = 80  # characters of an order's folder name


@dataclass(frozen=True)
class Cell:
    """One run of a comparison. Learning rate and seed are None for a method that trains nothing."""

    method: str
    learning_rate: float | None = None
    seed: int | None = None
    order: Order = None
    task: str | None = None
    is_search: bool = False  # trained with compare.search, to choose the learning rate

    def __str__(self) -> str:
        """The cell's folder, relative to the folder of the comparison."""
        if self.learning_rate is None:
            return self.method
        names = [self.method]
        if self.task:
            names.append("single")
        elif self.order:
            names.append(f"order-{order_name(self.order)}")
        if self.is_search:
            names.append("search")
        names += [f"lr-{self.learning_rate:g}", f"seed-{self.seed}"]
        if self.task:
            names.append(self.task)
        return "/".join(names)


def order_name(order: str | Sequence[str]) -> str:
    """Returns a short folder name for an order; a name that is cut ends with a hash."""
    if isinstance(order, str):
        return order
    # The numbers identify tasks of Super-NaturalInstructions.
    numbers = [re.sub(r"^(task\d+)_.*", r"\1", name) for name in order]
    are_distinct = len(set(numbers)) == len(numbers)
    name = "-".join(numbers if are_distinct else order)
    if len(name) <= _LONGEST_NAME:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{name[: _LONGEST_NAME - 9]}-{digest}"  # 9: the hyphen and the hash


class Grid:
    """The methods and cells of a recipe.

    BaditError if its ``compare`` section is missing or inconsistent.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.section = section_of(recipe)
        self.orders: Sequence[Order] = self.section.orders or [None]
        self.start_rates: dict[str, float | None] = {}  # None: the method does not train
        self._tasks: dict[str, list[Task]] = {}  # by data section, so that each is read once
        for name in self.section.methods:
            self.start_rates[name] = self._start_rate(name)
        self._refuse_section()
        reference = self.section.reference
        # Only to check compare.search before any run starts.
        with of_key("search"):
            self.recipe_of(self.searched(reference, self.start_rates[reference]))

    def _start_rate(self, name: str) -> float | None:
        """Returns the rate at which a method's search begins, or None if it does not train."""
        # The name is part of folder names, so it has no slash and no leading dot.
        if not re.fullmatch(r"[\w][\w.+-]*", name):
            fix = "use letters, digits, - and _"
            raise BaditError(f"compare.methods: {name!r:.60} is not a valid name; {fix}")
        with of_key(f"methods.{name}"):
            recipe = self.recipe_of(Cell(name, order=self.orders[0]))
            method = resolve_method(recipe.method)
            method.refuse_recipe(recipe)
        if not method.trains:
            return None
        rate = recipe.training.learning_rate
        ladder = self.section.learning_rates
        if ladder is not None and rate not in ladder:
            problem = f"the search starts at the training.learning_rate {rate:g}"
            fix = "add it to compare.learning_rates"
            raise BaditError(f"compare.methods.{name}: {problem}; {fix}")
        return rate

    def _refuse_section(self) -> None:
        section = self.section
        if self.recipe.data.order is not None and not section.orders:
            fix = "set compare.orders, a list of orders"
            raise BaditError(f"data.order: not used in a comparison; {fix}")
        refuse_unknown("compare.reference", section.reference, section.methods)
        if section.budget is not None:
            refuse_unknown("compare.budget", section.budget, section.methods)
        for field in ("unmatched", "single_task"):
            for name in getattr(section, field):
                refuse_unknown(f"compare.{field}", name, section.methods)
        for name in section.single_task:
            if self.start_rates[name] is None:
                problem = f"{name} trains nothing; remove it from the list"
                raise BaditError(f"compare.single_task: {problem}")
        _refuse_repeated("seeds", section.seeds)
        _refuse_repeated("orders", [order_name(order) for order in section.orders or ()])
        for name, entry in section.methods.items():
            _refuse_repeated(f"methods.{name}.seeds", entry.seeds or [])
        if section.vary_data and self.recipe.evaluation.split == "validation":
            problem = "every seed would be scored on different held-out instances"
            fix = "set evaluation.split=test, or remove compare.vary_data"
            raise BaditError(f"compare.vary_data: {problem}; {fix}")

    def searched(self, method: str, rate: float | None) -> Cell:
        """Returns the cell that measures a rate in the search, with the first seed and order."""
        is_search = self.section.search is not None
        return Cell(method, rate, self.seeds_of(method)[0], self.orders[0], is_search=is_search)

    def seeds_of(self, method: str) -> Sequence[int]:
        return self.section.methods[method].seeds or self.section.seeds

    def chosen(self, method: str, rate: float | None, tasks: Sequence[str] = ()) -> list[Cell]:
        """Returns all cells of a method at its chosen rate, and those of the single ``tasks``."""
        if self.start_rates[method] is None:
            # An untrained model depends on no rate, seed or order.
            return [Cell(method)]
        seeds = self.seeds_of(method)
        cells = [Cell(method, rate, seed, order) for seed in seeds for order in self.orders]
        if method in self.section.single_task:
            cells += [Cell(method, rate, seed, task=task) for seed in seeds for task in tasks]
        return cells

    def recipe_of(self, cell: Cell) -> Recipe:
        # Only what was set: whether training.learning_rate is a default decides if it is refused.
        values = self.recipe.model_dump(exclude={"compare"}, exclude_unset=True)
        # Sections that were not set must exist, because values are added below.
        values = merged({"training": {}, "data": {}}, values)
        entry = self.section.methods[cell.method]
        values["method"] = dict(entry.model_extra or {})
        values["training"] |= entry.training
        if cell.is_search:
            values = merged(values, self.section.search or {})
        values["output"] = str(self.folder_of(cell).path)
        values["data"]["order"] = cell.order
        if cell.learning_rate is not None:
            values["training"] |= {"learning_rate": cell.learning_rate, "seed": cell.seed}
            if self.section.vary_data:
                first_seed = values["data"].get("seed", self.recipe.data.seed)
                values["data"]["seed"] = first_seed + cell.seed
        if cell.task is not None:
            values["data"]["tasks"] = [cell.task]
        return build_recipe(values)

    def run_of(self, cell: Cell) -> ResolvedRun:
        """Returns the cell's run; the tasks of equal data sections are read once."""
        recipe = self.recipe_of(cell)
        key = recipe.data.model_dump_json()
        if key not in self._tasks:
            self._tasks[key] = read_tasks(recipe)
        return resolve(recipe, self._tasks[key])

    def folder_of(self, cell: Cell) -> RunFolder:
        output = Path(self.recipe.output)
        # Names of tasks come from data, and must not lead out of the comparison's folder.
        return RunFolder.at(inside(output, output / str(cell)))


def _refuse_repeated(field: str, values: Sequence[Any]) -> None:
    for value in values:
        if values.count(value) > 1:
            problem = f"{value} is listed more than once; list it once"
            raise BaditError(f"compare.{field}: {problem}")

"""The finished cells of a comparison whose runs' folders are gone.

Their entries in results.json count as finished: they are kept, and not trained again.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from badit.comparison.grid import Cell, Grid, order_name
from badit.comparison.results import RESULTS, SINGLE_TASK, finished_cells
from badit.recipe.loading import build_recipe
from badit.recipe.saved import differing_keys
from badit.runs.resolved import resolve
from badit.support.errors import BaditError

# Method, seed, order, learning rate, and whether the rate was chosen.
Key = tuple[str, int | None, str | None, float | None, bool]


class FinishedCells:
    """The entries of a comparison's results.json."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._entries: dict[Key, dict[str, Any]] = {}
        for entry in finished_cells(Path(grid.recipe.output)):
            names = ("method", "seed", "order", "learning_rate")
            method, seed, order, rate = (entry.get(name) for name in names)
            key = (str(method), seed, order, rate, entry.get("selected", True))
            self._entries[key] = entry

    def entry(self, cell: Cell, *, selected: bool = True) -> dict[str, Any] | None:
        """Returns the entry of a cell without a folder; None if it has one, or is not finished.

        ``selected``: as the final run of its method, not only as a trial of its learning rate.
        BaditError if the entry was made with another recipe.
        """
        if self._grid.folder_of(cell).path.is_dir():
            return None
        entry = self._entries.get(_key(cell, selected))
        # The joint entry of single-task runs has no recipe.
        if entry is not None and cell.task is None:
            self._refuse_other_recipe(cell, entry)
        return entry

    def validation_loss(self, cell: Cell) -> float | None:
        """Returns the loss of a finished cell of the search; infinity if it was not finite."""
        entry = self.entry(cell, selected=False)
        # Without compare.search, the final run of the chosen rate is also its trial.
        if entry is None and not cell.is_search:
            entry = self.entry(cell)
        if entry is None:
            return None
        loss = entry.get("validation_loss")
        return math.inf if loss is None else loss

    def refuse_others(self, cells: Iterable[Cell]) -> None:
        """Raises BaditError for entries of no cell, which a comparison would remove."""
        output = Path(self._grid.recipe.output)
        keys = {_key(cell, selected) for cell in cells for selected in (True, False)}
        for key in self._entries.keys() - keys:
            if not (output / key[0].removesuffix(SINGLE_TASK)).is_dir():
                self._refuse("has results without their runs")

    def _refuse_other_recipe(self, cell: Cell, entry: dict[str, Any]) -> None:
        if not entry.get("config"):
            self._refuse("has results without their runs")
        run = self._grid.run_of(cell)
        # The entry may have been written before the method's defaults were filled in.
        saved = resolve(build_recipe({**entry["config"], "output": run.recipe.output}), run.tasks)
        keys = differing_keys(
            saved.recipe.model_dump(mode="json", exclude={"compare"}),
            run.recipe.model_dump(mode="json", exclude={"compare"}),
        )
        if keys:
            names = ", ".join(keys[:5])
            self._refuse(f"{cell} was made with another recipe (it differs in {names})")

    def _refuse(self, problem: str) -> NoReturn:
        file = Path(self._grid.recipe.output) / RESULTS
        fix = "choose another output=FOLDER, or move the file"
        raise BaditError(f"{file}: {problem}; {fix}")


def _key(cell: Cell, selected: bool) -> Key:
    method = cell.method if cell.task is None else cell.method + SINGLE_TASK
    order = None if cell.order is None else order_name(cell.order)
    # A run of the search with compare.search is a trial only.
    is_final = selected and not cell.is_search
    return method, cell.seed, order, cell.learning_rate, is_final

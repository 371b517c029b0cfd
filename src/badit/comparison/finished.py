"""The finished cells of a comparison whose runs' folders are gone.

Their entries in results.json count as finished: they are kept, and not trained again.
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from badit.comparison.grid import Cell, Grid, order_name
from badit.comparison.results import RESULTS, SINGLE_TASK, finished_cells
from badit.presets import saved_section
from badit.recipe.saved import differing_keys, saved_recipe
from badit.runs.fingerprints import differing_inputs
from badit.runs.resolved import ResolvedRun, resolve
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
        """
        if self._grid.folder_of(cell).path.is_dir():
            return None
        return self._entries.get(_key(cell, selected))

    def entries_of(self, cell: Cell) -> list[dict[str, Any]]:
        """Returns the entries of a cell, as a final run and as a trial."""
        kinds = [True, False]
        # With compare.search, trials are runs of their own.
        if self._grid.section.search is not None:
            kinds = [not cell.is_search]
        entries = (self.entry(cell, selected=selected) for selected in kinds)
        return [entry for entry in entries if entry is not None]

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
            # In the method's folder, a recipe with these cells would find their results again.
            if not (output / key[0].removesuffix(SINGLE_TASK)).is_dir():
                self._refuse("has results without their runs")

    def refuse_changed(self, run: ResolvedRun, fingerprints: Mapping[str, str], cell: Cell) -> None:
        """Raises BaditError for an entry of a cell that has another recipe or other data."""
        # The joint entry of single-task runs has no recipe, and the data of only one task.
        if cell.task is not None:
            return
        for entry in self.entries_of(cell):
            if not entry.get("config"):
                self._refuse("has results without their runs")
            # It may have been written before the method's defaults were filled in.
            config = dict(entry["config"])
            config["method"] = saved_section(config.get("method", {}))
            config = saved_recipe({**config, "output": run.recipe.output})
            keys = differing_keys(
                resolve(config, run.tasks).recipe.model_dump(mode="json", exclude={"compare"}),
                run.recipe.model_dump(mode="json", exclude={"compare"}),
            )
            if keys:
                names = ", ".join(keys[:5])
                self._refuse(f"{cell} was made with another recipe (it differs in {names})")
            environment = entry.get("environment") or {}
            changed = differing_inputs(environment.get("inputs") or {}, fingerprints)
            if changed:
                self._refuse(f"{cell} was made with other data ({', '.join(changed[:5])})")

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

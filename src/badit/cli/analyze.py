"""``badit analyze``."""

from pathlib import Path
from typing import Any

from badit.api import analyze
from badit.cli.app import load, refuse_missing_data, write_report_if_possible
from badit.cli.derived import derive
from badit.runs.folder import refuse_unanalyzable


def _shown(target: str, tables: Any, options: dict[str, Any]) -> str:
    # A run or a comparison has one of these; else the target is a base model.
    names = ("config.yaml", "results.json")
    is_folder = any((Path(target) / name).is_file() for name in names)
    # The folder that analyze() has written to.
    folder = Path(options.get("output") or (target if is_folder else "runs/analysis"))
    runs: list[str | Path] = [folder]
    # If the tables are elsewhere, the report also gets the target, which has scores and losses.
    if is_folder and not folder.samefile(target):
        runs = [target, folder]
    report = write_report_if_possible(runs, folder / "report.html")
    verdict = shown_verdict(tables, folder, Path(target) if is_folder else folder)
    return f"{verdict}Tables: {folder / 'analysis'}\n{report}"


def shown_verdict(tables: Any, folder: Path, with_recipe: Path) -> str:
    """Returns which pairs of tasks conflict and the next command; empty for a comparison.

    ``folder`` has the tables, ``with_recipe`` the recipe of the run or of the base model's
    analysis.
    """
    if "gradient_overall" not in tables:
        return ""
    module = load("badit.analysis.verdict")
    run = load("badit.runs.folder").RunFolder.at(with_recipe)
    config = {}
    if run.config_path.is_file():
        config = load("badit.recipe.loading").read_values(run.config_path)
    verdict = module.conflict_verdict(
        tables["gradient_overall"], tables.get("gradient_tasks"), module.measured_in(folder, config)
    )
    if verdict is None:
        return ""
    lines = [*verdict.sentences, "", f"{verdict.purpose}:", f"  {verdict.command}"]
    return "\n".join(lines) + "\n\n"


def _refuse(target: str, options: dict[str, Any]) -> None:
    data = options.get("data")
    refuse_unanalyzable(target, data)
    if data is not None:
        refuse_missing_data(data)


derive(analyze, _shown, "badit.analysis", _refuse)

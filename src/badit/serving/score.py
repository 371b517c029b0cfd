"""What a fixed mixture costs: the run's own answers, routed, against those of its export."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

from peft import PeftModel

from badit.errors import BaditError
from badit.evaluate import evaluate, score_model
from badit.files import read_json, write_json
from badit.models import load_base_model
from badit.runs import RunFolder
from badit.serving.export import Export
from badit.serving.files import SCORES
from badit.training.plan import base_model, device, make_plan, model_dtype


def score_export(run: str | Path, exported: Export, *, progress: bool = True) -> dict[str, Any]:
    """Scores an export as other tools load it, beside its run, and writes ``scores.json`` into its folder.

    The run's scores are those in its folder, or are made. A mixture of one task is scored on that task alone.

    Returns:
        ``tasks``: by name, Rouge-L ``routed``, ``frozen`` and their ``difference``; and the three ``mean``s.

    Raises:
        BaditError: no such run, or an export that cannot be loaded.
    """
    folder = RunFolder.existing(run)
    recipe = folder.recipe()
    split = recipe.evaluation.split
    routed = read_json(folder.scores) if folder.scores.is_file() else evaluate(run, progress=progress)
    tasks = [task for task in make_plan(recipe).tasks if exported.task in (None, task.name)]
    frozen, _ = score_model(*_loaded(exported, recipe), recipe, tasks, split, progress=progress)
    by_task = {
        name: _compared(routed["tasks"][name]["rouge_l"], scores["rouge_l"]) for name, scores in frozen["tasks"].items()
    }
    mean = {key: fmean(entry[key] for entry in by_task.values()) for key in ("routed", "frozen", "difference")}
    result = {"metric": "rouge_l", "split": split, "mixture": exported.mixture, "tasks": by_task, "mean": mean}
    write_json(exported.folder / SCORES, result)
    return result


def _compared(routed: float, frozen: float) -> dict[str, float]:
    return {"routed": routed, "frozen": frozen, "difference": frozen - routed}


def _loaded(exported: Export, recipe: Any) -> tuple[Any, Any]:
    if exported.merged:
        model, tokenizer = load_base_model(exported.folder, dtype=model_dtype(recipe))
        return model.to(device()), tokenizer  # pyright: ignore[reportArgumentType] (a device is what it takes)
    base, tokenizer = base_model(recipe)
    try:
        return PeftModel.from_pretrained(base, str(exported.folder)).eval(), tokenizer
    except (OSError, ValueError, RuntimeError) as error:
        raise BaditError(f"{exported.folder}: cannot be loaded ({str(error).splitlines()[0][:200]})") from None

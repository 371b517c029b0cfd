"""The answers of a run: one file per task, one prediction per line."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from pydantic import TypeAdapter

from badit.metrics.answers import Prediction
from badit.support.errors import BaditError, explained
from badit.support.files import inside, read_jsonl, write_text


def write_predictions(folder: Path, predictions: Iterable[Prediction]) -> None:
    """Writes `<task>.jsonl` for each task, one prediction per line, and deletes the files of other tasks."""
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[Path, list[str]] = {}
    for prediction in predictions:
        line = json.dumps(asdict(prediction), ensure_ascii=False)
        files.setdefault(folder / f"{prediction.task}.jsonl", []).append(line + "\n")
    for file, lines in files.items():
        write_text(inside(folder, file), "".join(lines))
    for other in set(folder.glob("*.jsonl")) - files.keys():
        other.unlink()


def read_predictions(folder: str | Path) -> list[Prediction]:
    """Returns the predictions that `write_predictions` wrote to a folder, sorted by task name, then in file order.

    BaditError if there are no such files, or a line is not a prediction.
    """
    predictions, form = [], TypeAdapter(Prediction)
    for file in sorted(Path(folder).glob("[!.]*.jsonl")):
        for number, fields in enumerate(read_jsonl(file), start=1):
            with explained(f"{file}: line {number}", fix="evaluate the run again"):
                predictions.append(form.validate_python(fields))
    if not predictions:
        raise BaditError(f"predictions {folder}: the folder has no .jsonl files; evaluate the run")
    return predictions

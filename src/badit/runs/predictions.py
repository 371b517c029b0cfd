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
    """Writes ``TASK.jsonl`` for each task, and deletes the files of other tasks."""
    folder.mkdir(parents=True, exist_ok=True)
    lines_of_file: dict[Path, list[str]] = {}
    for prediction in predictions:
        file = folder / f"{prediction.task}.jsonl"
        fields = asdict(prediction)
        if prediction.margin is None:  # not preference data
            del fields["margin"]
        line = json.dumps(fields, ensure_ascii=False) + "\n"
        lines_of_file.setdefault(file, []).append(line)

    for file, lines in lines_of_file.items():
        write_text(inside(folder, file), "".join(lines))
    for file in folder.glob("*.jsonl"):
        if file not in lines_of_file:
            file.unlink()


def prediction_files(folder: Path) -> list[Path]:
    """Returns the files of predictions in a folder, sorted; none if it does not exist."""
    # Names of tasks do not begin with a dot, so hidden files are not predictions.
    return sorted(folder.glob("[!.]*.jsonl"))


def read_predictions(folder: str | Path) -> list[Prediction]:
    """Returns the predictions in a folder, sorted by task, then in the order of the file.

    BaditError if there are no such files, or a line is not a prediction.
    """
    form = TypeAdapter(Prediction)
    predictions = []
    for file in prediction_files(Path(folder)):
        for number, fields in enumerate(read_jsonl(file), start=1):
            with explained(f"{file}: line {number}", fix="evaluate the run again"):
                predictions.append(form.validate_python(fields))
    if not predictions:
        raise BaditError(f"predictions {folder}: the folder has no .jsonl files; evaluate the run")
    return predictions

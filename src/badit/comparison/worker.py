"""Runs one cell in a process with its own memory, so that a crash ends only this cell."""

import os
import re
import signal
import subprocess
import sys
import threading
import traceback
from pathlib import Path

from badit.runs.folder import ERROR, LOG, RunFolder
from badit.support.errors import BaditError, explained, first_line
from badit.support.files import exclusive, write_json, write_text

# A progress bar: its name, the percentage, then counts and times.
_BAR = re.compile(r"([^:\r\n]+): +(\d+%)\|[^|\r\n]*\| ([^\r\n]+)")
_QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_MININTERVAL": "5",  # seconds; each update adds a bar to the log
}


def start_cell(
    folder: Path, *, score: bool, threads: int | None, device: int | None
) -> subprocess.Popen[bytes]:
    """Starts the process of a cell, whose folder must hold the recipe.

    After SIGTERM the cell saves its state and ends; after SIGKILL it resumes from its last
    checkpoint. :func:`error_of` explains its exit code.
    """
    with exclusive(folder):  # a cell of a killed comparison may still be saving
        (folder / ERROR).unlink(missing_ok=True)
    # Variables that the user has set take precedence.
    environment = {**_QUIET, **os.environ}
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    if device is not None:
        visible = environment.get("CUDA_VISIBLE_DEVICES")
        # torch counts only visible GPUs, so the index is one in this list.
        chosen = visible.split(",")[device] if visible else str(device)
        environment["CUDA_VISIBLE_DEVICES"] = chosen
    purpose = "score" if score else "search"
    # -P: a file in the current folder must not replace a module of Python or badit.
    command = [sys.executable, "-P", "-m", "badit.comparison.worker", str(folder), purpose]
    with (folder / LOG).open("w", encoding="utf-8") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,  # the cell reads it to detect the end of this process
            stdout=log,
            stderr=log,
            env=environment,
            # Ctrl-C reaches only this process, which then sends the cell a single signal to stop.
            start_new_session=True,
        )


def error_of(folder: Path, code: int) -> str | None:
    """Returns the one-line error of a cell that ended with an exit code; None if it succeeded."""
    if code == 0:
        return None
    error = folder / ERROR
    if not error.is_file():
        write_text(error, f"{_description(code, folder)}\n")
    return error.read_text(encoding="utf-8").strip()


def _description(code: int, folder: Path) -> str:
    """Describes the end of a process that wrote no error."""
    if code >= 0:
        return f"ended with exit code {code}; see {folder / LOG}"
    name = signal.Signals(-code).name
    # Linux ends processes by SIGKILL if memory runs out.
    hint = " (out of memory?)" if code == -signal.SIGKILL else ""
    return f"killed by {name}{hint}"


def progress_of(folder: Path) -> str:
    """Returns the last progress bar in a cell's log, without the bar itself."""
    log = folder / LOG
    if not log.is_file():
        return "starting"
    bars = _BAR.findall(log.read_text(encoding="utf-8", errors="replace"))
    return " ".join(bars[-1]) if bars else "starting"


def main() -> int:
    """``python -m badit.comparison.worker FOLDER score|search``.

    The cell stops when its standard input is closed.
    """
    threading.Thread(target=_stop_at_end_of_input, daemon=True).start()
    return run_cell(Path(sys.argv[1]), score=sys.argv[2] == "score")


def _stop_at_end_of_input() -> None:
    # A killed comparison cannot send a signal, but its end of the pipe closes.
    os.read(sys.stdin.fileno(), 1)  # nothing is ever written to the pipe
    os.kill(os.getpid(), signal.SIGTERM)


def run_cell(folder: Path, *, score: bool) -> int:
    """Runs a cell and returns the exit code of the process.

    An error is written to ``error.txt`` in the folder.
    """
    try:
        with explained(folder), exclusive(folder):
            _run(folder, score)
    except KeyboardInterrupt:
        return 130  # 128 + SIGINT, as in a shell
    except Exception as error:
        # The log has the whole traceback, the comparison shows one line.
        traceback.print_exc()
        message = str(error)
        if not isinstance(error, BaditError):
            message = f"{type(error).__name__}: {first_line(error)}"
        write_text(folder / ERROR, f"{message}\n")
        return 1
    return 0


def _run(folder: Path, score: bool) -> None:
    # Imported here, so that a failing import is an error of the cell.
    from badit.evaluation.losses import validation_loss
    from badit.evaluation.scoring import train_and_score
    from badit.metrics.answers import instance_scores
    from badit.runs.predictions import read_predictions
    from badit.runs.resolved import resolve
    from badit.training.fit import fit

    run = resolve(RunFolder(folder).recipe)
    if score:
        train_and_score(run)
        scores = instance_scores(read_predictions(run.folder.predictions_path))
        write_json(run.folder.instances_path, scores)
    else:
        fit(run)
        validation_loss(run)


if __name__ == "__main__":
    sys.exit(main())

"""Runs one cell in a separate process with its own memory, so that a crash ends only this cell."""

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

_BAR = re.compile(
    r"([^:\r\n]+): +(\d+%)\|[^|\r\n]*\| ([^\r\n]+)"
)  # name, percentage, counts and times


def start_cell(
    folder: Path, *, score: bool, threads: int | None, device: int | None
) -> subprocess.Popen[bytes]:
    """Starts the process of a cell, whose folder must hold the recipe. :func:`error_of` explains its exit code.

    After SIGTERM the cell saves its state and ends; after SIGKILL it resumes from its last checkpoint.
    """
    with exclusive(folder):  # a cell of a killed comparison may still be saving
        (folder / ERROR).unlink(missing_ok=True)
    quiet = {
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_MININTERVAL": "5",
    }
    env = {**quiet, **os.environ}
    if threads is not None:
        env["OMP_NUM_THREADS"] = str(threads)
    if device is not None:
        visible = env.get("CUDA_VISIBLE_DEVICES")
        env["CUDA_VISIBLE_DEVICES"] = visible.split(",")[device] if visible else str(device)
    command = [
        sys.executable,
        "-P",
        "-m",
        "badit.comparison.worker",
        str(folder),
        "score" if score else "search",
    ]
    with (folder / LOG).open("w", encoding="utf-8") as log:
        # A new session: Ctrl-C reaches only this process, which then sends the cell a single signal to stop.
        # The cell reads its standard input to detect the end of this process.
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=env, start_new_session=True
        )


def error_of(folder: Path, code: int) -> str | None:
    """Returns the one-line error of a cell that ended with an exit code; None if it succeeded."""
    if code == 0:
        return None
    error = folder / ERROR
    if not error.is_file():
        message = f"ended with exit code {code}; see {folder / LOG}"
        if code < 0:
            hint = " (out of memory?)" if code == -signal.SIGKILL else ""
            message = f"killed by {signal.Signals(-code).name}{hint}"
        write_text(error, message + "\n")
    return error.read_text(encoding="utf-8").strip()


def progress_of(folder: Path) -> str:
    """Returns the last progress bar in a cell's log, without the bar itself."""
    log = folder / LOG
    bars = _BAR.findall(log.read_text(encoding="utf-8", errors="replace")) if log.is_file() else []
    return " ".join(bars[-1]) if bars else "starting"


def main() -> int:
    """``python -m badit.comparison.worker FOLDER score|search``; the cell stops when its standard input is closed."""
    threading.Thread(target=_stop_at_end_of_input, daemon=True).start()
    return run_cell(Path(sys.argv[1]), score=sys.argv[2] == "score")


def _stop_at_end_of_input() -> None:
    """Stops this cell when the pipe from the comparison closes: a killed comparison cannot send a signal."""
    os.read(sys.stdin.fileno(), 1)  # returns when the pipe closes; nothing is written to it
    os.kill(os.getpid(), signal.SIGTERM)


def run_cell(folder: Path, *, score: bool) -> int:
    """Runs a cell and returns the exit code of the process; an error is written to ``error.txt`` in the folder."""
    try:
        from badit.evaluation.losses import validation_loss
        from badit.evaluation.scoring import train_and_score
        from badit.metrics.answers import instance_scores
        from badit.runs.predictions import read_predictions
        from badit.runs.resolved import open_run
        from badit.training.fit import fit

        with explained(folder), exclusive(folder):
            # The recipe comes from the comparison's own process.
            run = open_run(RunFolder(folder, trust_remote_code=True))
            if score:
                train_and_score(run)
                scores = instance_scores(read_predictions(run.folder.predictions_path))
                write_json(run.folder.instances_path, scores)
            else:
                fit(run)
                validation_loss(run)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        traceback.print_exc()
        message = (
            error
            if isinstance(error, BaditError)
            else f"{type(error).__name__}: {first_line(error)}"
        )
        write_text(folder / ERROR, f"{message}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

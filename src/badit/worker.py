"""One cell in a process of its own: its memory is its own, and whatever ends it ends nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import traceback
from pathlib import Path

from badit.errors import BaditError, explained, first_line
from badit.files import exclusive, write_json, write_text
from badit.run import Run

ERROR, LOG = "error.txt", "log.txt"


class CellProcess:
    """A running cell in the folder of a run that has its recipe; ``wait`` says what became of it."""

    def __init__(self, folder: Path, *, score: bool, threads: int | None, device: int | None) -> None:
        (folder / ERROR).unlink(missing_ok=True)
        environment = {"TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false", **os.environ}
        if threads is not None:
            environment["OMP_NUM_THREADS"] = str(threads)
        if device is not None:
            visible = environment.get("CUDA_VISIBLE_DEVICES")
            environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[device] if visible else str(device)
        command = [sys.executable, "-m", "badit.worker", str(folder), "score" if score else "search"]
        self._folder = folder
        self._asked_to_stop = False
        with (folder / LOG).open("a", encoding="utf-8") as log:
            # A session of its own: a Ctrl-C reaches this process alone, which then asks the cell to stop, once.
            # The cell reads its standard input to notice the end of this process.
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment, start_new_session=True
            )

    def stop(self, how: signal.Signals) -> None:
        """With SIGTERM the cell saves its state and ends; after SIGKILL it resumes from its last checkpoint."""
        self._asked_to_stop = True
        self._process.send_signal(how)

    def wait(self) -> str | None:
        """None when the cell has done its work, else what went wrong, in a line."""
        with self._process:
            code = self._process.wait()
        if code == 0:
            return None
        if self._asked_to_stop:
            return "interrupted"
        error = self._folder / ERROR
        if not error.is_file():
            message = f"ended with exit code {code}; see {self._folder / LOG}"
            if code < 0:
                hint = " (out of memory?)" if code == -signal.SIGKILL else ""
                message = f"killed by {signal.Signals(-code).name}{hint}"
            write_text(error, message + "\n")
        return error.read_text(encoding="utf-8").strip()


def main() -> int:
    """``python -m badit.worker FOLDER score|search``; the cell stops at the end of its standard input."""
    threading.Thread(target=_stop_at_end_of, args=(sys.stdin.fileno(),), daemon=True).start()
    return run_cell(Path(sys.argv[1]), score=sys.argv[2] == "score")


def _stop_at_end_of(lifeline: int) -> None:
    """A comparison that is killed, or loses its terminal, cannot ask its cells to stop: so they notice by a pipe."""
    os.read(lifeline, 1)  # nothing is ever written to it
    os.kill(os.getpid(), signal.SIGTERM)


def run_cell(folder: Path, *, score: bool) -> int:
    """Does a cell's work and returns the process's exit code; what went wrong is in the folder's ``error.txt``."""
    try:
        with explained(folder), exclusive(folder):
            _run(folder, score=score)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        traceback.print_exc()
        message = error if isinstance(error, BaditError) else f"{type(error).__name__}: {first_line(error)}"
        write_text(folder / ERROR, f"{message}\n")
        return 1
    return 0


def _run(folder: Path, *, score: bool) -> None:
    from badit.evaluate import read_predictions, train_and_score, validation_loss
    from badit.metrics import group_by_task, instance_scores
    from badit.train import fit

    run = Run(folder)
    if not score:
        validation_loss(fit(run.recipe, progress=False).path, trust_remote_code=run.recipe.model.trust_remote_code)
        return
    train_and_score(run.recipe, progress=False)
    write_json(run.instances_path, instance_scores(group_by_task(read_predictions(run.predictions_path))))


if __name__ == "__main__":
    sys.exit(main())

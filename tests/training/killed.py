"""Runs ``badit`` in a process that sends itself a signal, or fills its disk, at a given event."""

import gc
import json
import os
import resource
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import peft.utils.transformers_weight_conversion  # noqa: F401
import rouge_score.rouge_scorer  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401

import badit.analysis
import badit.evaluation.scoring
import badit.export.exporting  # noqa: F401
from badit.cli import main
from training.trainers import on, with_callbacks

STEP_EVENTS = ("on_step_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end")
EVENTS = (*STEP_EVENTS, "on_log", "on_save", "on_train_end")


class Striker:
    """Counts events and injects a failure at one of them."""

    def __init__(self, order: dict[str, Any]) -> None:
        self.order = order
        self.counts: Counter[str] = Counter()
        self.callbacks = [
            on(event, lambda *args, event=event: self.count(event)) for event in EVENTS
        ]
        sys.addaudithook(self.watch_files)

    def count(self, event: str) -> None:
        self.counts[event] += 1
        if event == self.order["event"] and self.counts[event] == self.order["number"]:
            if self.order["signal"]:
                os.kill(os.getpid(), self.order["signal"])
            else:
                resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, resource.RLIM_INFINITY))

    def watch_files(self, event: str, args: tuple[Any, ...]) -> None:
        opened = (
            event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        )
        changes = ("os.rename", "os.remove", "os.rmdir", "os.mkdir")
        if (opened or event in changes) and self.order["output"] in str(args[0]):
            self.count("file")


def start(
    processes: Any,
    command: list[str],
    output: Path,
    event: str = "",
    number: int = 0,
    sent: int = 0,
) -> Any:
    """Starts a process that runs a command, which writes to the folder ``output``.

    At the ``number``-th ``event`` (a callback event such as on_step_end, or "file": an operation on
    a file in that folder) the process sends itself the signal ``sent``. If ``sent`` is 0, it limits
    the size of files to 2 kB from then on, as on a full disk. A process that exits by itself writes
    the counts of all events to OUTPUT.json.
    """
    order = {
        "command": command,
        "output": str(output),
        "event": event,
        "number": number,
        "signal": sent,
    }
    process = processes.Process(target=run, args=(order,), name=str(output))
    process.start()
    return process


def end(process: Any) -> tuple[int, str]:
    """Waits for a process; returns its exit code and its standard error."""
    process.join()
    return process.exitcode, Path(f"{process.name}.txt").read_text()


def run(order: dict[str, Any]) -> None:
    for stream, path in ((1, os.devnull), (2, f"{order['output']}.txt")):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    striker = Striker(order)
    with with_callbacks(*striker.callbacks):
        code = main(order["command"])
    Path(f"{order['output']}.json").write_text(json.dumps(striker.counts))
    sys.exit(code)


gc.collect()
gc.freeze()  # garbage collection in the forked processes skips the imported modules

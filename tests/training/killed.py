"""Processes of ``badit train`` that end as they are told to: by a signal, or on a full disk.

``python killed.py`` imports everything once, then forks a process for each line of its standard input, a JSON object:

    recipe    the file to train
    output    the run's folder
    counts    a file for the counts of the events, if the process ends by itself
    event     when to strike: a callback's event such as on_step_end, or "file", an operation on a file of the run
    number    at which of these events, counted from 1 (0: never)
    signal    what to send itself there; or 0: from there on no file may grow beyond 2 kB, as on a full disk

It answers each with a line: the exit status, negative for a signal, and the process's standard error.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import peft.utils.transformers_weight_conversion  # noqa: F401
import rouge_score.rouge_scorer  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401
from transformers import TrainerCallback

import badit.evaluate  # noqa: F401 (imported, as are those above, so that the forked processes need not)
from badit.cli import main
from badit.methods import AdapterMethod
from training.trainers import on

STEP_EVENTS = ("on_step_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end")
EVENTS = (*STEP_EVENTS, "on_log", "on_save", "on_train_end")


class Striker:
    """Counts events and strikes at one of them."""

    def __init__(self, order: dict[str, Any]) -> None:
        self.order = order
        self.counts: Counter[str] = Counter()
        self.callbacks = [on(event, lambda *args, event=event: self.count(event)) for event in EVENTS]
        sys.addaudithook(self.watch_files)

    def count(self, event: str) -> None:
        self.counts[event] += 1
        if event == self.order["event"] and self.counts[event] == self.order["number"]:
            if self.order["signal"]:
                os.kill(os.getpid(), self.order["signal"])
            else:
                resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, resource.RLIM_INFINITY))

    def watch_files(self, event: str, args: tuple[Any, ...]) -> None:
        opened = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        changes = ("os.rename", "os.remove", "os.rmdir", "os.mkdir")
        if (opened or event in changes) and self.order["output"] in str(args[0]):
            self.count("file")


def train(order: dict[str, Any]) -> int:
    striker, own = Striker(order), AdapterMethod.callbacks

    def callbacks(self: AdapterMethod, run: Any) -> list[TrainerCallback]:
        return [*own(self, run), *striker.callbacks]

    AdapterMethod.callbacks = callbacks  # pyright: ignore
    code = main(["train", order["recipe"], f"output={order['output']}"])
    Path(order["counts"]).write_text(json.dumps(striker.counts))
    return code


def serve() -> None:
    gc.collect()
    gc.freeze()  # so that the forked processes' collections skip the imported modules
    for line in sys.stdin:
        with tempfile.TemporaryFile("w+") as errors:
            child = os.fork()
            if child == 0:
                os.dup2(errors.fileno(), 2)
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                os._exit(train(json.loads(line)))
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            errors.seek(0)
            print(json.dumps({"status": status, "errors": errors.read()}), flush=True)


if __name__ == "__main__":
    serve()

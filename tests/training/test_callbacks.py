"""Stopping on a signal loses no step, and the log and the bar do what they say."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from transformers import TrainerState

from badit.trainer import MetricsLog, StopOnSignal


def test_a_second_signal_stops_at_once() -> None:
    reached: list[int] = []

    def signal_thrice() -> None:
        for number in range(3):
            os.kill(os.getpid(), signal.SIGINT)
            reached.append(number)

    with pytest.raises(KeyboardInterrupt), StopOnSignal():
        signal_thrice()
    assert reached == [0]


def test_a_signal_after_the_last_step_stops_too_and_the_handlers_are_put_back() -> None:
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), StopOnSignal():
        os.kill(os.getpid(), signal.SIGTERM)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


def test_the_metrics_log_drops_what_a_resumed_run_logs_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 5, "loss": 2}\n{"step": 10, "loss": 1}\n{"step": 1')
    log, state = MetricsLog(path), TrainerState(global_step=5)
    log.on_train_begin(None, state, None)
    state.global_step = 6
    log.on_log(None, state, None, logs={"loss": 1.5})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 5, "loss": 2},
        {"step": 6, "loss": 1.5},
    ]

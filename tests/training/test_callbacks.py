"""Stopping on a signal loses no step, and the log and the bar do what they say."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainerState

from badit.methods import AdapterMethod
from badit.recipe import build_recipe
from badit.trainer import MetricsLog, StopOnSignal
from badit.training.scoring import train_and_score as train


class SignalAt(TrainerCallback):
    def __init__(self, step: int, number: signal.Signals) -> None:
        self.step, self.number = step, number

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_step_it_came_in(
    recipe_values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    expected = train(build_recipe({**recipe_values, "output": str(tmp_path / "whole")}), progress=False)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    recipe = build_recipe(recipe_values)
    with monkeypatch.context() as patch:
        callbacks = AdapterMethod.callbacks
        patch.setattr(AdapterMethod, "callbacks", lambda self, run: [*callbacks(self, run), SignalAt(7, number)])
        with pytest.raises(KeyboardInterrupt):
            train(recipe, progress=False)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-7" / "badit_regroup.safetensors").is_file()

    assert train(recipe, progress=False) == expected
    adapters = [load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "run")]
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])
    logs = [(tmp_path / name / "regroupings.jsonl").read_text() for name in ("whole", "run")]
    assert logs[0] == logs[1]


def test_a_second_signal_stops_at_once() -> None:
    reached: list[int] = []

    def signal_thrice() -> None:
        for number in range(3):
            os.kill(os.getpid(), signal.SIGINT)
            reached.append(number)

    with pytest.raises(KeyboardInterrupt), StopOnSignal():
        signal_thrice()
    assert reached == [0]


def test_a_signal_after_the_last_step_stops_too() -> None:
    with pytest.raises(KeyboardInterrupt), StopOnSignal():
        os.kill(os.getpid(), signal.SIGTERM)


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

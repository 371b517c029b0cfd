"""What a run adds to HF's Trainer: its metrics file, one progress bar, and a stop that loses nothing."""

from __future__ import annotations

import math
import signal
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback

from badit.files import StepLog
from badit.training.ranks import any_of_all
from badit.tuner import hooks_of


class MetricsLog(TrainerCallback):
    """Appends the trainer's log lines to a file, less those that a resumed run is about to log again.

    Times and rates are left out, and so is the closing line: they tell of this process, and a resumed run has had
    several. environment.json has the training's. So are a regrouping's, of which regroupings.jsonl has more.
    """

    def __init__(self, path: Path) -> None:
        self._log = StepLog(path)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._log.rewind(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs and "loss" in logs:
            # The gradient's norm is infinite in a step that is skipped, which JSON has no number for.
            kept = {
                key: value
                for key, value in logs.items()
                if math.isfinite(value)
                and not key.endswith(("_runtime", "_per_second"))
                and not key.startswith("regroup/")
            }
            self._log.append({"step": state.global_step, **kept})


class ProgressBar(TrainerCallback):
    """One bar with the time left and the latest loss."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            total = state.max_steps
            self._bar = tqdm(total=total, initial=state.global_step, desc="Training", unit="step", dynamic_ncols=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update()

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        if self._bar is not None and logs and "loss" in logs:
            self._bar.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Ends the bar's line, for what is written after it."""
        if self._bar is not None:
            self._bar.close()


class ProjectUpdates(TrainerCallback):
    """Lets a method with frozen branches keep the optimizer's updates out of what earlier tasks have used."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        hooks_of(kwargs["model"]).before_update()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        hooks_of(kwargs["model"]).after_update()


class StopOnSignal(TrainerCallback):
    """On Ctrl-C or SIGTERM: finishes the step, saves a checkpoint, then stops. A second signal stops at once.

    It must be the last callback, so that the others' state is in the checkpoint by the time it stops. Of several
    processes all stop at the same step, whichever was told to.
    """

    _SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self._asked = self._stopping = False
        self._former: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        try:
            self._former = {number: signal.signal(number, self._handle) for number in self._SIGNALS}
        except ValueError:  # only the main thread may set handlers; elsewhere a caller has its own way to stop
            self._former = {}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        if self._asked and error[0] is None:  # too late for a checkpoint of its own: the last step's is there
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stopping = any_of_all(self._asked)
        if self._stopping:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._stopping:
            raise KeyboardInterrupt

"""How orthogonal the experts of a mixture stay while it trains (paper, Fig. 4), for methods that do not regroup.

A regrouping logs these angles itself; without one they would only be known of BADIT. Both take them on the cosine Gram
of the components' gradients, averaged over a window of steps, so that their curves can be laid side by side.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from badit.files import StepLog
from badit.method import expert_angles
from badit.training.checkpoints import resumed_checkpoint
from badit.training.gradients import before_step, component_grams
from badit.training.regroup_state import ANGLES_FILE, Window, load_state, mean_grams, save_state
from badit.training.regrouper import trainable_adapters
from badit.tuner.base_layer import ExpertLayer


class AngleLog(TrainerCallback):
    """Writes a line for every layer and window: step, module, window_steps, and the angles of
    :class:`badit.method.grouping.ExpertAngles`.

    It leaves out layers with one expert, and those whose experts share their A and so have no components of their own.
    Its sums are in the checkpoints, so that a resumed run logs what it would have logged otherwise.

    Args:
        path: the log.
        every: optimizer steps in a window.
    """

    def __init__(self, path: Path, every: int = 20) -> None:
        self.every = every
        self._log = StepLog(path)
        self._layers: dict[str, tuple[ExpertLayer, str]] = {}
        self._windows: dict[str, Window] = {}
        self._reads_in_engine = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        found = trainable_adapters(kwargs["model"], ExpertLayer)
        self._layers = {name: place for name, place in found if _is_mixture(*place)}
        self._windows = {name: Window() for name in self._layers}
        if self._layers and state.global_step:
            self._windows = load_state(resumed_checkpoint(args, state) / ANGLES_FILE, self._windows)
        if self._layers and state.is_world_process_zero:
            self._log.rewind(state.global_step)
        self._reads_in_engine = before_step(kwargs.get("optimizer"), self._read_gradients)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._reads_in_engine:
            self._read_gradients()

    def _read_gradients(self) -> None:
        places = self._layers.values()
        grams = component_grams([(layer.badit_A[adapter], layer.badit_B[adapter]) for layer, adapter in places])
        for window, gram_NN in zip(self._windows.values(), grams, strict=True):
            if gram_NN is not None:
                window.add(gram_NN, None)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            if state.is_world_process_zero:  # all processes have the same sums, and one of them writes
                self._write(state.global_step)
            for window in self._windows.values():
                window.restart()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._layers:
            path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / ANGLES_FILE
            save_state(path, self._windows, write=args.should_save)

    def _write(self, step: int) -> None:
        for name, gram_NN in mean_grams(self._windows).items():
            layer, adapter = self._layers[name]
            angles = expert_angles(gram_NN, layer.expert_of(adapter).cpu().numpy())
            line = {"step": step, "module": name, "window_steps": self._windows[name].steps, **angles.defined()}
            self._log.append(line)


def _is_mixture(layer: ExpertLayer, adapter: str) -> bool:
    config = layer.badit_config[adapter]
    return config.num_experts > 1 and config.experts_own_components

"""How orthogonal the experts of a mixture stay while it trains (paper, Fig. 4), for methods that do not regroup.

A regrouping logs these angles itself; without one they would only be known of BADIT. Both take them on the cosine Gram
of the components' gradients, averaged over a window of steps, so that their curves can be laid side by side.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from badit.method import cosine_gram, expert_angles
from badit.peft.base_layer import ExpertLayer
from badit.runs import StepLog
from badit.training.regroup import trainable_adapters


class AngleLog(TrainerCallback):
    """Writes a line for every layer and window: step, module, window_steps, and the angles of
    :class:`badit.method.grouping.ExpertAngles`.

    It leaves out layers with one expert, and those whose experts share their A and so have no components of their own.
    The window that a run is stopped in is lost: the resumed run's first line covers the steps since then.

    Args:
        path: the log.
        every: optimizer steps in a window.
    """

    def __init__(self, path: Path, every: int = 20) -> None:
        self.every = every
        self._log = StepLog(path)
        self._layers: dict[str, tuple[ExpertLayer, str]] = {}
        self._sums: dict[str, torch.Tensor] = {}
        self._steps = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # All ranks see the same reduced gradients, and one of them writes.
        found = trainable_adapters(kwargs["model"], ExpertLayer) if state.is_world_process_zero else ()
        self._layers = {name: place for name, place in found if _is_mixture(*place)}
        self._restart()
        if self._layers:
            self._log.rewind(state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name, (layer, adapter) in self._layers.items():
            grad_A, grad_B = layer.badit_A[adapter].grad, layer.badit_B[adapter].grad
            if grad_A is not None and grad_B is not None:
                self._sums[name] = cosine_gram(grad_A, grad_B) + self._sums.get(name, 0)
        self._steps += 1

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._write(state.global_step)
            self._restart()

    def _write(self, step: int) -> None:
        for name, sum_NN in self._sums.items():
            layer, adapter = self._layers[name]
            angles = expert_angles((sum_NN / self._steps).cpu().numpy(), layer.expert_of(adapter).cpu().numpy())
            self._log.append({"step": step, "module": name, "window_steps": self._steps, **angles.defined()})

    def _restart(self) -> None:
        self._sums, self._steps = {}, 0


def _is_mixture(layer: ExpertLayer, adapter: str) -> bool:
    config = layer.badit_config[adapter]
    return config.num_experts > 1 and config.experts_own_components

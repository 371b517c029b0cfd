"""How orthogonal the experts of a mixture stay while it trains (paper, Fig. 4), for methods that do not regroup.

A regrouping logs these angles itself; without one they would only be known of BADIT. Both take them on the cosine Gram
of the components' gradients, averaged over a window of steps, so that their curves can be laid side by side.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from badit.method import cosine_gram, expert_angles
from badit.peft.base_layer import ExpertLayer
from badit.runs import StepLog


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
        self._layers = dict(_trained_mixtures(kwargs["model"]))
        self._restart()
        if self._layers and state.is_world_process_zero:
            self._log.rewind(state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name, (layer, adapter) in self._layers.items():
            grad_A, grad_B = layer.badit_A[adapter].grad, layer.badit_B[adapter].grad
            if grad_A is not None and grad_B is not None:
                self._sums[name] = cosine_gram(grad_A, grad_B) + self._sums.get(name, 0)
        self._steps += 1

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            if state.is_world_process_zero:
                self._write(state.global_step)
            self._restart()

    def _write(self, step: int) -> None:
        for name, sum_NN in self._sums.items():
            layer, adapter = self._layers[name]
            angles = expert_angles((sum_NN / self._steps).cpu().numpy(), layer.expert_of(adapter).cpu().numpy())
            numbers = {key: value if math.isfinite(value) else None for key, value in angles._asdict().items()}
            self._log.append({"step": step, "module": name, "window_steps": self._steps, **numbers})

    def _restart(self) -> None:
        self._sums, self._steps = {}, 0


def _trained_mixtures(model: torch.nn.Module) -> Iterator[tuple[str, tuple[ExpertLayer, str]]]:
    for module in model.modules():
        if not isinstance(module, ExpertLayer):
            continue
        for adapter in module.badit_A:
            config = module.badit_config[adapter]
            mixture = config.num_experts > 1 and config.rows_of_A == config.num_components
            if mixture and module.badit_A[adapter].requires_grad:
                yield f"{module.name}.{adapter}", (module, adapter)

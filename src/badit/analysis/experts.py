"""The experts of a loaded model: its adapted layers, and the gates that they use.

Shape suffixes: B = rows, T = positions, K = experts.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from badit.support.errors import BaditError
from badit.tuner.layer import ExpertLinear


class Experts(NamedTuple):
    """An adapted layer and an active adapter of it."""

    layer: ExpertLinear
    adapter: str

    @property
    def number(self) -> int:
        return self.layer.badit_config[self.adapter].num_experts


#: Gets a layer's experts and its gates (B, 1 or T, K), and returns the gates to use instead.
GateChange = Callable[[Experts, torch.Tensor], torch.Tensor]


def adapted_layers(model: nn.Module) -> list[Experts]:
    """Returns the layers of all active adapters in model order.

    Adapters with a single expert are included.
    """
    layers = (module for module in model.modules() if isinstance(module, ExpertLinear))
    return [Experts(layer, adapter) for layer in layers for adapter in layer.running_adapters]


def active_experts(model: nn.Module) -> list[Experts]:
    """Returns the layers of the active adapter with several experts.

    BaditError if several such adapters are active.
    """
    layers = [experts for experts in adapted_layers(model) if experts.number > 1]
    if len({experts.adapter for experts in layers}) > 1:
        fix = "activate only one with model.set_adapter(NAME)"
        raise BaditError(f"model: several adapters are active; {fix}")
    return layers


@contextmanager
def changed_gates(layers: Sequence[Experts], change: GateChange) -> Iterator[None]:
    """A context in which every layer of a loaded model uses the gates that ``change`` returns.

    All that reads or fixes the gates of a forward pass goes through it: measured gates, disabled
    experts, and gates set by hand. The layers have their own gates again afterwards, also after an
    error. One thread at a time may use a model in it.
    """

    def gates(experts: Experts, compute: Callable, adapter: str, x: torch.Tensor) -> torch.Tensor:
        return change(experts, compute(adapter, x))

    try:
        for experts in layers:
            # The attribute of the instance hides the method of its class.
            vars(experts.layer)["gates"] = partial(gates, experts, experts.layer.gates)
        yield
    finally:
        for experts in layers:
            vars(experts.layer).pop("gates", None)

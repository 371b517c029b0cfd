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


class AdaptedLayer(NamedTuple):
    """An adapted layer and an active adapter of it."""

    layer: ExpertLinear
    adapter: str

    @property
    def num_experts(self) -> int:
        """The number of gates: experts, and experts of tasks that were added later."""
        return self.layer.badit_config[self.adapter].num_gates


#: Gets a layer's experts and its gates (B, 1 or T, K), and returns the gates to use instead.
GateChange = Callable[[AdaptedLayer, torch.Tensor], torch.Tensor]


def adapted_layers(model: nn.Module) -> list[AdaptedLayer]:
    """Returns the layers of all active adapters in model order.

    Adapters with a single expert are included.
    """
    layers = (module for module in model.modules() if isinstance(module, ExpertLinear))
    return [AdaptedLayer(layer, adapter) for layer in layers for adapter in layer.running_adapters]


def active_experts(model: nn.Module) -> list[AdaptedLayer]:
    """Returns the layers of the active adapter with several experts.

    BaditError if several such adapters are active.
    """
    layers = [adapted for adapted in adapted_layers(model) if adapted.num_experts > 1]
    # Measurements are per layer, and expert k of two adapters would be counted as one.
    if len({adapted.adapter for adapted in layers}) > 1:
        fix = "activate only one with model.set_adapter(NAME)"
        raise BaditError(f"model: several adapters are active; {fix}")
    return layers


@contextmanager
def changed_gates(layers: Sequence[AdaptedLayer], change: GateChange) -> Iterator[None]:
    """A context in which every layer of a loaded model uses the gates that ``change`` returns.

    All that reads or fixes the gates of a forward pass goes through it: measured gates, disabled
    experts, and gates set by hand. Contexts can be nested: an inner ``change`` gets the gates of
    the outer one. Afterwards the layers have their earlier gates again, also after an error. One
    thread at a time may use the model while gates are changed.
    """

    def gates(
        adapted: AdaptedLayer, compute: Callable, adapter: str, x: torch.Tensor
    ) -> torch.Tensor:
        gates_of_adapter = compute(adapter, x)
        # The layer computes the gates of its other active adapters with the same method.
        if adapter != adapted.adapter:
            return gates_of_adapter
        return change(adapted, gates_of_adapter)

    # Changes of an enclosing context; None if the layer has only its class's method.
    outer_gates = {adapted.layer: vars(adapted.layer).get("gates") for adapted in layers}
    try:
        for adapted in layers:
            # The attribute of the instance hides the method of its class.
            vars(adapted.layer)["gates"] = partial(gates, adapted, adapted.layer.gates)
        yield
    finally:
        for layer, outer in outer_gates.items():
            vars(layer).pop("gates", None)
            if outer is not None:
                vars(layer)["gates"] = outer

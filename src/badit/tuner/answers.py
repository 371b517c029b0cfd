"""Logits of the answer's positions only, which saves most of the output layer's work."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from badit.tuner.prompt import IGNORED_LABEL


def has_output_layer(model: nn.Module) -> bool:
    """Returns whether a model predicts tokens, so that labels are of the next token."""
    output_layer: Any = getattr(model, "get_output_embeddings", lambda: None)
    return output_layer() is not None


class AnswerLogits(NamedTuple):
    """The logits of the L labelled positions of a batch."""

    logits_LV: Tensor
    target_L: Tensor  # the labels
    row_L: Tensor  # their rows in the batch
    outputs: Any  # of the model, with logits (1, L, V)


def answer_logits(model: Any, batch: Mapping[str, Any], labels_BT: Tensor) -> AnswerLogits:
    """Calls a model, which may be wrapped for data parallelism, on a batch without its labels."""
    targets_BT = labels_BT[:, 1:]  # the logits of a position are those of the next token
    # The number of labels determines shapes, so this synchronises with the GPU, once: all later
    # code uses the indices.
    row_L, position_L = (targets_BT != IGNORED_LABEL).nonzero(as_tuple=True)

    def select(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][row_L, position_L][None], *args[1:])

    # The output layer gets only the labels' positions, as one row (1, L, hidden). Later operations
    # on the logits (soft-capping, scaling) act on each position separately.
    unwrapped: Any = getattr(model, "module", model)  # inside a data-parallel wrapper
    with unwrapped.get_output_embeddings().register_forward_pre_hook(select):
        outputs = model(**batch)
    return AnswerLogits(outputs.logits[0], targets_BT[row_L, position_L], row_L, outputs)

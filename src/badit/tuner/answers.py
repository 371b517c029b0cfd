"""Logits of the answer's positions only, which saves most of the output layer's work."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from badit.tuner.prompt import IGNORED_LABEL


def predicts_next_token(model: nn.Module) -> bool:
    """Returns whether a model's labels are next tokens, unlike those of a classifier.

    The labels of a masked language model are those of the same positions.
    """
    output_layer: Any = getattr(model, "get_output_embeddings", lambda: None)
    return output_layer() is not None and not type(model).__name__.endswith("ForMaskedLM")


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
        states_BTI = args[0]  # maybe on another device than the labels, if layers are on several
        labelled = (row_L.to(states_BTI.device), position_L.to(states_BTI.device))
        return (states_BTI[labelled][None], *args[1:])

    # The output layer gets only the labels' positions, as one row (1, L, hidden). Later operations
    # on the logits (soft-capping, scaling) act on each position separately.
    unwrapped: Any = getattr(model, "module", model)  # inside a data-parallel wrapper
    with unwrapped.get_output_embeddings().register_forward_pre_hook(select):
        outputs = model(**batch)
    return AnswerLogits(outputs.logits[0], targets_BT[row_L, position_L], row_L, outputs)

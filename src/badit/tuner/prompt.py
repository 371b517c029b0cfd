"""Where the prompt is in a batch, and the gates that a cache keeps for it.

The prompt of each row is, in this order of precedence:

* ``prompt_mask=`` passed to the model's forward.
* A filled cache (decoding): none, because the gates were computed when it was filled. They are
  stored *on the cache object*, so generations can be interleaved, and a copied prompt cache keeps
  its gates.
* Labels (training, scoring): the attended positions before the first label, also in a chat with
  several answers. With one row per answer (:func:`badit.data.answer_rows`), the prompts of training
  and generation are the same.
* No labels (plain forward, prefill): every attended position.

In packed rows (position ids that restart at 0, or ``cu_seq_lens_q``), each segment is a prompt with
its answer.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from badit.support.errors import BaditError

IGNORED_LABEL = -100
HELD = "badit_gates"  # the attribute of a cache that has the gates of its prompt, by layer
# The names of an output's cache, of releases of transformers 5. An output may have two of them.
_CACHE_NAMES = ("cache", "past_key_values", "cache_params")


class Segments(NamedTuple):
    """The segments of packed rows, each a prompt with its answer."""

    of_BT: Tensor  # their numbers, from 0 in the batch
    number: int

    @classmethod
    def rows(cls, like_BT: Tensor) -> "Segments":
        """Returns the segments of rows that are not packed: one for each row."""
        rows = len(like_BT)
        of_B1 = torch.arange(rows, device=like_BT.device)[:, None]
        return cls(of_B1.expand(like_BT.shape), rows)


def before_first_label(
    labels_BT: Tensor, attended_BT: Tensor, segments: Segments | None = None
) -> Tensor:
    """Returns the prompt of each row, or of each segment.

    It is the attended positions before the first predicted label.
    """
    # No position predicts the label of the first token.
    labelled_BT = (labels_BT != IGNORED_LABEL) & (attended_BT.cumsum(dim=1) > 1)
    if segments is None:
        return attended_BT.bool() & (labelled_BT.cumsum(dim=1) == 0)

    of_P = segments.of_BT.flatten()
    labelled_P = labelled_BT.flatten()
    labelled_P[1:] &= of_P[1:] == of_P[:-1]
    labels_S = labelled_P.new_zeros(segments.number, dtype=torch.long)
    labels_S = labels_S.index_add(0, of_P, labelled_P.long())
    before_S = labels_S.cumsum(dim=0) - labels_S
    # A segment without labels is padding, unless none has any.
    is_prompt_S = (labels_S > 0) | ~labelled_P.any()
    prompt_P = (labelled_P.cumsum(dim=0) == before_S[of_P]) & is_prompt_S[of_P]
    return attended_BT.bool() & prompt_P.view_as(labels_BT)


def attended_positions(attention_mask: Any, shape: torch.Size, device: torch.device) -> Tensor:
    """Returns the mask (B, T) of real tokens from a 2-D or a static cache's 4-D mask, or None."""
    rows, length = shape
    if isinstance(attention_mask, Mapping):  # one mask per type of attention, with equal diagonals
        attention_mask = next(iter(attention_mask.values()))
    if attention_mask is None:
        return torch.ones(rows, length, dtype=torch.bool, device=device)
    dimensions = getattr(attention_mask, "ndim", None)
    if isinstance(attention_mask, Tensor) and dimensions == 2:
        return attention_mask[:, :length].bool()  # a mask for a whole static cache is longer
    if isinstance(attention_mask, Tensor) and dimensions == 4:
        # Position t attends to itself unless it is padding.
        own_BT = attention_mask[:, 0].diagonal(dim1=1, dim2=2)[:, :length]
        if own_BT.dtype != torch.bool:  # a float mask adds 0 where attending is allowed
            own_BT = own_BT == 0
        return own_BT.expand(rows, -1)
    raise BaditError(
        f"cannot find the prompt with an attention mask of type {type(attention_mask).__name__}; "
        "pass prompt_mask= (batch, positions), or use routing='token'"
    )


def packed_segments(
    batch: Mapping[str, Any], shape: torch.Size, device: torch.device
) -> Segments | None:
    """Returns the segments of packed rows; None if the rows are not packed.

    They are found from flash attention's ends, or from position ids that restart at 0.
    """
    ends = batch["cu_seq_lens_q"]
    position_ids = batch["position_ids"]
    starts_BT = torch.zeros(shape, dtype=torch.bool, device=device)
    if isinstance(ends, Tensor):
        starts_BT.view(-1)[ends[ends < starts_BT.numel()].to(device)] = True
    elif batch["attention_mask"] is not None or getattr(position_ids, "ndim", None) != 2:
        return None  # before anything waits for the device
    else:
        starts_BT |= (position_ids == 0).to(device)
    starts_BT[:, 0] = True
    if not starts_BT[:, 1:].any():
        return None
    of_P = starts_BT.flatten().cumsum(dim=0) - 1
    return Segments(of_P.view(shape), int(of_P[-1]) + 1)


def cache_of(output: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the cache in the output of a model or of ``generate``.

    It is returned as a keyword argument of the next call.
    """
    names = output.keys()  # transformers' outputs warn if an earlier name is looked up
    for name in _CACHE_NAMES:
        if name in names and output[name] is not None:
            return {name: output[name]}
    return {}


def cache_in(batch: Mapping[str, Any]) -> Any:
    """Returns the cache among keyword arguments or in an output, or None."""
    return next(iter(cache_of(batch).values()), None)


def cached_length(cache: Any) -> int:
    """Returns a cache's number of positions; 1 if it is filled and its length is not known."""
    if not hasattr(cache, "get_seq_length"):  # a tuple, None, or the paged cache of generate_batch
        return int(isinstance(cache, tuple))
    try:
        return int(cache.get_seq_length())
    except ValueError:  # the cache of a recurrent model
        return int(cache.has_previous_state())


def select_rows(cache: Mapping[str, Any], rows_R: Tensor) -> bool:
    """Keeps only these rows (indices) of a cache and its gates.

    Returns False if the cache does not support it.
    """
    selected = _with_layers_of(cache, DynamicLayer, DynamicSlidingWindowLayer)
    if selected is None:
        return False
    selected.batch_select_indices(rows_R)
    held = getattr(selected, HELD, {})
    if held:
        gates = {name: gates[rows_R.to(gates.device)] for name, gates in held.items()}
        setattr(selected, HELD, gates)
    return True


def drop_last(cache: Mapping[str, Any], count: int) -> bool:
    """Removes the last positions of a cache, not its gates.

    Returns False if the cache does not support it.
    """
    cropped = _with_layers_of(cache, DynamicLayer)
    if cropped is None:
        return False
    cropped.crop(-count)
    return True


def _with_layers_of(cache: Mapping[str, Any], *kinds: type) -> Any:
    """Returns the cache itself if it has only layers of these classes, else None.

    Subclasses may have other states.
    """
    only = next(iter(cache.values()), None)
    if type(only) is DynamicCache and all(type(layer) in kinds for layer in only.layers):
        return only
    return None

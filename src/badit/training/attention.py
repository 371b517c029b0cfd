"""Attention for training on a CPU in bfloat16: two plain matrix products for short sequences.

For these, PyTorch's fused attention is slower: a training step on 200 tokens takes 1.2 times as
long with it. Longer sequences, float32 and passes without gradients use the fused attention.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask

LONGEST = 512  # up to this length plain products are faster (benchmarks/speed/attention.py)
_NAME = "badit_short"


def attention(  # noqa: PLR0913 (prescribed by transformers)
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Returns softmax(scaling · q kᵀ + mask) v, (B, T, H, D).

    It is an attention function of transformers, which prescribes the parameters.
    The query is (B, H, T, D). Key and value are (B, H/G, T, D), where G heads share one; the value
    may have another width. The mask is (B, 1, T, T), 0 where attending is allowed and the lowest
    number elsewhere.
    """
    rows, heads, length, width = query.shape
    is_short = query.requires_grad and query.dtype == torch.bfloat16 and length <= LONGEST
    # Fused attention handles the rest: a cache of keys, a learned bias of positions (T5).
    is_plain = key.shape[2] == length and kwargs.get("position_bias") is None
    if attention_mask is None or not (is_short and is_plain):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )

    query = query * (width**-0.5 if scaling is None else scaling)
    # Heads that share a key are rows of one product, so no key is copied.
    keys = key.shape[1]
    scores = query.reshape(rows, keys, -1, width) @ key.transpose(2, 3)
    weights = (scores.view(rows, heads, length, length) + attention_mask).softmax(dim=-1)
    weights = nn.functional.dropout(weights, dropout, training=module.training)
    mixed = weights.view(rows, keys, -1, length) @ value
    return mixed.view(rows, heads, length, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register(_NAME, attention)
# Its mask is additive; that of fused attention is boolean, or missing if it is causal.
AttentionMaskInterface.register(_NAME, eager_mask)


@contextmanager
def fast_on_short_sequences(model: PreTrainedModel) -> Iterator[None]:
    """A context in which a CPU model uses plain products for short sequences.

    It replaces PyTorch's fused attention; a model with another attention keeps it.
    """
    if model.device.type != "cpu" or model.config._attn_implementation != "sdpa":
        yield
        return
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")

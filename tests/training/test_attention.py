"""Plain attention against the fused one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from badit.attention import LONGEST, attention, fast_on_short_sequences


class Module(torch.nn.Module):
    is_causal = True

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups


def _inputs(rows: int, shared: int, groups: int, length: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(rows + 7 * length)
    query = torch.randn(rows, shared * groups, length, 8, generator=generator)
    key, value = (torch.randn(rows, shared, length, 8, generator=generator) for _ in range(2))
    allowed = torch.ones(length, length, dtype=torch.bool).tril().expand(rows, 1, -1, -1).clone()
    allowed[0, :, :, length - length // 4 :] = False  # right padding
    mask = torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)
    return *(tensor.to(dtype).requires_grad_() for tensor in (query, key, value)), mask


def _with_gradients(function: Callable[..., Any], module: Module, inputs: tuple[torch.Tensor, ...], scaling: Any):
    *tensors, mask = inputs
    output, _ = function(module, *tensors, mask, scaling=scaling)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(output.shape, generator=generator).to(output.dtype)
    return output.detach().float(), *(g.float() for g in torch.autograd.grad((output * weight).sum(), tensors))


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 3),
    shared=st.integers(1, 3),
    groups=st.integers(1, 3),
    length=st.integers(1, 40),
    scaling=st.sampled_from([None, 0.2]),
)
def test_it_is_attention_up_to_rounding(rows: int, shared: int, groups: int, length: int, scaling: Any) -> None:
    module = Module(groups)
    inputs = _inputs(rows, shared, groups, length, torch.bfloat16)
    exact = (*(tensor.detach().float().requires_grad_() for tensor in inputs[:3]), inputs[3].float())
    ours = _with_gradients(attention, module, inputs, scaling)
    fused = _with_gradients(sdpa_attention_forward, module, inputs, scaling)
    reference = _with_gradients(sdpa_attention_forward, module, exact, scaling)
    for one, other, expected in zip(ours, fused, reference, strict=True):
        error, usual = ((way - expected).abs().max().item() for way in (one, other))
        # bfloat16 has 8 bits; the fused way is as far from float32's result
        assert error <= max(0.03 * expected.abs().max().item() + 0.01, 2 * usual)


def test_float32_and_long_sequences_are_left_to_the_fused_way(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def fused(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        seen.append(query.shape[2])
        return query, None

    monkeypatch.setattr("badit.attention.sdpa_attention_forward", fused)
    for length, dtype in ((LONGEST + 1, torch.bfloat16), (5, torch.float32), (6, torch.bfloat16)):
        query, key, value, mask = _inputs(1, 1, 1, length, dtype)
        attention(Module(1), query, key, value, mask)
        attention(Module(1), query.detach(), key.detach(), value.detach(), mask)
    assert seen == [LONGEST + 1, LONGEST + 1, 5, 5, 6]


def test_a_model_takes_it_within_and_has_its_own_way_afterwards(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama").to(torch.bfloat16).train()
    model.set_attn_implementation("sdpa")
    tokens = torch.randint(0, 90, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[0, -3:] = 0
    expected = model(input_ids=tokens, attention_mask=mask).logits
    with fast_on_short_sequences(model):
        assert model.config._attn_implementation == "badit_short"
        torch.testing.assert_close(
            model(input_ids=tokens, attention_mask=mask).logits[mask.bool()],
            expected[mask.bool()],
            atol=0.05,
            rtol=0.05,
        )
    assert model.config._attn_implementation == "sdpa"


def test_a_model_with_another_attention_is_left_alone(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    with fast_on_short_sequences(model):
        assert model.config._attn_implementation == "eager"

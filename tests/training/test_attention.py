"""Plain attention compared with PyTorch's fused attention."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from badit.training.attention import attention, fast_on_short_sequences


def make_inputs(rows, shared, groups, length, dtype):
    generator = torch.Generator().manual_seed(rows + 7 * length)
    query = torch.randn(rows, shared * groups, length, 8, generator=generator)
    key, value = (torch.randn(rows, shared, length, 8, generator=generator) for _ in range(2))
    allowed = torch.ones(length, length, dtype=torch.bool).tril().expand(rows, 1, -1, -1).clone()
    allowed[0, :, :, length - length // 4 :] = False  # right padding
    mask = torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)
    return *(tensor.to(dtype).requires_grad_() for tensor in (query, key, value)), mask


def output_and_gradients(function, module, inputs, scaling):
    *tensors, mask = inputs
    output, _ = function(module, *tensors, mask, scaling=scaling)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output.dtype)
    return output.detach().float(), *(
        g.float() for g in torch.autograd.grad((output * weight).sum(), tensors)
    )


@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 40),
    st.sampled_from([None, 0.2]),
)
def test_matches_float32_attention_up_to_rounding(rows, shared, groups, length, scaling):
    module = SimpleNamespace(is_causal=True, training=True, num_key_value_groups=groups)
    inputs = make_inputs(rows, shared, groups, length, torch.bfloat16)
    exact = (
        *(tensor.detach().float().requires_grad_() for tensor in inputs[:3]),
        inputs[3].float(),
    )
    ours = output_and_gradients(attention, module, inputs, scaling)
    fused = output_and_gradients(sdpa_attention_forward, module, inputs, scaling)
    reference = output_and_gradients(sdpa_attention_forward, module, exact, scaling)
    for one, other, expected in zip(ours, fused, reference, strict=True):
        error, usual = ((result - expected).abs().max().item() for result in (one, other))
        # bfloat16 has 8 bits of precision; twice the error of the fused kernel is accepted
        assert error <= max(0.03 * expected.abs().max().item() + 0.01, 2 * usual)


def test_wider_values_and_position_bias_match_fused_attention():
    module = SimpleNamespace(is_causal=True, training=True, num_key_value_groups=2)
    query, key, value, mask = make_inputs(2, 2, 2, 12, torch.bfloat16)
    wide = torch.cat([value, value], dim=-1)
    ours, fused = (
        each(module, query, key, wide, mask)[0] for each in (attention, sdpa_attention_forward)
    )
    torch.testing.assert_close(ours, fused, atol=0.05, rtol=0.05)
    options = {"position_bias": torch.randn(1, 4, 12, 12).to(query.dtype)}
    assert torch.equal(
        *(
            f(module, query, key, value, mask, **options)[0]
            for f in (attention, sdpa_attention_forward)
        )
    )


@pytest.mark.parametrize("own", ["sdpa", "eager"])
def test_context_replaces_only_sdpa_and_restores_it_on_exit(tiny_model, own):
    model = tiny_model("llama").to(torch.bfloat16).train()
    model.set_attn_implementation(own)
    tokens = torch.randint(0, 90, (2, 12))
    mask = torch.ones_like(tokens)
    mask[0, -3:] = 0
    expected = model(input_ids=tokens, attention_mask=mask).logits[mask.bool()]
    with fast_on_short_sequences(model):
        assert model.config._attn_implementation == ("badit_short" if own == "sdpa" else "eager")
        found = model(input_ids=tokens, attention_mask=mask).logits[mask.bool()]
        torch.testing.assert_close(found, expected, atol=0.05, rtol=0.05)
    assert model.config._attn_implementation == own

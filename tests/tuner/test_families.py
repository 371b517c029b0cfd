"""Six model families: where the adapter goes, and that step 0 is the base model."""

from typing import Any

import pytest
import torch

from badit.errors import BaditError
from tuner.helpers import FAMILIES, IDS, MASK, adapt, adapted, layers, logits, padded, random_rows


@pytest.mark.parametrize("family", FAMILIES)
def test_step_0_with_all_linear_layers_equals_the_base_model(tiny_model, family):
    base = logits(tiny_model(family))
    model = adapt(tiny_model(family), target_modules="all-linear")
    torch.testing.assert_close(logits(model), base, atol=1e-5, rtol=0)
    assert base.std() > 0.5  # the tolerance means something
    names = {layer.name.split(".")[-1] for layer in layers(model)}
    all_linear = {*(f"{x}_proj" for x in "qkvo"), "gate_proj", "up_proj", "down_proj"}
    assert names == ({"c_attn", "c_proj", "c_fc"} if family == "gpt2" else all_linear)


@pytest.mark.parametrize("family", FAMILIES)
def test_step_0_equals_a_bf16_base_model(tiny_model, family):
    base = logits(tiny_model(family, dtype=torch.bfloat16))
    model = adapt(tiny_model(family, dtype=torch.bfloat16))
    assert layers(model)[0].weight_OI.dtype == torch.bfloat16
    default = "transformer.h.{}.mlp.c_fc" if family == "gpt2" else "model.layers.{}.mlp.gate_proj"
    assert [layer.name for layer in layers(model)] == [default.format(i) for i in range(2)]
    difference = (logits(model) - base).abs()
    assert difference.max() <= 0.02
    assert difference.mean() <= 0.03


@pytest.mark.parametrize("family", FAMILIES)
def test_the_adapted_model_is_the_model_with_its_mixture_written_in(tiny_model, family):
    """For one prompt the gates are fixed, so the same weights written into a plain model must give the same logits."""
    ids, mask = padded(random_rows(9))
    model = adapted(tiny_model(family), target_modules="all-linear")
    gates, plain = {}, tiny_model(family)
    for layer in layers(model):

        def spy(adapter, x, layer=layer, route=layer._route):
            gates[layer.name] = route(adapter, x)[0, 0]
            return gates[layer.name]

        layer._route = spy
    expected = logits(model, ids, mask)
    with torch.no_grad():
        for layer in layers(model):
            delta = layer.get_delta_weight("default", gates[layer.name])
            plain.get_submodule(layer.name).weight.add_(delta)
    torch.testing.assert_close(logits(plain, ids, mask), expected, atol=1e-3, rtol=1e-4)
    assert (logits(tiny_model(family), ids, mask) - expected).abs().max() > 0.5


def test_an_encoder_decoder_routes_by_token_only():
    from transformers import T5Config, T5ForConditionalGeneration

    t5 = T5Config(
        vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0, pad_token_id=0
    )
    options: dict[str, Any] = {"task_type": None}
    with pytest.raises(BaditError, match="decoder-only models; use routing='token'"):
        adapt(T5ForConditionalGeneration(t5), **options)
    base = T5ForConditionalGeneration(t5).eval()
    ids = IDS.clamp(max=49)
    with torch.no_grad():
        before = base(input_ids=ids, attention_mask=MASK, labels=ids).logits
        model = adapt(base, **options, routing="token")
        assert {layer.name.split(".")[-1] for layer in layers(model)} == {"wi"}
        after = model(input_ids=ids, attention_mask=MASK, labels=ids).logits
    torch.testing.assert_close(after, before, atol=1e-5, rtol=0)

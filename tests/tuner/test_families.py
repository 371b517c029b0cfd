"""Six model families and SmolLM2: where the adapter goes, and that step 0 is the base model."""

import pytest
import torch
from peft import get_peft_model
from transformers import T5Config, T5ForConditionalGeneration

from badit.errors import BaditError
from badit.tuner import BaditConfig
from tuner.helpers import (
    FAMILIES,
    IDS,
    MASK,
    adapt,
    adapted,
    generate,
    greedy_by_hand,
    layers,
    logits,
    mixture_of_one_prompt,
    padded,
    random_rows,
)


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
    model, plain = adapted(tiny_model(family), target_modules="all-linear"), tiny_model(family)
    expected, gates, _ = mixture_of_one_prompt(model, ids, mask)
    with torch.no_grad():
        for layer in layers(model):
            delta = layer.get_delta_weight("default", gates[layer.name])
            plain.get_submodule(layer.name).weight.add_(delta)
    torch.testing.assert_close(logits(plain, ids, mask), expected, atol=1e-3, rtol=1e-4)
    assert (logits(tiny_model(family), ids, mask) - expected).abs().max() > 0.5


def test_an_encoder_decoder_routes_by_token_only():
    sizes = {"vocab_size": 100, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    base = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0)).eval()
    with pytest.raises(BaditError, match="decoder-only models; use routing='token'"):
        adapt(base, task_type=None)
    with torch.no_grad():
        before = base(input_ids=IDS, attention_mask=MASK, labels=IDS).logits
        model = adapt(base, task_type=None, routing="token")
        assert {layer.name.split(".")[-1] for layer in layers(model)} == {"wi"}
        after = model(input_ids=IDS, attention_mask=MASK, labels=IDS).logits
    torch.testing.assert_close(after, before, atol=1e-5, rtol=0)


def test_smollm2_in_the_published_setting(smollm2):
    """Real weights and text: step 0 is the base model, and what is learnt routes alike in generation."""
    base, tokenizer = smollm2
    texts = ["Classify the sentiment of the sentence as positive or negative.", "What is the capital of France?"]
    ids, mask = tokenizer(texts, padding=True, return_tensors="pt").values()
    expected = logits(base, ids, mask)
    model = get_peft_model(base, BaditConfig(task_type="CAUSAL_LM")).eval()
    assert len(layers(model)) == 30
    assert (logits(model, ids, mask) - expected).abs().max() <= 1e-4
    with torch.no_grad():
        for layer in layers(model):
            for parameter in (layer.badit_A["default"], layer.badit_B["default"]):
                parameter.add_(0.1 * parameter.std() * torch.randn_like(parameter))
            torch.nn.init.normal_(layer.badit_router["default"])
    assert torch.equal(generate(model, ids, mask, 5), greedy_by_hand(model, ids, mask, 5))
    with model.disable_adapter():
        assert torch.equal(logits(model, ids, mask), expected)

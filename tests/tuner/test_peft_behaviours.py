"""What PEFT does with any method: several adapters, copies, other ways of saving; done right, or refused."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import DynamicCache, OPTConfig, OPTForCausalLM

from tuner.helpers import (
    FAMILIES,
    IDS,
    MASK,
    adapt,
    adapted,
    cached_steps,
    config,
    forward,
    layers,
    logits,
    randomise,
    teacher_forced,
)

TIED = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning")
Model = Callable[..., Any]


def with_two(base: Any) -> Any:
    model = adapted(base)
    model.add_adapter("second", config(num_experts=4))
    return randomise(model, "second", seed=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_are_switched_and_both_at_once_add_up(tiny_model: Model, family: str) -> None:
    model = with_two(tiny_model(family))
    first = logits(model)
    torch.testing.assert_close(first, logits(adapted(tiny_model(family))))
    model.set_adapter("second")
    alone = randomise(adapt(tiny_model(family), num_experts=4), seed=1)
    torch.testing.assert_close(logits(model), logits(alone))
    layer, x, added = layers(model)[0], torch.randn(2, 5, 32), []
    with torch.no_grad():
        for names in (["default"], ["second"], ["default", "second"]):
            model.base_model.set_adapter(names)
            added.append(layer(x) - layer.get_base_layer()(x))
    torch.testing.assert_close(added[2], added[0] + added[1], atol=1e-4, rtol=1e-4)


def test_both_at_once_decode_as_they_are_teacher_forced(tiny_model: Model) -> None:
    model = with_two(tiny_model("llama"))
    model.base_model.set_adapter(["default", "second"])
    forced = teacher_forced(model, IDS, MASK, 8)[:, 7:]
    assert torch.equal(MASK[:, 7], torch.ones(3, dtype=torch.long))
    torch.testing.assert_close(cached_steps(model, IDS, MASK, 8, DynamicCache()), forced, atol=1e-4, rtol=1e-4)


def test_a_refused_adapter_leaves_no_configuration_behind(tiny_model: Model) -> None:
    """Also where PEFT does not roll back itself, as when transformers adds an adapter to its own model."""
    tuner = adapted(tiny_model("llama")).base_model
    for name in ("second", "third"):
        tuner.peft_config[name] = config()
        tuner.peft_config[name].bias = "all"  # afterwards, since with PEFT before 0.21 the configuration refuses it
    with pytest.raises(ValueError, match="bias"):
        tuner.inject_adapter(tuner.model, "third")
    assert "third" not in tuner.peft_config


def test_a_deep_copy_is_independent(tiny_model: Model) -> None:
    """Its generation and its hooks, too; see tests/baselines/test_models.py for its tensors."""
    model = adapted(tiny_model("llama"))
    copied = randomise(copy.deepcopy(model), seed=5)
    options = {"input_ids": IDS, "attention_mask": MASK, "max_new_tokens": 4, "do_sample": False, "use_cache": False}
    changed, tokens = logits(copied), copied.generate(**options)
    assert not torch.equal(model.generate(**options), tokens)
    assert not model.unload()._forward_pre_hooks
    assert torch.equal(logits(copied), changed)
    assert torch.equal(copied.generate(**options), tokens)
    assert not copied.unload()._forward_pre_hooks


@TIED
def test_an_adapter_on_a_head_that_is_the_embedding_leaves_the_embedding(tiny_model: Model, tmp_path: Path) -> None:
    base = tiny_model("gpt2")
    assert base.lm_head.weight is base.transformer.wte.weight
    embedding = base.transformer.wte.weight.detach().clone()
    model = adapted(base, target_modules=["lm_head"])
    expected = logits(model)
    assert torch.equal(base.transformer.wte.weight, embedding)
    assert (expected - logits(tiny_model("gpt2"))).abs().max() > 0.1
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(tiny_model("gpt2"), tmp_path)), expected)


def test_an_mlp_that_sees_all_rows_as_one_routes_each_row_by_its_prompt() -> None:
    """OPT's: every row alone, in a padded batch, and decoded with a cache and without, has the same gates."""
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 2, "init_std": 0.2}
    options = {"vocab_size": 100, "num_attention_heads": 4, "max_position_embeddings": 128, "pad_token_id": 0}
    model = adapted(OPTForCausalLM(OPTConfig(**sizes, **options, bos_token_id=1, eos_token_id=2)))
    together = forward(model, IDS, MASK).logits
    for row, length in enumerate((6, 11, 9)):
        alone = model(input_ids=IDS[row : row + 1, -length:]).logits
        torch.testing.assert_close(together[row, -length:], alone[0], atol=1e-4, rtol=1e-4)
    options = {"input_ids": IDS, "attention_mask": MASK, "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(**options), model.generate(**options, use_cache=False))

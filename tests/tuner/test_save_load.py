"""An adapter's files, and the ways of loading them that are not PeftModel.from_pretrained (see tests/baselines)."""

import json

import peft
import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file

from tuner.helpers import FAMILIES, IDS, MASK, adapted, config, layers, logits, randomise

# With PEFT 0.19 transformers 5.24 loads no adapter at all into GPT-2, LoRA included.
OLD_PEFT = peft.__version__.startswith("0.19.")
LOADED_BY_TRANSFORMERS = [family for family in FAMILIES if not (OLD_PEFT and family == "gpt2")]


def test_the_files(tiny_model, tmp_path):
    adapted(tiny_model("llama")).save_pretrained(tmp_path)
    assert {file.suffix for file in tmp_path.iterdir()} == {".json", ".safetensors", ".md"}
    saved = load_file(tmp_path / "adapter_model.safetensors")
    parts = ("A", "B", "router", "A0", "B0", "expert_of")
    expected = {f"base_model.model.model.layers.{i}.mlp.gate_proj.badit_{part}" for i in range(2) for part in parts}
    assert set(saved) == expected
    assert {tensor.dtype for name, tensor in saved.items() if "expert_of" in name} == {torch.int64}
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["peft_type"], written["num_experts"], written["r"]) == ("BADIT", 3, 2)


@pytest.mark.parametrize("family", LOADED_BY_TRANSFORMERS)
def test_auto_classes_and_the_adapter_loader_of_transformers(tiny_model, tmp_path, family):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tiny_model(family).save_pretrained(base)
    model = adapted(type(tiny_model(family)).from_pretrained(base))
    model.save_pretrained(adapter)
    expected = logits(model)
    torch.testing.assert_close(logits(AutoPeftModelForCausalLM.from_pretrained(adapter)), expected)
    plain = tiny_model(family)
    plain.load_adapter(str(adapter))
    torch.testing.assert_close(logits(plain), expected)
    options = {"input_ids": IDS, "attention_mask": MASK, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    tokens = model.generate(**options)
    assert torch.equal(plain.generate(**options), tokens)
    # There `generate` is not ours; without a cache it must not let the answer into the routing either.
    assert torch.equal(plain.generate(**options, use_cache=False), tokens)
    assert torch.equal(model.get_base_model().generate(**options, use_cache=False), tokens)
    for layer in layers(plain):  # plain.disable_adapters() of transformers 5.24 asks for a PEFT yet to come
        layer.enable_adapters(False)
    assert torch.equal(logits(plain), logits(tiny_model(family)))


def test_several_adapters_are_saved_apart(tiny_model, tmp_path):
    model = adapted(tiny_model("llama"))
    model.add_adapter("other", config(num_experts=2, r=3, target_modules=["q_proj"]))
    randomise(model, "other", seed=1)
    expected = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        expected[name] = logits(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    loaded.load_adapter(tmp_path / "other", "other")
    for name in ("other", "default"):
        loaded.set_adapter(name)
        torch.testing.assert_close(logits(loaded), expected[name])

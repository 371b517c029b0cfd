"""Ways of loading adapters that are not PeftModel.from_pretrained, for which see tests/baselines."""

import peft
import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel

from tuner.helpers import FAMILIES, IDS, MASK, adapted, config, layers, logits, randomise

# With PEFT 0.19 transformers 5.24 loads no adapter at all into GPT-2, LoRA included.
OLD_PEFT = peft.__version__.startswith("0.19.")
LOADED_BY_TRANSFORMERS = [family for family in FAMILIES if not (OLD_PEFT and family == "gpt2")]


@pytest.mark.parametrize("family", LOADED_BY_TRANSFORMERS)
def test_auto_classes_and_the_adapter_loader_of_transformers(tiny_model, tmp_path, family):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tiny_model(family).save_pretrained(base)
    model = adapted(type(tiny_model(family)).from_pretrained(base))
    for _ in range(2):
        model.save_pretrained(adapter)
    assert (adapter / "README.md").read_text().count("`pip install badit`, and `import badit.tuner`") == 1
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

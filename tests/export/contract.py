"""What servers require of an adapter folder (vLLM 0.33, llama.cpp's convert_lora_to_gguf)."""

import json
import re

import torch
from safetensors.torch import load_file

# Both strip this prefix and suffix from tensor names to find the base weights, and refuse any other
# name.
NAME = re.compile(r"base_model\.model\.(.+)\.lora_(A|B)\.weight")
FIELDS = {"peft_type": "LORA", "task_type": "CAUSAL_LM"}
# vLLM refuses adapters that are more than a plain LoRA; llama.cpp silently ignores the additions.
FIELDS |= {"bias": "none", "modules_to_save": None, "use_dora": False, "use_rslora": False}
# Initializations that change the base weight (pissa, olora, corda, loftq) would be repeated on
# loading.
FIELDS |= {"rank_pattern": {}, "alpha_pattern": {}, "init_lora_weights": True}


def check_adapter(folder, base):
    """Asserts that servers accept the folder for this base model, and returns its configuration."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config.items() >= FIELDS.items()
    # vLLM requires these three fields and a rank of at most 512; llama.cpp reads only the global
    # alpha.
    assert isinstance(config["r"], int)
    assert config["r"] <= 512
    assert config["lora_alpha"] == config["r"]
    assert isinstance(config["target_modules"], list)
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {NAME.fullmatch(name).groups(): tensor for name, tensor in tensors.items()}
    for (module, part), tensor in found.items():
        assert {(module, "A"), (module, "B")} <= found.keys()
        weight = base.get_submodule(module).weight
        out_features, in_features = weight.T.shape if config["fan_in_fan_out"] else weight.shape
        assert tensor.shape == (
            (config["r"], in_features) if part == "A" else (out_features, config["r"])
        ), module
        assert tensor.dtype == torch.float32
        assert torch.isfinite(tensor).all()
    for target in config["target_modules"]:
        assert any(f".{module}".endswith(f".{target}") for module, _ in found)
    return config

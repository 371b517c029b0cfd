"""What servers demand of an adapter's folder, written down as checks (vLLM 0.33, llama.cpp's convert_lora_to_gguf)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

# Both cut these off a tensor's name to find the base model's weight; llama.cpp ends at any other name, vLLM too.
NAME = re.compile(r"base_model\.model\.(.+)\.lora_(A|B)\.weight")
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def check_adapter(folder: Path, base: torch.nn.Module) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Asserts that servers take the folder for a base model, and returns its configuration and tensors."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    _check_config(config)
    found: dict[str, set[str]] = {}
    for name, tensor in tensors.items():
        match = NAME.fullmatch(name)
        assert match, name
        module, part = match.groups()
        found.setdefault(module, set()).add(part)
        weight = base.get_submodule(module).weight
        out_features, in_features = weight.T.shape if config["fan_in_fan_out"] else weight.shape
        assert tensor.shape == ((config["r"], in_features) if part == "A" else (out_features, config["r"])), name
        assert tensor.dtype == torch.float32
        assert torch.isfinite(tensor).all()
    assert all(parts == {"A", "B"} for parts in found.values())
    for target in config["target_modules"]:
        assert any(module == target or module.endswith(f".{target}") for module in found)
    return config, tensors


def _check_config(config: dict[str, Any]) -> None:
    assert config["peft_type"] == "LORA"
    assert config["task_type"] == "CAUSAL_LM"
    # vLLM requires these three, and makes room for one of its ranks; llama.cpp reads the one global alpha.
    assert isinstance(config["r"], int)
    assert config["r"] <= VLLM_RANKS[-1]
    assert config["lora_alpha"] == config["r"]
    assert isinstance(config["target_modules"], list)
    # vLLM refuses what is more than a LoRA; llama.cpp leaves it out without a word.
    assert config["bias"] == "none"
    assert config["modules_to_save"] is None
    assert config["use_dora"] is False
    assert config["use_rslora"] is False
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    # A start that changes the base weight (pissa, olora, corda, loftq) would be repeated on loading.
    assert config["init_lora_weights"] is True

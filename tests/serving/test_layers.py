"""The frozen factors layer by layer: against the naive sum, on Conv1D, and through PEFT's own conversion."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model

import reference
from badit.serving.factors import mixture_factors
from badit.serving.files import merge, target_modules, write_adapter
from badit.serving.mixture import Mixture
from baselines import branch_naive
from serving.contract import check_adapter
from tuner.helpers import FAMILIES, adapt, adapted, forward, layers, padded, random_rows

IDS, MASK = padded(random_rows(6, 11, 9))
GATES = [0.25, 2.0, 0.75]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return forward(model, IDS, MASK).logits[MASK.bool()]


def mixture(model: Any) -> Mixture:
    return Mixture("by hand", {layer.name: GATES for layer in layers(model)})


class Section:
    name, revision = "base", None


@pytest.mark.parametrize("base_weight", ["delta", "folded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_adapts_merges_and_loads_alike(
    tiny_model: Callable[..., Any], tmp_path: Any, family: str, base_weight: str
) -> None:
    model = adapted(tiny_model(family), base_weight=base_weight, target_modules="all-linear")
    for layer in layers(model):
        layer._route = lambda adapter, x: torch.tensor(GATES).expand(*x.shape[:-1], -1)
    expected = logits(model)
    factors = mixture_factors(model, mixture(model))
    for layer in layers(model):
        a, b = (parameters["default"] for parameters in (layer.badit_A, layer.badit_B))
        gates = torch.tensor(GATES)[layer.expert_of("default")]
        naive = reference.frozen_weight(a, b, *layer.kept_factors("default"), gates, 2.0, 1.0)
        a_PI, b_OP = factors[layer.name]
        np.testing.assert_allclose(reference.float64(b_OP) @ reference.float64(a_PI), naive, atol=1e-5)
    write_adapter(tmp_path, factors, model.unload(), Section)  # pyright: ignore[reportArgumentType]
    config, _ = check_adapter(tmp_path, tiny_model(family))
    assert config["fan_in_fan_out"] == (family == "gpt2")
    loaded = PeftModel.from_pretrained(tiny_model(family), tmp_path)
    torch.testing.assert_close(logits(loaded), expected, atol=1e-4, rtol=1e-4)
    merged = tiny_model(family)
    merge(merged, factors)
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)


def test_names_that_mean_other_modules_too_are_written_whole(tiny_model: Callable[..., Any]) -> None:
    base = tiny_model("llama")
    names = [f"model.layers.{i}.mlp.{part}" for i in range(2) for part in ("gate_proj", "up_proj")]
    factors: Any = dict.fromkeys(names)
    assert target_modules(base, factors) == ["gate_proj", "up_proj"]
    del factors[names[0]]
    assert target_modules(base, factors) == sorted(names[1:])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_pefts_own_conversion_takes_fixed_mixtures_only(tiny_model: Callable[..., Any], family: str) -> None:
    lora = pytest.importorskip("peft.tuners.lora.conversion", reason="PEFT before 0.19 converts nothing")
    single = adapted(tiny_model(family), num_experts=1, r=4)
    branches = branch_naive.adapted(tiny_model(family), "o-lora")
    for model, rank in ((single, 8), (branches, 6)):
        assert model.supports_lora_conversion()
        config, tensors = lora.convert_to_lora(model, rank=rank)
        config.fan_in_fan_out = family == "gpt2"  # PEFT would set it with a warning
        plain = get_peft_model(tiny_model(family), config)
        named = {name.replace(".weight", ".default.weight"): tensor for name, tensor in tensors.items()}
        assert not plain.load_state_dict(named, strict=False).unexpected_keys
        torch.testing.assert_close(logits(plain.eval()), logits(model), atol=1e-3, rtol=1e-3)
    for model in (adapt(tiny_model(family)), branch_naive.adapted(tiny_model(family), "gainlora")):
        assert not model.supports_lora_conversion()
        with pytest.raises(TypeError, match="do not support LoRA conversion"):
            lora.convert_to_lora(model, rank=4)

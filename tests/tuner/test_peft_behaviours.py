"""What PEFT does with any method: done right, or refused by a message that says so."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.utils.hotswap import hotswap_adapter
from transformers import OPTConfig, OPTForCausalLM

from tuner.helpers import FAMILIES, adapt, adapted, forward, padded, random_rows, randomise

# PEFT 0.19 looks for the saved configuration of a base model that was never saved.
pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file in  - :UserWarning")
TIED = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning")
IDS, MASK = padded(random_rows(6, 11, 9))
Model = Callable[..., Any]


@pytest.fixture
def tiny_opt() -> Any:
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 2}
    options = {"vocab_size": 100, "num_attention_heads": 4, "max_position_embeddings": 128, "init_std": 0.2}
    return OPTForCausalLM(OPTConfig(**sizes, **options, pad_token_id=0, bos_token_id=1, eos_token_id=2)).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return forward(model, IDS, MASK).logits[MASK.bool()]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pickled_file_holds_the_same_adapter(tiny_model: Model, tmp_path: Path, family: str) -> None:
    model = adapted(tiny_model(family))
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").is_file()
    loaded = PeftModel.from_pretrained(tiny_model(family), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model))


class _Harmful:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_no_code_of_a_pickled_file_is_run(tiny_model: Model, tmp_path: Path) -> None:
    adapted(tiny_model("llama")).save_pretrained(tmp_path, safe_serialization=False)
    torch.save({"weight": _Harmful(tmp_path / "harm")}, tmp_path / "adapter_model.bin")
    with pytest.raises(pickle.UnpicklingError):
        PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    assert not (tmp_path / "harm").exists()


def test_swapping_weights_into_a_running_model_is_refused(tiny_model: Model, tmp_path: Path) -> None:
    model = adapted(tiny_model("llama"))
    expected = logits(model)
    randomise(adapted(tiny_model("llama")), seed=3).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"(?i)hotswap"):
        hotswap_adapter(model, tmp_path, adapter_name="default")
    assert torch.equal(logits(model), expected)


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


def test_an_adapter_is_filled_from_the_meta_device(tiny_model: Model, tmp_path: Path) -> None:
    model = adapted(tiny_model("llama"), router_input="standardised")
    model.save_pretrained(tmp_path)
    loaded = adapt(tiny_model("llama"))
    loaded.load_adapter(tmp_path, "other", low_cpu_mem_usage=True)
    loaded.set_adapter("other")
    assert not any(tensor.is_meta for tensor in loaded.state_dict().values())
    torch.testing.assert_close(logits(loaded), logits(model))


def test_an_mlp_that_sees_all_rows_as_one_routes_each_row_by_its_prompt(tiny_opt: Any) -> None:
    """OPT's: every row alone, in a padded batch, and decoded with a cache and without, has the same gates."""
    model = adapted(tiny_opt)
    together = forward(model, IDS, MASK).logits
    for row, length in enumerate((6, 11, 9)):
        alone = model(input_ids=IDS[row : row + 1, -length:]).logits
        torch.testing.assert_close(together[row, -length:], alone[0], atol=1e-4, rtol=1e-4)
    options = {"input_ids": IDS, "attention_mask": MASK, "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(**options), model.generate(**options, use_cache=False))

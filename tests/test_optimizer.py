"""Optimizers with all kinds of adapters, in a loop and in other libraries' trainers."""

import io
from functools import partial

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

import reference
from badit.training.optimizers import OrthogonalUpdates, factor_pairs, lora_plus_groups
from badit.tuner import hooks_of
from baselines import naive
from refusals import refuses
from training.trainers import QUIET, assert_same, examples
from tuner.helpers import take_steps

METHODS = {
    name: partial(naive.config, name)
    for name in ("badit", *naive.MIXTURES, "mtl-lora", *naive.BRANCHES)
}
METHODS["badit, bad"] = partial(naive.config, "badit", init_weights="bad", gated="factors")
METHODS["lora"] = partial(LoraConfig, r=8, lora_alpha=64, target_modules=["gate_proj", "q_proj"])


def tuned(model, method, **options):
    return get_peft_model(model, METHODS[method](), **options).train()


def train(model, optimizer, steps):
    ids = torch.randint(3, 100, (8, 12), generator=torch.Generator().manual_seed(1))
    batch = {
        "attention_mask": torch.ones_like(ids),
        "labels": ids.masked_fill(torch.arange(12) < 6, -100),
    }
    with hooks_of(model).rows_of(["rivers"] * len(ids)):
        return take_steps(optimizer, steps, lambda: model(input_ids=ids, **batch).loss)


class Factors(nn.Module):
    """A module with only the trainable factors A (N, I) and B (O, K·N)."""

    def __init__(self, rows, columns):
        super().__init__()
        self.pair = (
            nn.Parameter(torch.randn(rows, 9).double()),
            nn.Parameter(torch.zeros(7, columns).double()),
        )
        self.badit_A, self.badit_B = (nn.ParameterDict({"default": factor}) for factor in self.pair)

    def draw_gradients(self):
        for parameter in self.pair:
            parameter.grad = torch.randn_like(parameter)


@pytest.mark.parametrize(("shared_by", "at_a_time"), [(1, 2**23), (3, 2**23), (1, 1)])
def test_steps_match_the_reference_implementation(shared_by, at_a_time, monkeypatch):
    """The B's of experts that share A are stacked: (K·O, N). Layers are updated in groups."""
    monkeypatch.setattr("badit.tuner.distributed._NUMBERS_AT_A_TIME", at_a_time)
    layers = [Factors(4, 4 * shared_by) for _ in range(3)]
    optimizer = OrthogonalUpdates(nn.ModuleList(layers), 0.01, weight_decay=0.1)

    def stacked(b):
        return np.concatenate(np.split(reference.float64(b), shared_by, axis=1))

    states = [(reference.OrthogonalFactor(), reference.OrthogonalFactor()) for _ in layers]
    values = [
        (reference.float64(a).copy(), stacked(b)) for a, b in (layer.pair for layer in layers)
    ]
    for step in range(4):
        for index, layer in enumerate(layers):
            layer.draw_gradients()
            if (step, index) == (0, 1):  # a layer without gradients
                layer.zero_grad()
                continue
            gradients = layer.pair[0].grad, stacked(layer.pair[1].grad)
            moved = reference.orthogonal_step(
                *values[index], *gradients, *states[index], 0.01, (0.9, 0.98)
            )
            values[index] = [
                after - 0.01 * 0.1 * was for after, was in zip(moved, values[index], strict=True)
            ]
        optimizer.step()
        for (found_a, found_b), (a, b) in zip(
            (layer.pair for layer in layers), values, strict=True
        ):
            np.testing.assert_allclose(reference.float64(found_a), a, rtol=0, atol=1e-8)
            np.testing.assert_allclose(stacked(found_b), b, rtol=0, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_restored_optimizer_continues_bit_identically(tiny_model, dtype):
    def fresh():
        torch.manual_seed(0)
        model = tuned(tiny_model("llama", dtype=dtype), "hydralora", autocast_adapter_dtype=False)
        return model, OrthogonalUpdates(model, 0.01, other_lr=0.02)

    whole, resumed, file = fresh(), fresh(), io.BytesIO()
    train(*whole, 3)
    torch.save([stateful.state_dict() for stateful in whole], file)
    file.seek(0)
    for stateful, state in zip(resumed, torch.load(file, weights_only=True), strict=True):
        stateful.load_state_dict(state)
    train(*whole, 3)
    train(*resumed, 3)
    expected = whole[0].state_dict()
    assert_same(resumed[0].state_dict(), expected)
    assert {value.dtype for name, value in expected.items() if "badit_A" in name} == {dtype}


def test_orthogonal_updates_work_with_trainer_trl_and_accelerate(
    tiny_model, model_folder, tmp_path
):
    options = {**QUIET, "output_dir": str(tmp_path), "save_strategy": "no", "max_steps": 3}
    rows = [
        {"input_ids": row["input_ids"][:4], "labels": row["input_ids"][:4]} for row in examples()
    ]
    texts = [{"prompt": f"Name city {i}.", "completion": f" city {i}"} for i in range(12)]
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    of_trl = {"train_dataset": Dataset.from_list(texts), "processing_class": tokenizer}
    for trainer, method, args, arguments in (
        (Trainer, "lora", TrainingArguments(**options), {"train_dataset": rows}),
        (SFTTrainer, "badit", SFTConfig(bf16=False, **options), of_trl),
    ):
        model = tuned(AutoModelForCausalLM.from_pretrained(model_folder), method)
        trainer(model, args, **arguments, optimizers=(OrthogonalUpdates(model, 0.01), None)).train()
        assert all(b.abs().max() > 0 for _, b in factor_pairs(model))
    model = tuned(tiny_model("llama"), "badit")
    losses = train(*Accelerator(cpu=True).prepare(model, OrthogonalUpdates(model, 0.005)), 5)
    assert losses[-1] < losses[0]


def test_step_reads_no_tensor_values():
    """Operations that would synchronise with a GPU raise an error on meta tensors."""
    with torch.device("meta"):
        layers = [Factors(4, 8) for _ in range(2)]
    optimizer = OrthogonalUpdates(nn.ModuleList(layers), 0.01, weight_decay=0.1)
    for _ in range(2):
        for layer in layers:
            layer.draw_gradients()
        optimizer.step()


def test_embeddings_and_unpaired_factors_are_left_to_adamw(tiny_model):
    config = LoraConfig(
        r=4,
        target_modules=["gate_proj", "embed_tokens"],
        modules_to_save=["lm_head"],
        use_dora=False,
    )
    model = get_peft_model(tiny_model("llama", tie_word_embeddings=False), config).train()
    factor_pairs(model)[0][0].requires_grad_(False)
    factors, others = (
        set(group["params"]) for group in OrthogonalUpdates(model, 0.01).param_groups
    )
    assert len(factors) == 2
    names = [name for name, parameter in model.named_parameters() if parameter in others]
    for module in ("lora_embedding_A", "lm_head", "layers.0.mlp.gate_proj.lora_B"):
        assert any(module in name for name in names), module


def test_lora_on_fused_weights_of_several_experts_is_left_to_adamw(tiny_model):
    config = LoraConfig(
        r=4, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"]
    )
    model = get_peft_model(tiny_model("qwen3_moe"), config)
    assert sum(parameter.requires_grad for parameter in model.parameters()) == 8
    assert len(factor_pairs(model)) == 2


@pytest.mark.parametrize("name", ["adamw", "lora+", "orthogonal"])
@pytest.mark.parametrize("method", METHODS)
def test_optimizers_group_parameters_and_lower_the_loss(tiny_model, name, method):
    model = tuned(tiny_model("llama"), method)
    groups = lora_plus_groups(model, 0.005, 4.0 if name == "lora+" else 1.0, other_lr=0.002)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    if name == "orthogonal":
        optimizer = OrthogonalUpdates(model, 0.005, other_lr=0.002, weight_decay=0.01)
    groups, sides = (
        optimizer.param_groups,
        [set(side) for side in zip(*factor_pairs(model), strict=True)],
    )
    assert len(sides[0]) == (4 if method == "lora" else 2)
    rates = {
        "adamw": [0.005, 0.005, 0.002],
        "lora+": [0.005, 0.02, 0.002],
        "orthogonal": [0.005, 0.002],
    }[name]
    assert [group["lr"] for group in groups] == (
        rates[:-1] if method in ("lora", "o-lora") else rates
    )
    assert {group["weight_decay"] for group in groups} == {0.01}
    grouped = [set(group["params"]) for group in groups]
    assert grouped[: len(rates) - 1] == ([sides[0] | sides[1]] if name == "orthogonal" else sides)
    assert set.union(*grouped) == {p for p in model.parameters() if p.requires_grad}
    losses = train(model, optimizer, 10)
    assert losses[-1] < losses[0] - (0.02 if name == "orthogonal" else 0)


def test_lora_plus_groups_are_those_of_peft_on_a_plain_lora(tiny_model):
    model = tuned(tiny_model("llama"), "lora")
    of_peft = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=0.1, loraplus_lr_ratio=4.0
    ).param_groups
    groups = [(group["lr"], set(group["params"])) for group in lora_plus_groups(model, 0.1, 4.0)]
    assert groups == [(group["lr"], set(group["params"])) for group in of_peft if group["params"]]


def test_invalid_models_options_and_deepspeed_are_refused(tiny_model, monkeypatch):
    frozen, untuned = tiny_model("llama").requires_grad_(False), tiny_model("llama")
    model = tuned(tiny_model("llama"), "badit")
    for words, call in [
        ("no pair of trainable factors", lambda: OrthogonalUpdates(untuned, 0.1)),
        (
            "rank fits its weights",
            lambda: OrthogonalUpdates(get_peft_model(untuned, LoraConfig(r=256)), 0.1),
        ),
        ("no trainable parameters", lambda: lora_plus_groups(frozen, 0.1)),
        ("^lr: input should be greater than 0", lambda: OrthogonalUpdates(model, 0.0)),
        (
            "other_lr: input should be greater than 0",
            lambda: OrthogonalUpdates(model, 0.1, other_lr=-1),
        ),
        (
            "betas must be at least 0 and below 1",
            lambda: OrthogonalUpdates(model, 0.1, betas=(0.9, 1.0)),
        ),
        (
            "weight_decay: input should be greater than",
            lambda: OrthogonalUpdates(model, 0.1, weight_decay=-0.1),
        ),
        ("ratio: input should be greater than 0", lambda: lora_plus_groups(model, 0.1, 0)),
    ]:
        refuses(words, call)
    # DeepSpeed passes flat partitions of the parameters to its optimizer.
    optimizer = OrthogonalUpdates(model, 5e-4)
    optimizer.param_groups[0]["params"] = [nn.Parameter(torch.zeros(10))]
    refuses("use FSDP2 or DDP", optimizer.step)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    refuses("use FSDP2 or DDP", OrthogonalUpdates, model, 0.1)

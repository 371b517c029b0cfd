"""O-LoRA: its penalty, and one task of it as plain LoRA."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from badit.baselines.o_lora import OLoraConfig
from badit.data import AnswerCollator
from badit.errors import BaditError
from baselines import branch_naive as naive
from baselines.branch_naive import MASK, adapt, adapted, layers, logits, loss, trainable
from training.trainers import examples, make_trainer


@pytest.mark.parametrize("tasks", [2, 4])
def test_the_penalty_equals_the_naive_sum(tiny_model, tasks):
    model = adapted(tiny_model("llama"), "o-lora", tasks, orthogonality_weight=0.3, target_modules="all-linear")
    expected = 0.3 * sum(naive.penalty(layer) for layer in layers(model))
    found = model.base_model.extra_loss(MASK)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    found.backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None}
    assert moved == {name for name in trainable(model) if "badit_A" in name}
    with model.disable_adapter():
        assert model.base_model.extra_loss(MASK) is None


@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_it_is_zero_for_orthogonal_branches_and_only_for_those(rank, past, seed):
    generator = torch.Generator().manual_seed(seed)
    config = OLoraConfig(r=rank, past_branches=past)
    basis = torch.linalg.qr(torch.randn(20, 20, generator=generator, dtype=torch.float64))[0].T
    split = rank * past
    past_A = torch.randn(split, split, generator=generator, dtype=torch.float64) @ basis[:split]
    past_A /= past_A.norm(dim=1, keepdim=True)  # a row drawn near zero would be orthogonal to anything, to rounding
    a = torch.randn(rank, rank, generator=generator, dtype=torch.float64) @ basis[split : split + rank]
    assert config.penalty(past_A, a).item() == pytest.approx(0, abs=1e-10)
    tilted = a + 0.1 * past_A[:rank]
    assert config.penalty(past_A, tilted).item() > 1e-4
    assert config.penalty(past_A, -tilted) == config.penalty(past_A, tilted)


def test_there_is_none_in_the_first_task_nor_with_a_weight_of_0(tiny_model):
    assert adapt(tiny_model("llama"), "o-lora").base_model.extra_loss(MASK) is None
    assert adapted(tiny_model("llama"), "o-lora", orthogonality_weight=0).base_model.extra_loss(MASK) is None
    assert OLoraConfig().orthogonality_weight == 0.5
    for value in (-0.1, "much", True):
        with pytest.raises(BaditError, match="orthogonality_weight must be a number of at least 0"):
            OLoraConfig(orthogonality_weight=value)


def test_training_with_it_turns_the_new_branch_away_from_the_old_ones(tiny_model):
    found = {}
    for weight in (0.0, 0.5):
        model = adapted(tiny_model("llama"), "o-lora", 2, orthogonality_weight=weight)
        model.base_model.next_task()
        start = sum(naive.penalty(layer) for layer in layers(model))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
        for _ in range(30):
            optimizer.zero_grad()
            extra = model.base_model.extra_loss(MASK)
            (loss(model) + (0 if extra is None else extra)).backward()
            optimizer.step()
        found[weight] = sum(naive.penalty(layer) for layer in layers(model)) / start
    assert found[0.5] < 0.2 < 0.7 < found[0.0]


def test_the_trainer_adds_it(tiny_model, tmp_path):
    batch = dict(AnswerCollator(0)(examples(5)))
    losses = {}
    for weight in (0.0, 0.5):
        model = adapted(tiny_model("llama"), "o-lora", orthogonality_weight=weight)
        trainer = make_trainer(model, tmp_path, [])
        for mode in (True, False):
            model.train(mode)
            losses[weight, mode] = trainer.compute_loss(model, batch).item()
    penalty = 0.5 * sum(naive.penalty(layer) for layer in layers(model))
    assert losses[0.5, True] - losses[0.0, True] == pytest.approx(penalty, rel=1e-4)
    assert losses[0.5, False] == losses[0.0, False]


def test_one_task_is_plain_lora(tiny_model):
    ours = adapted(tiny_model("llama"), "o-lora", tasks=1)
    lora = LoraConfig(r=2, lora_alpha=4, target_modules=["gate_proj"], task_type="CAUSAL_LM")
    theirs = get_peft_model(tiny_model("llama"), lora).eval()
    with torch.no_grad():
        for layer in layers(ours):
            other = theirs.get_submodule(f"base_model.model.{layer.name}")
            other.lora_A["default"].weight.copy_(layer.badit_A["default"])
            other.lora_B["default"].weight.copy_(layer.badit_B["default"])
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-5)
    loss(ours).backward()
    loss(theirs).backward()
    for layer in layers(ours):
        other = theirs.get_submodule(f"base_model.model.{layer.name}")
        for one, two in ((layer.badit_A, other.lora_A), (layer.badit_B, other.lora_B)):
            torch.testing.assert_close(one["default"].grad, two["default"].weight.grad, atol=1e-6, rtol=1e-4)
    assert ours.get_nb_trainable_parameters()[0] == theirs.get_nb_trainable_parameters()[0]

"""The balance losses: their formulas, what counts in them, and how the trainer adds them."""

import pytest
import torch

import reference
from badit.data import AnswerCollator
from badit.errors import BaditError
from baselines import naive
from baselines.naive import adapted, layers
from training.trainers import examples, make_trainer
from tuner.helpers import enable_checkpointing, forward, padded, random_rows

BALANCED = ("loramoe", "goat")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("method", BALANCED)
def test_it_is_the_sum_over_layers_at_attended_positions_alone(tiny_model, method, family):
    model = adapted(tiny_model(family), method, balance_weight=0.3).train()
    ids, mask = padded(random_rows(4, 9, 7))
    inputs = {}
    for layer in layers(model):
        layer.register_forward_pre_hook(lambda layer, args: inputs.update({layer: args[0].detach()}))
    forward(model, ids, mask)
    expected = 0
    for layer, x in inputs.items():
        seen = x[mask.bool()]
        full = reference.expert_gates(seen @ layer.badit_router["default"].T, "softmax", None)
        expected += 0.3 * naive.imbalance(method, naive.gates(layer, seen), full)
    found = model.base_model.extra_loss(mask)
    assert found.item() == pytest.approx(expected, rel=1e-4)
    found.backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    last = layers(model)[-1].name
    assert f"base_model.model.{last}.badit_router.default" in moved
    assert not any(name.startswith(f"base_model.model.{last}.badit_B") for name in moved)


def test_it_is_read_once_and_only_after_a_training_pass(tiny_model):
    ids, mask = padded(random_rows(4, 9))
    model = adapted(tiny_model("llama"), "goat").train()
    forward(model, ids, mask)
    assert model.base_model.extra_loss(mask) is not None
    with pytest.raises(BaditError, match="has seen no training pass"):
        model.base_model.extra_loss(mask)
    forward(model.eval(), ids, mask)
    with pytest.raises(BaditError, match="has seen no training pass"):
        model.base_model.extra_loss(mask)
    forward(model.train(), ids, mask)
    with pytest.raises(BaditError, match=r"sees 18 positions, the batch has 6: leave it out of target_modules"):
        model.base_model.extra_loss(mask[:, :3])


def test_gradient_checkpointing(tiny_model):
    """Without re-entrance it changes no gradient; with it the router's output is out of reach, which is refused."""
    ids, mask = padded(random_rows(4, 9))
    found = []
    for checkpoint in (False, True):
        model = adapted(tiny_model("llama"), "goat", balance_weight=1.0).train()
        model.enable_input_require_grads()
        if checkpoint:
            enable_checkpointing(model, reentrant=False)
        output = forward(model, ids, mask, labels=ids, use_cache=False)
        (output.loss + model.base_model.extra_loss(mask)).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        assert not any(layer._router_logits for layer in layers(model))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-4)
    enable_checkpointing(model, reentrant=True)
    forward(model, ids, mask, labels=ids, use_cache=False)
    with pytest.raises(BaditError, match="set use_reentrant=False, or set balance_weight=0"):
        model.base_model.extra_loss(mask)


@pytest.mark.parametrize(
    ("method", "option"),
    [("loramoe", "balance_weight"), ("goat", "balance_weight"), ("o-lora", "orthogonality_weight")],
)
def test_the_trainer_adds_it_in_training_and_not_in_evaluation(tiny_model, tmp_path, method, option):
    """As it does O-LoRA's penalty."""
    batch = dict(AnswerCollator(0)(examples(5)))
    losses = {}
    for weight in (0.0, 0.5):
        model = adapted(tiny_model("llama"), method, **{option: weight})
        trainer = make_trainer(model, tmp_path, [])
        for mode in (True, False):
            losses[weight, mode] = trainer.compute_loss(model.train(mode), batch)
    model.train()
    forward(model, batch["input_ids"], batch["attention_mask"])
    extra = model.base_model.extra_loss(batch["attention_mask"]).item()
    assert extra > 0.01
    assert (losses[0.5, True] - losses[0.0, True]).item() == pytest.approx(extra, rel=1e-3)
    assert torch.equal(losses[0.5, False], losses[0.0, False])


def test_it_is_averaged_over_accumulated_micro_batches(tiny_model, tmp_path):
    """Two batches of two: the step follows the answers' loss of the whole and the mean of the two balance losses."""
    data = examples(4)
    model = adapted(tiny_model("llama"), "loramoe", balance_weight=5.0).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    items = sum(label != -100 for example in data for label in example["labels"])
    trainer = make_trainer(model, tmp_path, [])
    for part in (data[:2], data[2:]):
        batch = dict(AnswerCollator(0)(part))
        labels = batch.pop("labels")
        logits = model(**batch).logits[:, :-1].float().log_softmax(dim=-1)
        kept = labels[:, 1:] != -100
        answers = -logits[kept].gather(-1, labels[:, 1:][kept][:, None]).sum() / items
        (answers + model.base_model.extra_loss(batch["attention_mask"]) / 2).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()

    trainer = make_trainer(
        model, tmp_path, [], count=4, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=1,
        save_strategy="no", optim="sgd", learning_rate=1.0, lr_scheduler_type="constant", max_grad_norm=0.0,
        group_by_length=False,
    )  # fmt: skip
    trainer._get_train_sampler = lambda dataset=None: torch.utils.data.SequentialSampler(data)
    trainer.train()
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(before[name] - parameter, expected[name], atol=1e-5, rtol=1e-3)

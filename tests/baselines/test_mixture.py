"""Mixture layers against loops over experts, their initialisation and their balance losses."""

import numpy as np
import pytest
import torch

import reference
from badit.baselines.mixture import MixtureLinear
from badit.data import AnswerCollator
from badit.tuner.context import RoutingContext
from baselines import naive
from baselines.naive import MIXTURES, adapted, config
from refusals import refuses
from training.trainers import examples, make_trainer
from tuner.helpers import (
    KINDS,
    base_layer,
    forward,
    gradients,
    layers,
    padded,
    random_rows,
    randomise,
)

IN, OUT = 20, 18  # with four experts, each chunk has 4 directions, and rank 2 uses half of them


def make_layer(method, kind="linear", *, dtype=torch.float64, at_start=False, **options):
    base = base_layer(kind, IN, OUT).to(dtype)
    options = config(method, **options)
    layer = MixtureLinear(base, "layer", RoutingContext(), "default", options)
    return (layer if at_start else randomise(layer)).eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("method", "options"), [*((method, {}) for method in MIXTURES), ("goat", {"top_k": 1})]
)
def test_forward_matches_loop_over_experts(method, options, kind):
    layer = make_layer(method, kind, **options)
    x = torch.randn(3, 5, IN, dtype=torch.float64)
    torch.testing.assert_close(
        layer(x), naive.mixture_forward(method, layer, x), atol=1e-6, rtol=1e-6
    )
    torch.testing.assert_close(layer(x[:, 0]), layer(x)[:, 0])
    assert (layer(x) - layer.get_base_layer()(x)).abs().mean() > 0.03


def test_dropout_of_goat_acts_on_the_change_of_its_experts():
    start = make_layer("goat", at_start=True, lora_dropout=0.5)
    x = torch.randn(3, 5, IN, dtype=torch.float64)
    torch.testing.assert_close(start.train()(x), start.eval()(x), atol=1e-12, rtol=0)
    layer = make_layer("goat", lora_dropout=0.5).train()
    torch.manual_seed(3)
    inputs = layer.badit_dropout["default"](x)
    torch.manual_seed(3)
    y = layer(x)
    gates_N = layer.component_gates("default", x).flatten(0, 1)
    pairs = [layer.factors("default"), layer.kept_factors("default")]
    options = (gates_N, layer.badit_config["default"].scaling, 1 / 4)
    rows = (x.flatten(0, 1), inputs.flatten(0, 1))
    expected = reference.layer_output(layer.weight_OI, *rows, *pairs, *options)
    expected += reference.float64(layer.get_base_layer().bias)
    np.testing.assert_allclose(reference.float64(y).reshape(expected.shape), expected, atol=1e-5)


@pytest.mark.parametrize("method", ["loramoe", "hydralora"])
def test_experts_are_initialised_like_lora(method):
    layer, bound = make_layer(method, at_start=True), IN**-0.5  # of kaiming_uniform_(a=√5)
    for parameter in (layer.badit_A["default"], layer.badit_router["default"]):
        assert 0.8 * bound < parameter.abs().max().item() <= bound
        assert parameter.std().item() == pytest.approx(bound / 3**0.5, rel=0.3)
    assert not layer.badit_B["default"].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rho", [10.0, 2.0])
def test_goat_experts_start_from_chunks_of_the_spectrum(kind, rho):
    layer = make_layer("goat", kind, dtype=torch.float32, at_start=True, rho=rho)
    a = layer.badit_A["default"]
    b = layer.badit_B["default"]
    start = naive.goat_start(reference.float64(layer.weight_OI), 4, 2, 2.0, rho)
    pairs = naive.experts("goat", reference.float64(a), reference.float64(b), 4)
    for (b_k, a_k), (found_b, found_a) in zip(start, pairs, strict=True):
        torch.testing.assert_close(
            torch.tensor(found_b @ found_a), torch.tensor(b_k @ a_k), atol=1e-6, rtol=1e-5
        )
        torch.testing.assert_close(
            torch.tensor(abs(found_a)), torch.tensor(abs(a_k)), atol=1e-5, rtol=1e-5
        )
    torch.testing.assert_close(layer.kept_factors("default"), (a, b), rtol=0, atol=0)


def test_goat_refuses_a_weight_too_small_for_the_rank():
    refuses(
        r"layer: a weight of shape \(18, 20\) has 4 directions .* at most r = 16$",
        make_layer,
        "goat",
        r=24,
    )


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["loramoe", "goat"])
def test_balance_loss_sums_over_layers_and_ignores_padding(tiny_model, method, family):
    model = adapted(tiny_model(family), method, balance_weight=0.3).train()
    ids, mask = padded(random_rows(4, 9, 7))
    inputs = {}
    for layer in layers(model):
        layer.register_forward_pre_hook(
            lambda layer, args: inputs.update({layer: args[0].detach()})
        )
    forward(model, ids, mask)
    expected = 0
    for layer, x in inputs.items():
        seen = x[mask.bool()]
        full = reference.expert_gates(seen @ layer.badit_router["default"].T, "softmax", None)
        expected += 0.3 * naive.imbalance(method, naive.gates(layer, seen), full)
    loss = model.base_model.extra_loss(mask)
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    loss.backward()
    last = layers(model)[-1]
    assert last.badit_router["default"].grad.any()
    assert last.badit_B["default"].grad is None


def test_balance_loss_is_read_once_per_training_pass_of_matching_size(tiny_model):
    ids, mask = padded(random_rows(4, 9))
    model = adapted(tiny_model("llama"), "goat").train()
    extra_loss = model.base_model.extra_loss
    forward(model, ids, mask)
    assert extra_loss(mask) is not None
    for _ in range(2):
        refuses("has seen no training pass", extra_loss, mask)
        forward(model.eval(), ids, mask)
    forward(model.train(), ids, mask)
    refuses(
        r"sees 18 positions, but the batch has 6; exclude it from the targets",
        extra_loss,
        mask[:, :3],
    )


@pytest.mark.parametrize(
    ("method", "option"), [("goat", "balance_weight"), ("o-lora", "orthogonality_weight")]
)
def test_trainer_adds_extra_loss_in_training_only(tiny_model, tmp_path, method, option):
    """The balance loss of GOAT and the penalty of O-LoRA."""
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


def test_balance_loss_is_averaged_over_accumulated_micro_batches(tiny_model, tmp_path):
    """The answer loss is over both micro-batches together, the balance loss their mean."""
    data = examples(4)
    model = adapted(tiny_model("llama"), "loramoe", balance_weight=5.0).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    items = sum(label != -100 for example in data for label in example["labels"])
    for micro_batch in (data[:2], data[2:]):
        batch = dict(AnswerCollator(0)(micro_batch))
        labels = batch.pop("labels")[:, 1:].flatten()
        logits = model(**batch).logits[:, :-1].flatten(0, 1)
        answers = torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / items
        (answers + model.base_model.extra_loss(batch["attention_mask"]) / 2).backward()
    expected = gradients(model)
    one_step = {"max_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    plain = {
        "optim": "sgd",
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
    }
    trainer = make_trainer(model, tmp_path, [], count=4, save_strategy="no", **one_step, **plain)
    trainer._get_train_sampler = lambda dataset=None: torch.utils.data.SequentialSampler(data)
    trainer.train()
    moved = {
        name: before[name] - p.detach() for name, p in model.named_parameters() if name in expected
    }
    torch.testing.assert_close(moved, expected, atol=1e-5, rtol=1e-3)

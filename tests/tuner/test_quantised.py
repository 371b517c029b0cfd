"""Experts on quantised base weights: initialised from the dequantised weights, trained, saved."""

from importlib.util import find_spec
from typing import get_args

import pytest
import torch
from peft import PeftModel
from torch import nn
from torch.testing import assert_close

from badit.api import Run
from badit.models import Quantisation, load_base_model
from badit.recipe.loading import build_recipe
from badit.runs.resolved import resolve
from badit.tuner import hooks_of
from badit.tuner.targets import refuse_unsuitable_layer
from materials import make_material
from refusals import refuses
from steps import evaluate
from training.trainers import train_and_score
from tuner.extending import KEY, add, assert_same, results, trained
from tuner.helpers import CHANGE, adapt, clear_batches, layers, take_steps

# torchao needs a newer torch than the lowest version that badit supports.
needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
KINDS = [
    pytest.param(kind, marks=[needs_torchao] if "torchao" in kind else [])
    for kind in get_args(Quantisation)
]
IDS = torch.arange(3, 15)[None]
BIT_IDENTICAL = {"rtol": 0, "atol": 0, "equal_nan": True}


@pytest.fixture
def model_folder(tmp_path):
    """A model wide enough for blocks of 64 weights that share a scale."""
    make_material(tmp_path, hidden_size=128, intermediate_size=256, initializer_range=0.2)
    return tmp_path / "model"


@pytest.fixture
def load(model_folder):
    return lambda kind: load_base_model(model_folder, dtype="float32", quantisation=kind)[0]


def stored(model):
    """Returns the base model's tensors as they are stored, packed bytes and scales."""
    tensors = {}
    for name, value in model.state_dict().items():
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        by_name = {"": value} if type(value) is torch.Tensor else vars(value)
        tensors |= {
            f"{plain}{key}": tensor.clone()
            for key, tensor in by_name.items()
            if isinstance(tensor, torch.Tensor)
        }
    return {name: tensor for name, tensor in tensors.items() if "badit_" not in name}


@pytest.mark.parametrize("kind", KINDS)
def test_experts_start_as_top_singular_triples_and_keep_the_output(load, kind):
    # In training mode, because bitsandbytes uses another precision in eval mode on some CPUs.
    base = load(kind).train()
    layer = base.model.layers[0].mlp.gate_proj
    assert type(layer.weight) is not nn.Parameter
    with torch.no_grad():
        expected = base(input_ids=IDS).logits
        used_OI = layer(torch.eye(128)).T
    model = adapt(base, num_experts=4)
    expert = layers(model)[0]
    weight_OI = expert.weight_OI
    assert_close(weight_OI, used_OI, rtol=0, atol=float(weight_OI.abs().max()) * 1e-2)
    a_NI, b_ON = expert.kept_factors("default")
    u, s, vh = torch.linalg.svd(weight_OI)
    assert_close(expert.badit_config["default"].scaling * b_ON @ a_NI, (u[:, :8] * s[:8]) @ vh[:8])
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    with torch.no_grad():
        assert_close(model.train()(input_ids=IDS).logits, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("options", [{}, CHANGE], ids=["factors", "change"])
@pytest.mark.parametrize("kind", KINDS)
def test_training_lowers_the_loss_keeps_the_base_and_round_trips(load, tmp_path, kind, options):
    batch = {"input_ids": IDS, "labels": IDS.masked_fill(IDS < 9, -100)}
    losses = []
    for evaluated in (False, True):  # an evaluation changes neither the weights nor later training
        base = load(kind)
        before = stored(base)
        model = adapt(base, num_experts=4, **options)
        torch.manual_seed(0)
        hooks_of(model).start_task({"all": [batch, {**batch, "input_ids": IDS + 1}]})
        if evaluated:
            with torch.no_grad():
                model.eval()(input_ids=IDS)
        assert_close(stored(model), before, **BIT_IDENTICAL)
        optimizer = torch.optim.AdamW(
            [p for p in model.train().parameters() if p.requires_grad], lr=0.01
        )
        losses.append(take_steps(optimizer, 8, lambda model=model: model(**batch).loss))
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0] / 2
    assert_close(stored(model), before, **BIT_IDENTICAL)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    again = PeftModel.from_pretrained(load(kind), str(tmp_path / "adapter")).train()
    with torch.no_grad():
        assert_close(again(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=1e-4, atol=1e-4)
    assert_close(stored(model.unload()), before, **BIT_IDENTICAL)


@pytest.mark.parametrize("key", ["layer", "embedding"])
@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_found_by_the_gradients_of_quantised_models(load, capsys, kind, key):
    base = load(kind)
    before = stored(base)
    model = adapt(base, **{**CHANGE, "num_experts": 4, "key": key})
    first = layers(model)[0]
    random_CK, in_order_N = first.badit_codes["default"].clone(), first.expert_of("default").clone()
    hooks_of(model).start_task(clear_batches())
    assert "random" not in capsys.readouterr().err
    assert not torch.equal(first.badit_codes["default"], random_CK)
    assert any(not torch.equal(layer.expert_of("default"), in_order_N) for layer in layers(model))
    assert_close(stored(model), before, **BIT_IDENTICAL)


def test_base_weights_repacked_for_the_cpu_are_refused(load):
    base = load("bnb-4bit").eval()
    with torch.no_grad():
        # Repacks the weight on a CPU with AVX-512 BF16; elsewhere the flag below simulates it.
        base(input_ids=IDS)
    base.model.layers[1].mlp.gate_proj.weight.quant_state.packing_format_for_cpu = True
    refuses(r"has been evaluated on a CPU.*load the model again", adapt, base, num_experts=4)


@pytest.mark.parametrize("kind", KINDS)
def test_recipe_with_a_quantised_model_trains_and_scores(recipe_values, kind):
    recipe = build_recipe(recipe_values, [f"model.quantisation={kind}"])
    scores = train_and_score(recipe)
    losses = Run(recipe.output).metrics["loss"].tolist()
    assert losses[-1] < losses[0]
    assert evaluate(Run(recipe.output), progress=False) == scores


def test_unsupported_quantisation_is_refused(recipe_values, model_folder, monkeypatch):
    class WQLinear(nn.Module):
        qweight = torch.zeros(2, 2, dtype=torch.int32)

    message = r"mlp\.up is a WQLinear, quantised by GPTQ or AWQ: BADIT cannot read"
    refuses(message, refuse_unsuitable_layer, WQLinear(), "mlp.up", "BADIT")
    full = build_recipe(
        {**recipe_values, "method": {"name": "full"}}, ["model.quantisation=bnb-8bit"]
    )
    refuses(r"model\.quantisation: full cannot train quantised base weights", resolve, full)
    refuses(
        "unknown 'bnb-8' .did you mean 'bnb-8bit'",
        load_base_model,
        model_folder,
        quantisation="bnb-8",
    )
    monkeypatch.setattr("badit.models.quantisation.find_spec", lambda name: None)
    refuses(
        r"needs bitsandbytes: pip install 'badit\[q",
        load_base_model,
        model_folder,
        quantisation="bnb-4bit",
    )


@pytest.mark.parametrize("kind", KINDS)
def test_added_tasks_leave_the_results_of_earlier_ones_bit_identical(load, kind):
    model = trained(load(kind), **KEY)
    expected = results(model, "first", "second")
    before = stored(model)
    losses = add(model, "third", steps=2)
    assert losses[1] < losses[0]
    assert_same(results(model, *expected), expected)
    for name, tensor in stored(model).items():
        assert_close(tensor, before[name], **BIT_IDENTICAL)

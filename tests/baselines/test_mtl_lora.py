"""MTL-LoRA: its formula row by row, its start, and how every row gets its task in training and generation."""

import copy
import json
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, PeftType, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

import reference
from badit.baselines import BASELINES
from badit.baselines.mtl_lora import MtlLoraConfig, MtlLoraLinear, MtlLoraModel
from badit.errors import BaditError
from badit.tuner import hooks_of
from badit.tuner.model import register
from tuner.helpers import enable_checkpointing, forward, padded, random_rows

pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file in  - :UserWarning")  # PEFT 0.19

IN, OUT = 12, 10
TASKS = ["cities", "rivers", "seas"]
ROWS = ["rivers", "cities", "rivers"]
KINDS = ("linear", "linear without bias", "conv1d")
FAMILIES = ("llama", "gpt2", "gemma2")
PARTS = ("A", "B", "lambda", "task_logits")
IDS, MASK = padded(random_rows(6, 11, 9))


def config(**options):
    small = {"num_experts": 3, "r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "task_type": "CAUSAL_LM", "tasks": TASKS}
    return MtlLoraConfig(**{**small, **options})


def layers(model):
    return [module for module in model.modules() if isinstance(module, MtlLoraLinear)]


@torch.no_grad()
def randomise(model, seed=0, adapter="default"):
    """An adapter as after training: A, B and Λ off their start; the weights of the B's start at random."""
    generator = torch.Generator().manual_seed(seed)
    for layer in layers(model):
        for parameters, size in ((layer.badit_A, 0.1), (layer.badit_B, 0.1), (layer.badit_lambda, 0.5)):
            parameter = parameters[adapter]
            parameter.add_((size * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype))
    return model


def adapt(model, **options):
    torch.manual_seed(0)
    return get_peft_model(model, config(**options)).eval()


def adapted(model, **options):
    return randomise(adapt(model, **options))


class OneLayer(nn.Module):
    """A base model of a single layer."""

    def __init__(self, kind):
        super().__init__()
        if kind == "conv1d":
            self.layer = Conv1D(OUT, IN)
            nn.init.normal_(self.layer.weight)
            nn.init.normal_(self.layer.bias)
        else:
            self.layer = nn.Linear(IN, OUT, bias=kind == "linear")

    def forward(self, x):
        return self.layer(x)


def one_layer(kind="linear", dtype=torch.float64, **options):
    torch.manual_seed(0)
    options = {"target_modules": ["layer"], "task_type": None, **options}
    return randomise(get_peft_model(OneLayer(kind), config(**options)).to(dtype)).eval()


def naive(layer, x, rows):
    """y = W x + b + s Σ_k softmax(w_t / τ)_k B_k Λ_t A x, one position after another."""
    options, base = layer.badit_config["default"], layer.get_base_layer()
    W = reference.float64(base.weight.T if isinstance(base, Conv1D) else base.weight)
    A, B, Lambda, w = (reference.float64(getattr(layer, f"badit_{part}")["default"]) for part in PARTS)
    x_, r, y = reference.float64(x), options.r, np.zeros((*x.shape[:-1], OUT))
    for where in np.ndindex(*x.shape[:-1]):
        task = TASKS.index(rows[where[0]])
        powers = [math.exp(w[task, k] / options.temperature) for k in range(options.num_experts)]
        y[where] = W @ x_[where] + (0 if base.bias is None else reference.float64(base.bias))
        for k, power in enumerate(powers):
            B_k = B[:, k * r : (k + 1) * r]
            y[where] += options.lora_alpha / r * power / sum(powers) * (B_k @ (Lambda[task] @ (A @ x_[where])))
    return torch.from_numpy(y)


def logits(model, rows=tuple(ROWS)):
    with torch.no_grad(), hooks_of(model).rows_of(rows):
        return forward(model, IDS, MASK).logits


def loss(model, **options):
    return forward(model, IDS, MASK, labels=IDS.masked_fill(MASK == 0, -100), **options).loss


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# --- the layer ---


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(KINDS), st.lists(st.sampled_from(TASKS), min_size=1, max_size=4), st.booleans())
def test_forward_equals_the_formula(kind, rows, with_positions):
    model = one_layer(kind)
    layer, x = layers(model)[0], torch.randn(len(rows), *([5] if with_positions else []), IN, dtype=torch.float64)
    with hooks_of(model).rows_of(rows):
        found = model(x)
    torch.testing.assert_close(found, naive(layer, x, rows), atol=1e-6, rtol=1e-6)
    assert (found - layer.get_base_layer()(x)).abs().mean() > 1e-4


def test_gradients_equal_the_naive_ones():
    model, x = one_layer(), torch.randn(3, 5, IN, dtype=torch.float64, requires_grad=True)
    layer = layers(model)[0]
    a, b, lambda_, w = trained = [getattr(layer, f"badit_{part}")["default"] for part in PARTS]
    y = []
    for row, name in enumerate(ROWS):
        task = TASKS.index(name)
        mixed = sum(g * b[:, 2 * k : 2 * k + 2] for k, g in enumerate((w[task] / 0.1).softmax(dim=-1)))
        y.append(layer.get_base_layer()(x[row]) + 2.0 * x[row] @ (mixed @ lambda_[task] @ a).T)
    upstream = torch.randn(3, 5, OUT, dtype=torch.float64)
    expected = torch.autograd.grad((torch.stack(y) * upstream).sum(), [*trained, x])
    with hooks_of(model).rows_of(ROWS):
        found = torch.autograd.grad((model(x) * upstream).sum(), [*trained, x])
    for ours, theirs in zip(found, expected, strict=True):
        assert theirs.abs().max() > 1e-3
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    for gradient in found[2:4]:  # of Λ and w: no row is of the task "seas"
        assert gradient[0].any()
        assert gradient[1].any()
        assert not gradient[2].any()


def test_the_temperature_sharpens():
    sharp, even = one_layer(temperature=1e-3), one_layer(temperature=1e3)
    for model, largest in ((sharp, 1.0), (even, 1 / 3)):
        with hooks_of(model).rows_of(ROWS):
            gates = layers(model)[0].component_gates("default", torch.zeros(3, 5, IN))
        assert gates.shape == (3, 1, 6)
        torch.testing.assert_close(gates[..., ::2].amax(dim=-1), torch.full((3, 1), largest), atol=1e-3, rtol=0)


def test_the_start(tiny_model):
    layer = layers(adapt(tiny_model("llama"), r=4, num_experts=5))[0]
    out_features, in_features = layer.weight_OI.shape
    shapes = [tuple(getattr(layer, f"badit_{part}")["default"].shape) for part in PARTS]
    assert shapes == [(4, in_features), (out_features, 20), (3, 4, 4), (3, 5)]
    assert not layer.badit_B["default"].any()
    assert torch.equal(layer.badit_lambda["default"], torch.eye(4).expand(3, 4, 4))
    for parameter, features in ((layer.badit_A["default"], in_features), (layer.badit_task_logits["default"], 5)):
        bound = 1 / math.sqrt(features)
        assert 0.7 * bound < parameter.abs().max().item() <= bound


def test_dropout_acts_in_training_only():
    model, x = one_layer(lora_dropout=0.5), torch.randn(3, 5, IN, dtype=torch.float64)
    with hooks_of(model).rows_of(ROWS):
        assert torch.equal(model(x), model(x))
        model.train()
        assert not torch.equal(model(x), model(x))


# --- the tasks ---


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_batch_is_its_rows_one_by_one(tiny_model, family):
    """In logits and in generation, with the cache and without."""
    model = adapted(tiny_model(family))
    together = logits(model)
    assert (together - logits(model, ["seas"] * 3)).abs().max() > 1e-3
    options = {"max_new_tokens": 4, "do_sample": False}
    with hooks_of(model).rows_of(ROWS):
        generated = model.generate(input_ids=IDS, attention_mask=MASK, **options)
        assert torch.equal(generated, model.generate(input_ids=IDS, attention_mask=MASK, use_cache=False, **options))
    for row, (length, name) in enumerate(zip((6, 11, 9), ROWS, strict=True)):
        ids = IDS[row : row + 1, -length:]
        with hooks_of(model).rows_of([name]):
            torch.testing.assert_close(together[row, -length:], model(input_ids=ids).logits[0], atol=1e-4, rtol=1e-4)
            assert torch.equal(generated[row, -4:], model.generate(input_ids=ids, **options)[0, -4:])


def test_beams_are_rows(tiny_model):
    model, options = adapted(tiny_model("llama")), {"num_beams": 2, "max_new_tokens": 3, "do_sample": False}
    with (
        hooks_of(model).rows_of(ROWS),
        pytest.raises(BaditError, match=r"sees 6 rows, but 3 tasks are given.*each beam"),
    ):
        model.generate(input_ids=IDS, attention_mask=MASK, **options)
    with hooks_of(model).rows_of([name for name in ROWS for _ in range(2)]):
        assert model.generate(input_ids=IDS, attention_mask=MASK, **options).shape == (3, 14)


def test_a_batch_without_its_tasks_is_refused(tiny_model):
    model = adapted(tiny_model("llama"))
    unknown = r"has learnt no task 'river' \(did you mean 'rivers'\?\): see its config's tasks"
    for names, message in ((None, "this batch does not say"), (["cities", "river"], unknown)):
        with pytest.raises(BaditError, match=message), hooks_of(model).rows_of(names):
            pass
    for door in (model, model.base_model, model.get_base_model()):
        with pytest.raises(
            BaditError, match=r"each row's task: run it within badit\.tuner\.hooks_of\(model\)\.rows_of\(names\)"
        ):
            door(input_ids=IDS)
        for names in ([], ["cities"] * 2):
            with hooks_of(model).rows_of(names), pytest.raises(BaditError, match=f"3 rows, but {len(names)} tasks"):
                door(input_ids=IDS)
        with hooks_of(model).rows_of(ROWS):
            door(input_ids=IDS)


def test_contexts_nest_and_end_with_an_error(tiny_model):
    model = adapted(tiny_model("llama"))
    outer, inner = logits(model), logits(model, ["seas"] * 3)
    with hooks_of(model).rows_of(ROWS):
        assert torch.equal(logits(model, ["seas"] * 3), inner)
        with pytest.raises(BaditError, match="3 rows, but 1 tasks"), hooks_of(model).rows_of(["seas"]):
            forward(model, IDS, MASK)
        assert torch.equal(forward(model, IDS, MASK).logits, outer)
    with pytest.raises(BaditError, match="each row's task"):
        forward(model, IDS, MASK)


def test_other_models_need_no_tasks(tiny_model):
    base = logits(tiny_model("llama"), None)
    model = adapted(tiny_model("llama"))
    with model.disable_adapter():
        assert torch.equal(logits(model, None), base)
    assert torch.equal(logits(model.unload(), None), base)
    hydra = BASELINES["hydralora"].config_cls(task_type="CAUSAL_LM")
    assert torch.equal(logits(get_peft_model(tiny_model("llama"), hydra).eval(), ["of any name"]), base)


# --- whole models ---


@pytest.mark.parametrize("family", FAMILIES)
def test_training_changes_its_own_parameters_alone_from_the_base_model_on(tiny_model, family):
    model = adapt(tiny_model(family)).train()
    assert torch.equal(logits(model), logits(tiny_model(family), None))
    expected = {f"base_model.model.{layer.name}.badit_{part}.default" for layer in layers(model) for part in PARTS}
    assert trainable(model) == expected
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        with hooks_of(model).rows_of(ROWS):
            losses.append(loss(model))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.1
    assert {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])} == expected


@pytest.mark.parametrize("alike", [True, False])
def test_from_weights_that_are_all_alike_the_Bs_would_never_part(tiny_model, alike):
    """Why the task's weights start at random."""
    model = adapt(tiny_model("llama")).train()
    if alike:
        for layer in layers(model):
            nn.init.zeros_(layer.badit_task_logits["default"])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        with hooks_of(model).rows_of(ROWS):
            loss(model).backward()
        optimizer.step()
    for layer in layers(model):
        first, second, third = layer.badit_B["default"].detach().split(2, dim=1)
        assert first.any()
        for apart in (first - second, second - third):
            assert (apart.abs().max() < 1e-6) == alike


@pytest.mark.parametrize("within", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(tiny_model, reentrant, within):
    """Nor with two passes of other tasks before one backward pass, wherever that is."""
    found = []
    for checkpoint in (False, True):
        model = adapted(tiny_model("llama")).train()
        model.enable_input_require_grads()
        if checkpoint:
            enable_checkpointing(model, reentrant)
        total = 0
        for weight, rows in ((1.0, ROWS), (3.0, ["seas"] * 3)):
            with hooks_of(model).rows_of(rows):
                total = total + weight * loss(model, use_cache=False)
        with hooks_of(model).rows_of(["cities"]) if within else nullcontext():
            total.backward()
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded(tiny_model, tmp_path, family):
    model = adapted(tiny_model(family))
    expected = logits(model)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["peft_type"], written["tasks"]) == ("BADIT_MTL_LORA", TASKS)
    for low_memory in (False, True):
        loaded = PeftModel.from_pretrained(tiny_model(family), tmp_path, low_cpu_mem_usage=low_memory).eval()
        assert torch.equal(logits(loaded), expected)
        assert loaded.peft_config["default"].to_dict() == {
            **model.peft_config["default"].to_dict(), "inference_mode": True
        }  # fmt: skip
        assert not trainable(loaded)
    again = PeftModel.from_pretrained(tiny_model(family), tmp_path, is_trainable=True)
    assert trainable(again) == trainable(model)


def test_a_bf16_base_model(tiny_model, tmp_path):
    model = adapted(tiny_model("llama", dtype=torch.bfloat16))
    assert {p.dtype for name, p in model.named_parameters() if "badit_" in name} == {torch.float32}
    assert logits(model).dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama", dtype=torch.bfloat16), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_disabled_and_unloaded_it_is_the_base_model_to_the_bit(tiny_model, family):
    model, base = adapted(tiny_model(family), target_modules="all-linear"), logits(tiny_model(family), None)
    expected = logits(model)
    assert not torch.equal(expected, base)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), expected)
    unloaded, plain = model.unload(), tiny_model(family)
    assert torch.equal(logits(unloaded, None), base)
    assert [type(module) for module in unloaded.modules()] == [type(module) for module in plain.modules()]
    assert "generate" not in vars(unloaded)
    for one, other in zip(unloaded.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(logits(adapted(unloaded, target_modules="all-linear")), expected)


def test_a_second_adapter_has_tasks_of_its_own(tiny_model):
    model = adapted(tiny_model("llama"))
    first = logits(model)
    model.add_adapter("second", config(tasks=["hills", "cities"]))
    randomise(model, seed=1, adapter="second")
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    assert not torch.equal(logits(model, ["cities"] * 3), logits(model, ["hills"] * 3))
    with pytest.raises(BaditError, match="no task 'rivers'"):
        logits(model)
    model.set_adapter("default")
    model.delete_adapter("second")
    assert not [name for name in model.state_dict() if "second" in name]
    assert torch.equal(logits(model), first)


def test_a_copy_has_tasks_of_its_own(tiny_model):
    model = adapted(tiny_model("llama"))
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied), logits(model))
    with hooks_of(model).rows_of(ROWS), pytest.raises(BaditError, match="each row's task"):
        forward(copied, IDS, MASK)
    assert "badit.MtlLoraLinear" in repr(copied)


def test_what_it_cannot_do_is_refused(tiny_model):
    model = adapted(tiny_model("llama"))
    for merge in (model.merge_and_unload, model.merge_adapter, layers(model)[0].merge):
        with pytest.raises(BaditError, match=r"no single weight to merge into; keep it as an adapter \(unload\(\)"):
            merge()
    with pytest.raises(BaditError, match="adapter_names: BADIT_MTL_LORA cannot mix adapters"):
        model(input_ids=IDS, adapter_names=["default"] * 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": []}, r"^method\.tasks: must list the names of the tasks .*, got \[\]$"),
        ({"tasks": "cities"}, r"^method\.tasks: must list the names .*, got 'cities'$"),
        ({"tasks": ["cities", 3]}, r"^method\.tasks: must list the names"),
        ({"tasks": ["a", "b", "a"]}, r"^method\.tasks: 'a' is listed more than once$"),
        ({"temperature": 0}, r"^temperature must be a positive number, got 0$"),
        ({"temperature": True}, r"^temperature must be a positive number, got True$"),
    ],
)
def test_mistakes_in_the_configuration(options, message):
    with pytest.raises(BaditError, match=message):
        config(**options)


def test_the_tasks_may_be_set_before_the_adapter_is_made_and_not_left_out(tiny_model):
    options = config(tasks=None)
    with pytest.raises(BaditError, match=r"^method\.tasks: must list the names of the tasks .*, got None$"):
        get_peft_model(tiny_model("llama"), options)
    options.tasks = TASKS
    assert len(layers(get_peft_model(tiny_model("llama"), options))) == 2


def test_published_defaults_and_name():
    options = MtlLoraConfig()
    assert (options.num_experts, options.r, options.temperature, options.scaling) == (3, 8, 0.1, 8)
    register(MtlLoraConfig, MtlLoraModel)  # again, which changes nothing
    assert options.peft_type is PeftType["BADIT_MTL_LORA"]
    assert BASELINES["mtl-lora"].config_cls is MtlLoraConfig

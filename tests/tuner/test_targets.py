"""Target modules of every model family, fused weights of MoE models, equality at step 0."""

import copy
import re
from contextlib import suppress

import peft
import pytest
import torch
from packaging.version import Version
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, T5Config, T5ForConditionalGeneration
from transformers.pytorch_utils import Conv1D

from badit import BaditConfig, OrthogonalUpdates, Regrouper
from badit.analysis.gates import adapted_layers, changed_gates, prompt_gates
from badit.export.adapter import write_adapter
from badit.export.factors import merge, mixture_factors
from badit.models import load_base_model
from badit.tuner import hooks_of
from badit.tuner.targets import base_layer, default_targets
from docs.pages import Page
from refusals import refuses
from tuner import helpers
from tuner.helpers import (
    CHANGE,
    FAMILIES,
    IDS,
    MASK,
    adapt,
    adapted,
    clear_batches,
    greedy_by_hand,
    layers,
    logits,
    padded,
    random_rows,
)

SECTION = Page("docs/integrations.md").text.split("\n## Which modules are adapted\n")[1]
SECTION = SECTION.split("\n## ")[0]
TABLE = re.findall(r"^\| ([\w, ]+) \| (`[^|]+|none[^|]+)\|$", SECTION, flags=re.MULTILINE)
DEFAULTS = {
    name: set(re.findall(r"`(\w+)`", default))
    for names, default in TABLE
    for name in names.split(", ")
}
MOE = ("mixtral", "qwen3_moe", "gpt_oss")
FUSED = ["experts.gate_up_proj", "experts.down_proj"]
LABELS = IDS.masked_fill((MASK == 0) | (torch.arange(11) < 8), -100)


@pytest.mark.parametrize("family", DEFAULTS)
def test_default_targets_are_the_documented_ones_in_every_layer(family):
    config = AutoConfig.for_model(family)
    text = config.get_text_config()
    text.num_hidden_layers = 4
    # Some have none, or derive it from the number of layers.
    with suppress(AttributeError, TypeError):
        text.layer_types = text.layer_types[:4]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    targets = default_targets(model) or set()
    if "target_modules" in DEFAULTS[family]:
        assert not targets
        return
    assert targets == DEFAULTS[family]
    names = [name for name, _ in model.named_modules() if {name, name.split(".")[-1]} & targets]
    assert all(isinstance(model.get_submodule(name), (nn.Linear, Conv1D)) for name in names)
    assert [any(f".{i}." in name for name in names) for i in range(4)] == [True] * 4
    owners = {name.split(".")[-2] for name in names}
    allowed = (
        {"self_attn"}
        if "q_proj" in targets
        else {"mlp", "shared_expert", "shared_experts", "feed_forward"}
    )
    assert owners <= allowed | {"mlp_block", "ffn"} | (
        {"0", "1", "2", "3"} if family == "opt" else set()
    )


@pytest.mark.parametrize(
    ("dtype", "targets", "atol"), [("float32", "all-linear", 1e-5), ("bfloat16", None, 0.02)]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_adapted_model_equals_the_base_model_at_step_0(tiny_model, family, dtype, targets, atol):
    base = tiny_model(family, dtype=getattr(torch, dtype))
    expected = logits(base)
    model = adapt(base, target_modules=targets)
    assert layers(model)[0].weight_OI.dtype == getattr(torch, dtype)
    assert len(layers(model)) == (2 if targets is None else 8 if family == "gpt2" else 14)
    torch.testing.assert_close(logits(model), expected, atol=atol, rtol=0)
    assert expected.std() > 0.5  # far above the tolerance


def test_encoder_decoder_needs_token_routing():
    sizes = {
        "vocab_size": 100,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
    }
    base = T5ForConditionalGeneration(
        T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0)
    ).eval()
    refuses("decoder-only models; use routing='token'", adapt, base, task_type=None)
    before = base(input_ids=IDS, attention_mask=MASK, labels=IDS).logits
    model = adapt(base, task_type=None, routing="token")
    assert {layer.name.split(".")[-1] for layer in layers(model)} == {"wi"}
    torch.testing.assert_close(
        model(input_ids=IDS, attention_mask=MASK, labels=IDS).logits, before, atol=1e-5, rtol=0
    )


def test_smollm2_equals_base_at_step_0_and_generates_as_teacher_forced():
    """Step 0 equals the base model; generation with changed weights equals decoding by hand."""
    base, tokenizer = load_base_model("smollm2-135m", dtype="float32")
    tokenizer.padding_side = "left"
    texts = [
        "Classify the sentiment of the sentence as positive or negative.",
        "What is the capital of France?",
    ]
    ids, mask = tokenizer(texts, padding=True, return_tensors="pt").values()
    expected = logits(base, ids, mask)
    options = {"init_weights": "bad", "gated": "factors", "router_input": "mean"}
    options |= {"task_type": "CAUSAL_LM"}
    model = get_peft_model(base, BaditConfig(**options)).eval()
    assert len(layers(model)) == 30
    assert (logits(model, ids, mask) - expected).abs().max() <= 1e-4
    helpers.randomise(model)
    assert torch.equal(helpers.generate(model, ids, mask, 5), greedy_by_hand(model, ids, mask, 5))
    with model.disable_adapter():
        assert torch.equal(logits(model, ids, mask), expected)


def test_modules_and_fused_weights_that_cannot_be_adapted_are_refused(tiny_model):
    for family, options, message in (
        (
            "mixtral",
            {"target_modules": ["q_proj", "gate_up_proj"]},
            "gate_up_proj is a fused weight: name it in t",
        ),
        (
            "qwen3_moe",
            {"target_parameters": ["experts.gate_proj"]},
            "no fused weight 'experts.gate_proj'",
        ),
        ("gpt_oss", {"target_parameters": FUSED, "routing": "token"}, "needs routing='prompt'"),
        (
            "gpt_oss",
            {"target_parameters": FUSED, "layers_to_transform": [0]},
            "full names instead of layers_to_t",
        ),
        (
            "gpt_oss",
            {"target_parameters": "experts.down_proj"},
            "target_parameters: input should be a valid list",
        ),
        (
            "llama",
            {"target_parameters": ["extra.conv"]},
            "extra.conv: is not a fused weight of MoE experts",
        ),
        (
            "llama",
            {"target_modules": ["codes"]},
            "codes: weights of type torch.float8_e4m3fn are not supported",
        ),
        (
            "llama",
            {"r": 11},
            r"layers\.0\.mlp\.gate_proj.*num_experts × r = 33.*lower num_experts or r",
        ),
    ):
        model = tiny_model(family)
        model.extra = nn.ParameterDict({"conv": torch.zeros(2, 3, 4)})
        model.codes = nn.Linear(8, 8).to(torch.float8_e4m3fn)
        refuses(message, adapt, model, **options)


@pytest.mark.parametrize("options", [{}, CHANGE], ids=["factors", "change"])
@pytest.mark.parametrize("family", MOE)
def test_fused_experts_forward_generate_save_and_unload(tiny_model, tmp_path, family, options):
    base = tiny_model(family)
    (ids, mask) = padded(random_rows(5, 9, 7))
    before = logits(base)
    names = set(base.state_dict())
    model = adapt(base, target_parameters=FUSED, **options)
    assert len(layers(model)) == 2 * 2 * 5
    assert layers(model)[6].name == "model.layers.0.mlp.experts.down_proj.1"
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=0)
    model = adapted(tiny_model(family), target_parameters=FUSED, **options)
    expected = logits(model)
    assert (expected - before).abs().max() > 0.5
    alone = [
        logits(model, IDS[i : i + 1, -length:], MASK[i : i + 1, -length:])
        for i, length in enumerate((6, 11, 9))
    ]
    torch.testing.assert_close(torch.cat(alone), expected, atol=2e-5, rtol=0)
    if family != "gpt_oss":  # its attention does not separate packed rows in transformers 5.24
        packed = {
            "input_ids": IDS[MASK.bool()][None],
            "position_ids": (MASK.cumsum(dim=1) - 1)[MASK.bool()][None],
        }
        torch.testing.assert_close(
            model(**packed, use_cache=False).logits[0].detach(), expected, atol=2e-5, rtol=0
        )
    assert torch.equal(helpers.generate(model, ids, mask), greedy_by_hand(model, ids, mask, 6))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(family), tmp_path)), expected)
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=0)
    plain = model.unload()
    assert torch.equal(logits(plain), before)
    assert set(plain.state_dict()) == names
    assert "forward" not in vars(plain.model.layers[0].mlp.experts)


@pytest.mark.parametrize("key", ["layer", "embedding"])
@pytest.mark.parametrize("family", MOE)
def test_codes_are_found_by_the_gradients_of_fused_experts(tiny_model, capsys, family, key):
    """An expert that few prompts reach has random codes."""
    options = {**CHANGE, "key": key}
    model = adapt(tiny_model(family), target_parameters=FUSED, **options)
    before = logits(model)
    first = {layer: layer.expert_of("default").clone() for layer in layers(model)}
    hooks_of(model).start_task(clear_batches())
    said = capsys.readouterr().err
    assert "at least 0.1" not in said, said  # the line of no reliable layer
    moved = [
        layer
        for layer, in_order_N in first.items()
        if (layer.expert_of("default") != in_order_N).any()
    ]
    assert len(moved) > len(first) / 2
    torch.testing.assert_close(logits(model), before, atol=0, rtol=0)


@pytest.mark.parametrize("family", [*FAMILIES, *MOE])
def test_adapted_model_equals_base_model_with_the_mixture_merged(tiny_model, family):
    """For one prompt the gates are fixed.

    A matrix of a fused weight is routed by the prompt's tokens that reach it.
    """
    ids, mask = padded(random_rows(9))
    options = {"target_parameters": FUSED} if family in MOE else {"target_modules": "all-linear"}
    model = adapted(tiny_model(family), **options)
    plain = tiny_model(family)
    gates = {}
    read = {}
    for layer in layers(model):

        def spy(adapter, x, layer=layer, route=layer._route):
            gates[layer.name] = route(adapter, x).flatten()
            read[layer.name] = x.flatten()
            return route(adapter, x)

        layer._route = spy
    expected = logits(model, ids, mask)
    assert family in MOE or (logits(plain, ids, mask) - expected).abs().max() > 0.5
    with torch.no_grad():
        for layer in layers(model):
            base_layer(plain, layer.name).weight.add_(
                layer.get_delta_weight("default", gates[layer.name])
            )
    seen = {}
    for name in (
        ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts") if family in MOE else ()
    ):
        plain.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.update({name: args})
        )
    torch.testing.assert_close(logits(plain, ids, mask), expected, atol=1e-3, rtol=1e-4)
    for name, (hidden, chosen, _) in seen.items():
        for index in range(5):
            reach = hidden[(chosen == index).any(dim=-1)]
            mean = reach.mean(dim=0) if len(reach) else torch.zeros(hidden.shape[1])
            torch.testing.assert_close(
                read[f"{name}.gate_up_proj.{index}"], mean, atol=1e-3, rtol=1e-3
            )


@pytest.mark.parametrize("options", [{}, CHANGE], ids=["factors", "change"])
@pytest.mark.parametrize("family", MOE)
def test_gradients_of_fused_experts_equal_finite_differences(tiny_model, family, options):
    model = adapted(tiny_model(family), target_parameters=FUSED, **options).double().train()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def loss(model):
        return model(input_ids=IDS, attention_mask=MASK, labels=LABELS).loss

    loss(model).backward()
    gradients = helpers.gradients(model)
    assert gradients.keys() == parameters.keys()
    kinds = ["badit_A.", "badit_B."] + ([] if options else ["badit_router."])
    for kind in kinds:
        moved = {name: torch.randn_like(p) for name, p in parameters.items() if kind in name}
        ends = []
        for step in (1e-4, -2e-4):
            with torch.no_grad():
                for name, direction in moved.items():
                    parameters[name].add_(step * direction)
                ends.append(loss(model).double())
        slope = sum((gradients[name] * direction).sum() for name, direction in moved.items())
        torch.testing.assert_close((ends[0] - ends[1]) / 2e-4, slope, rtol=0.02, atol=1e-3)
    again = copy.deepcopy(model)
    helpers.enable_checkpointing(again, reentrant=False)
    loss(again).backward()
    loss(model).backward()
    torch.testing.assert_close(helpers.gradients(again), helpers.gradients(model))


@pytest.mark.parametrize("change", [{}, CHANGE], ids=["factors", "change"])
@pytest.mark.parametrize("family", MOE)
def test_fused_experts_train_with_regrouping_and_export_to_plain_lora(
    tiny_model, tmp_path, family, change
):
    options = {"target_parameters": FUSED, "target_modules": ["q_proj"], **change}
    model = adapt(tiny_model(family), **options).train()
    hooks_of(model).start_task({"all": [{"input_ids": IDS, "labels": LABELS}]})
    # The gates of clusters are smaller than a router's.
    optimizer = OrthogonalUpdates(model, lr=6e-3 if change else 2e-3)
    regrouper = Regrouper(model, total_steps=8, every=4)
    # The tokens are so few that some matrices receive none.
    batch = {"input_ids": IDS[:1, -5:], "labels": LABELS[:1, -5:]}
    losses = helpers.take_steps(
        optimizer, 8, lambda: model(**batch).loss, regrouper.after_backward, regrouper.step
    )
    assert losses[-1] < 0.8 * losses[0]
    assert regrouper.metrics["components_moved"] > 0
    assert all(p.isfinite().all() for p in model.parameters())

    model = adapted(tiny_model(family), **options)
    gates = prompt_gates(
        model, {"one": [{"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}]}
    )
    assert gates.by_task["one"].shape == (3, 2 + 2 * 2 * 5, 3)
    fixed = {layer.name: torch.rand(3).tolist() for layer in layers(model)}
    with changed_gates(
        adapted_layers(model),
        lambda experts, gates: torch.tensor(fixed[experts.layer.name]).expand(3, 1, -1),
    ):
        expected = logits(model)
    factors = mixture_factors(model, fixed)
    plain = model.unload()
    write_adapter(tmp_path, factors, plain, "base")
    # Older versions cannot load even PEFT's own LoRAs of these models.
    if Version(peft.__version__) >= Version("0.21"):
        loaded = PeftModel.from_pretrained(tiny_model(family), tmp_path)
        torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=0)
    merge(plain, factors)
    torch.testing.assert_close(logits(plain), expected, atol=1e-5, rtol=0)

"""Which modules are adapted by default in every documented family, and the fused weights of MoE models."""

import copy
import re
from contextlib import suppress

import peft
import pytest
import torch
from packaging.version import Version
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from badit import OrthogonalUpdates, Regrouper
from badit.analysis.gates import adapted_layers, changed_gates, prompt_gates
from badit.errors import BaditError
from badit.export import merge, mixture_factors, write_adapter
from badit.tuner.targets import default_targets
from docs.pages import Page
from tuner.helpers import (
    IDS,
    MASK,
    adapt,
    adapted,
    enable_checkpointing,
    generate,
    gradients,
    greedy_by_hand,
    layers,
    logits,
    mixture_of_one_prompt,
    padded,
    random_rows,
)

TABLE = re.findall(r"^\| ([\w, ]+) \| (`[^|]+|none[^|]+)\|$", Page("docs/peft.md").text, flags=re.MULTILINE)
DEFAULTS = {name: set(re.findall(r"`(\w+)`", default)) for names, default in TABLE for name in names.split(", ")}
MOE = ("mixtral", "qwen3_moe", "gpt_oss")
FUSED = ["experts.gate_up_proj", "experts.down_proj"]
LABELS = IDS.masked_fill(MASK == 0, -100)
LABELS[:, :8] = -100


@pytest.mark.parametrize("family", DEFAULTS)
def test_the_default_is_the_documented_one_in_every_layer(family):
    config = AutoConfig.for_model(family)
    text = config.get_text_config()
    text.num_hidden_layers = 4
    if getattr(text, "layer_types", None):
        with suppress(AttributeError):  # some derive it from the number
            text.layer_types = text.layer_types[:4]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found = default_targets(model) or set()
    if "target_modules" in DEFAULTS[family]:
        assert not found
        return
    assert found == DEFAULTS[family]
    names = [name for name, _ in model.named_modules() if {name, name.split(".")[-1]} & found]
    assert all(isinstance(model.get_submodule(name), (nn.Linear, Conv1D)) for name in names)
    assert [any(f".{i}." in name for name in names) for i in range(4)] == [True] * 4
    owners = {name.split(".")[-2] for name in names}
    allowed = {"self_attn"} if "q_proj" in found else {"mlp", "shared_expert", "shared_experts", "feed_forward"}
    assert owners <= allowed | {"mlp_block", "ffn"} | ({"0", "1", "2", "3"} if family == "opt" else set())


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        (
            "mixtral",
            {"target_modules": ["q_proj", "gate_up_proj"]},
            "gate_up_proj is a fused weight: name it in target_p",
        ),
        ("qwen3_moe", {"target_parameters": ["experts.gate_proj"]}, "no fused weight 'experts.gate_proj'"),
        ("gpt_oss", {"target_parameters": FUSED, "routing": "token"}, "needs routing='prompt'"),
        ("gpt_oss", {"target_parameters": FUSED, "layers_to_transform": [0]}, "whole names in place of layers_to_t"),
        ("gpt_oss", {"target_parameters": "experts.down_proj"}, "must be a list of names"),
        ("llama", {"target_parameters": ["extra.conv"]}, "extra.conv: is no fused weight of MoE experts"),
    ],
)
def test_fused_weights_that_cannot_be_adapted_are_refused(tiny_model, family, options, message):
    model = tiny_model(family)
    model.extra = nn.ParameterDict({"conv": torch.zeros(2, 3, 4)})
    with pytest.raises(BaditError, match=message):
        adapt(model, **options)


@pytest.mark.parametrize("family", MOE)
def test_fused_experts_are_adapted_from_step_0_to_unloading(tiny_model, tmp_path, family):
    base, (ids, mask) = tiny_model(family), padded(random_rows(5, 9, 7))
    before, names = logits(base), set(base.state_dict())
    model = adapt(base, target_parameters=FUSED)
    assert len(layers(model)) == 2 * 2 * 5
    assert layers(model)[6].name == "model.layers.0.mlp.experts.down_proj.1"
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=0)
    model = adapted(tiny_model(family), target_parameters=FUSED)
    expected = logits(model)
    assert (expected - before).abs().max() > 0.5
    alone = [
        logits(model, row[keep.bool()][None], keep[keep.bool()][None]) for row, keep in zip(IDS, MASK, strict=True)
    ]
    torch.testing.assert_close(torch.cat(alone), expected, atol=2e-5, rtol=0)
    if family != "gpt_oss":  # whose attention does not tell packed rows apart in transformers 5.24
        packed = {"input_ids": IDS[MASK.bool()][None], "position_ids": (MASK.cumsum(dim=1) - 1)[MASK.bool()][None]}
        found = model(**packed, use_cache=False).logits[0].detach()
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    assert torch.equal(generate(model, ids, mask), greedy_by_hand(model, ids, mask, 6))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(family), tmp_path)), expected)
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=0)
    plain = model.unload()
    assert torch.equal(logits(plain), before)
    assert set(plain.state_dict()) == names
    assert "forward" not in vars(plain.model.layers[0].mlp.experts)


@pytest.mark.parametrize("family", MOE)
def test_a_matrix_routes_on_the_prompts_tokens_that_reach_it(tiny_model, family):
    """The mixture of one prompt, written into the fused weights of a plain model, gives the same logits."""
    ids, mask = padded(random_rows(9))
    model, plain = adapted(tiny_model(family), target_parameters=FUSED), tiny_model(family)
    expected, gates, read = mixture_of_one_prompt(model, ids, mask)
    with torch.no_grad():
        for layer in layers(model):
            experts, parameter, index = layer.name.rsplit(".", 2)
            delta_OI = layer.get_delta_weight("default", gates[layer.name])
            matrix = getattr(plain.get_submodule(experts), parameter)[int(index)]
            matrix.add_(delta_OI.T if family == "gpt_oss" else delta_OI)
    seen = {}
    for name in ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts"):
        plain.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args}))
    torch.testing.assert_close(logits(plain, ids, mask), expected, atol=1e-3, rtol=1e-4)
    for name, (hidden, chosen, _) in seen.items():
        for index in range(5):
            reach = hidden[(chosen == index).any(dim=-1)]
            mean = reach.mean(dim=0) if len(reach) else torch.zeros(hidden.shape[1])
            torch.testing.assert_close(read[f"{name}.gate_up_proj.{index}"], mean, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("family", MOE)
def test_gradients_are_those_of_finite_differences(tiny_model, family):
    model = adapted(tiny_model(family), target_parameters=FUSED).double().train()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def loss():
        return model(input_ids=IDS, attention_mask=MASK, labels=LABELS).loss

    loss().backward()
    found = gradients(model)
    assert found.keys() == parameters.keys()
    for kind in ("badit_A.", "badit_B.", "badit_router."):
        moved = {name: torch.randn_like(p) for name, p in parameters.items() if kind in name}
        ends = []
        for step in (1e-4, -2e-4):
            with torch.no_grad():
                for name, direction in moved.items():
                    parameters[name].add_(step * direction)
                ends.append(loss())
        slope = (ends[0] - ends[1]) / 2e-4
        torch.testing.assert_close(
            slope, sum((found[n] * d).sum() for n, d in moved.items()), rtol=0.02, atol=1e-3, check_dtype=False
        )
    again = copy.deepcopy(model)
    enable_checkpointing(again, reentrant=False)
    for one in (model, again):
        one(input_ids=IDS, attention_mask=MASK, labels=LABELS).loss.backward()
    torch.testing.assert_close(gradients(again), gradients(model))


@pytest.mark.parametrize("family", MOE)
def test_training_regroups_every_matrix_and_the_export_is_peft_s_own(tiny_model, tmp_path, family):
    options = {"target_parameters": FUSED, "target_modules": ["q_proj"]}
    model = adapt(tiny_model(family), **options).train()
    optimizer, regrouper = OrthogonalUpdates(model, lr=2e-3), Regrouper(model, total_steps=8, every=4)
    losses = []
    for _ in range(8):  # so few tokens that some matrices see none
        loss = model(input_ids=IDS[:1, -5:], labels=LABELS[:1, -5:]).loss
        loss.backward()
        losses.append(loss.item())
        regrouper.after_backward()
        optimizer.step()
        optimizer.zero_grad()
        regrouper.step()
    assert losses[-1] < 0.8 * losses[0]
    assert regrouper.metrics["components_moved"] > 0
    assert all(p.isfinite().all() for p in model.parameters())

    model = adapted(tiny_model(family), **options)
    gates = prompt_gates(model, {"one": [{"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}]})
    assert gates.by_task["one"].shape == (3, 2 + 2 * 2 * 5, 3)
    fixed = {layer.name: torch.rand(3).tolist() for layer in layers(model)}
    with changed_gates(
        adapted_layers(model), lambda one, own: torch.tensor(fixed[one.layer.name])[one.expert_of_N].expand(3, 1, -1)
    ):
        expected = logits(model)
    factors = mixture_factors(model, fixed)
    plain = model.unload()
    write_adapter(tmp_path, factors, plain, "base")
    if Version(peft.__version__) >= Version("0.21"):  # older ones cannot load their own LoRAs of these models
        loaded = PeftModel.from_pretrained(tiny_model(family), tmp_path)
        torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=0)
    merge(plain, factors)
    torch.testing.assert_close(logits(plain), expected, atol=1e-5, rtol=0)

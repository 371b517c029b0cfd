"""Training with gated change: regrouping without rescaling, resets, resuming."""

import numpy as np
import pytest
import torch

from badit import BaditConfig, RegroupCallback, Regrouper
from badit.recipe.loading import build_recipe
from badit.recipe.method import resolve_method
from badit.runs.resolved import resolve
from badit.support.files import read_jsonl
from badit.training.regrouping import trainable_adapters
from badit.training.resets import changes
from badit.tuner import abilities, hooks_of
from refusals import refuses
from steps import fit, method_of
from training.trainers import (
    adapted,
    adapter_state,
    assert_same,
    contents,
    fit_until,
    learned,
    make_trainer,
    on,
)

CHANGE = {"init_weights": "bad", "gated": "change", "lora_dropout": 0.0}
KEY = {"gates": "clusters", "key": "embedding", "num_clusters": 4}
#: The paper's parts with gated change: a router, and clusters with codes from gradients.
KINDS = {
    "router": {"gates": "mean_one", "router_input": "standardised"},
    "sum 1": {"gates": "softmax", "router_input": "mean"},
    "matched": {**KEY, "codes": "matched", "router_input": "standardised"},
    "grouped": {**KEY, "codes": "grouped", "router_input": "standardised"},
}


@pytest.fixture(autouse=True)
def _codes_from_any_gradients(monkeypatch):
    monkeypatch.setattr(abilities, "LEAST_RELIABILITY", -1.0)


def _around_the_regrouping(tiny_model, folder, regroup, kind):
    """Trains with one regrouping after step 6; returns model, state before and after, trainer."""
    model = adapted(tiny_model("llama"), **CHANGE, **KINDS[kind])
    seen = []

    def look(state, keywords):
        if state.global_step == 6:
            moments = [
                (
                    name,
                    {key: value.clone() for key, value in keywords["optimizer"].state[p].items()},
                )
                for name, p in model.named_parameters()
                if p.requires_grad
            ]
            norms = [changes(*place) for _, place in trainable_adapters(model)]
            seen.append((adapter_state(model), dict(moments), norms))

    callbacks = [on("on_step_end", look), regroup, on("on_step_end", look)]
    trainer = make_trainer(model, folder, callbacks, save_strategy="no", max_steps=7)
    hooks_of(model).start_task({"all": trainer.get_train_dataloader()})
    for layer, adapter in dict(trainable_adapters(model)).values():
        # Grouped components would not move again so soon.
        labels_N = layer.expert_of(adapter)
        labels_N.copy_(labels_N.roll(1))
    trainer.train()
    lines = [line for line in read_jsonl(folder / "regroupings.jsonl") if line["step"] == 6]
    assert sum(line["components_moved"] for line in lines) > 0
    return model, lines, *seen


@pytest.mark.parametrize("kind", KINDS)
def test_published_regrouping_changes_labels_only(tiny_model, tmp_path, kind):
    _, _, before, after = _around_the_regrouping(
        tiny_model, tmp_path, RegroupCallback(every=6, stop=1.0), kind
    )
    changed = {
        name.split(".")[-2]
        for name, tensor in before[0].items()
        if not torch.equal(tensor, after[0][name])
    }
    assert changed == {"badit_expert_of"}, "initial factors stay with their components"
    for moments, later in zip(before[1].values(), after[1].values(), strict=True):
        assert_same(moments, later)


@pytest.mark.parametrize("kind", KINDS)
def test_resets_move_only_the_smallest_changes_and_touch_no_other_component(
    tiny_model, tmp_path, kind
):
    model, lines, before, after = _around_the_regrouping(
        tiny_model, tmp_path, RegroupCallback(every=6, stop=1.0, reset_smallest=0.75), kind
    )
    places = dict(trainable_adapters(model))
    for line, norm_N in zip(lines, before[2], strict=True):
        old_N, new_N = np.array(line["previous_labels"]), np.array(line["labels"])
        moved_N = old_N != new_N
        assert set(np.flatnonzero(moved_N)) <= set(np.argsort(norm_N)[: round(0.75 * len(norm_N))])
        prefix = next(n for n, m in model.named_modules() if m is places[line["module"]][0])
        for name, initial, rows in (
            ("badit_A", "badit_A0", lambda t: t),
            ("badit_B", "badit_B0", lambda t: t.T),
        ):
            key = f"{prefix}.{name}.default"
            was, now, start = (
                rows(tensor)
                for tensor in (
                    before[0][key],
                    after[0][key],
                    after[0][f"{prefix}.{initial}.default"],
                )
            )
            assert torch.equal(now[moved_N], start[moved_N])
            assert not torch.equal(was[moved_N], start[moved_N]) or not moved_N.any()
            assert torch.equal(now[~moved_N], was[~moved_N])
            was, now = rows(before[1][key]["exp_avg"]), rows(after[1][key]["exp_avg"])
            assert was[moved_N].any() or not moved_N.any()
            assert not now[moved_N].any()
            assert torch.equal(now[~moved_N], was[~moved_N])
            # Otherwise Adam's next steps would be several times larger than those of the others.
            assert torch.equal(before[1][key]["exp_avg_sq"], after[1][key]["exp_avg_sq"])
        np.testing.assert_array_equal(
            changes(*places[line["module"]])[~moved_N] > 0, norm_N[~moved_N] > 0
        )


def test_initial_factors_stay_with_their_component(tiny_model):
    """The output with other labels is that of the formula, component by component."""
    model = adapted(tiny_model("llama"), **CHANGE, **KINDS["router"]).eval()
    layer, adapter = next(iter(dict(trainable_adapters(model)).values()))
    with torch.no_grad():
        for factor in layer.factors(adapter):
            factor.add_(0.1 * torch.randn_like(factor))
    layer.expert_of(adapter).copy_(torch.tensor([3, 0, 1, 2, 0, 3, 2, 1]))
    gates_K = torch.rand(4)
    (a, b), (a0, b0) = layer.factors(adapter), layer.kept_factors(adapter)
    expected = sum(
        gates_K[expert] * (torch.outer(b[:, i], a[i]) - torch.outer(b0[:, i], a0[i]))
        for i, expert in enumerate(layer.expert_of(adapter))
    )
    actual = layer.get_delta_weight(adapter, gates_K) / layer.badit_config[adapter].scaling
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_training_resumes_bit_identically(recipe_values, kind):
    recipe_values["method"] |= {**CHANGE, **KINDS[kind], "lora_dropout": 0.1}
    recipe_values["method"]["regroup"] = {"every": 3, "stop": 1.0, "reset_smallest": 0.5}
    whole = fit(build_recipe(recipe_values, ["output=" + recipe_values["output"] + "-whole"]))
    stopped = fit_until(7, build_recipe(recipe_values))
    fit(build_recipe(recipe_values), progress=False)
    assert_same(learned(stopped), learned(whole))
    assert contents(stopped.path) == contents(whole.path)


def test_conflicting_options_of_regrouping_are_refused(tiny_model, recipe_values):
    change = {"name": "badit", "init_weights": "bad", "gated": "change"}
    scaled = r"regroup\.rescale: with gated='change', it would also multiply the initial factors"
    refuses(f"^method.{scaled}", method_of, {**change, "regroup": {"rescale": True}})
    initial = r"regroup\.reset_smallest: needs gated='change' and init_weights='bad'"
    for other in ({"gated": "factors"}, {"gated": "change", "init_weights": "lora"}):
        refuses(
            f"^method.{initial}",
            method_of,
            {"name": "badit", **other, "regroup": {"reset_smallest": 0.05}},
        )
    for unused in ({"solver": "paper"}, {"restarts": 0}):
        refuses(
            r"^regroup\.reset_smallest: exchanges components without a solver",
            RegroupCallback,
            reset_smallest=0.1,
            **unused,
        )
    for share in (0, 1.5, "all", True):
        refuses(r"^regroup\.reset_smallest: input should be", RegroupCallback, reset_smallest=share)

    model = adapted(tiny_model("llama"), **CHANGE, **KINDS["router"])
    refuses(scaled, Regrouper, model, 10, rescale=True)
    refuses("reset_smallest: needs optimizer=", Regrouper, model, 10, reset_smallest=0.1)
    sgd = torch.optim.SGD(model.parameters())
    adam = torch.optim.AdamW(model.parameters())
    few = r"reset_smallest: 0\.01 of 8 components is less than two.*; set at least 0\.25"
    refuses(few, Regrouper, model, 10, reset_smallest=0.01, optimizer=adam)
    refuses("got SGD", Regrouper, model, 10, reset_smallest=0.1, optimizer=sgd)
    plain = adapted(tiny_model("llama"))
    adam = torch.optim.AdamW(plain.parameters())
    refuses(initial, Regrouper, plain, 10, reset_smallest=0.1, optimizer=adam)

    recipe_values["method"] = {**change, "regroup": {"reset_smallest": 0.05}}
    recipe_values["training"]["optimizer"] = "orthogonal"
    refuses(
        r"method\.regroup\.reset_smallest: resets Adam's moments; use adamw or lora\+",
        resolve,
        build_recipe(recipe_values),
    )


def test_rescaling_is_resolved_with_the_gates():
    def rescale(**options):
        resolved = resolve_method({"name": "badit", **options, "regroup": {}})
        assert resolved.section["regroup"]["rescale"] == resolved.regroup.rescale
        return resolved.regroup.rescale

    assert rescale(init_weights="lora") is True
    assert rescale(gated="factors") is True
    assert rescale(init_weights="bad", gated="change") is False
    assert rescale(init_weights="lora", gated="change") is True, "the initial B is zero"
    assert BaditConfig(init_weights="lora", gated="change").gates_change is False

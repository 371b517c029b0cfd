"""Tasks that are added to a trained adapter: earlier results, training, files, refusals."""

from functools import partial

import pytest
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from transformers import LlamaForSequenceClassification

from badit.tuner import badit_layer, hooks_of
from badit.tuner.extension import Parts, ability_factors, ability_gram, parts_of
from refusals import refuses
from tuner.extending import KEY, add, assert_same, batches_of, results, trained
from tuner.helpers import (
    CLUSTERS,
    adapt,
    config,
    enable_checkpointing,
    generate,
    layers,
    packed_logits,
    take_steps,
)

KINDS = {
    "key": KEY,
    "layers": {**CLUSTERS, "init_weights": "lora"},
    "gated change": {**KEY, "init_weights": "bad", "gated": "change"},
    "bad with clusters": {**KEY, "init_weights": "bad"},
    "router": {"gates": "mean_one", "router_input": "standardised", "init_weights": "lora"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_earlier_tasks_stay_bit_identical_after_three_extensions(tiny_model, kind):
    model = trained(tiny_model("llama"), **KINDS[kind])
    expected = results(model, "first", "second")
    for task in ("third", "fourth"):
        losses = add(model, task)
        assert losses[-1] < losses[0]
        assert_same(results(model, *expected), expected)
        expected |= results(model, task)
        assert not torch.equal(expected[task][0], expected["first"][0])


def test_only_the_new_expert_is_trained(tiny_model):
    model = trained(tiny_model("llama"), **KEY)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    add(model, "third")
    trained_names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(".badit_extensions." in name for name in trained_names)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    add(model, "fourth")
    trained_names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.rsplit(".", 1)[1] for name in trained_names} == {"A_2", "B_2", "gates_2"}
    unchanged = model.state_dict()
    assert all(torch.equal(unchanged[name], value) for name, value in after.items())


@pytest.mark.parametrize("kind", ["key", "gated change"])
def test_new_directions_are_orthogonal_to_all_frozen_ones(tiny_model, kind):
    model = trained(tiny_model("llama"), **KINDS[kind])
    for number, task in enumerate(("third", "fourth"), start=1):
        hooks_of(model).add_tasks([task], rank=3)
        hooks_of(model).start_task(batches_of(task))
        for layer in layers(model):
            extensions = layer.badit_extensions["default"]
            new = extensions.of("A", number)
            frozen = [layer.badit_A["default"], *layer.badit_A0.values()]
            frozen += [extensions.of("A", earlier) for earlier in range(1, number)]
            products = torch.nn.functional.normalize(torch.cat(frozen), dim=1) @ new.T
            assert products.abs().max() < 1e-5
            torch.testing.assert_close(new @ new.T, torch.eye(3) / 3, atol=1e-5, rtol=0)
            assert not extensions.of("B", number).any()


def test_without_a_complement_the_directions_are_those_of_the_gradient(tiny_model, capsys):
    model = trained(tiny_model("llama"), **KEY)
    for layer in layers(model):  # 6 components, but 32 in features: fill the space
        layer.badit_A["default"] = torch.nn.Parameter(torch.eye(32))
        layer.badit_B["default"] = torch.nn.Parameter(torch.zeros(48, 32))
        layer.badit_expert_of["default"] = torch.arange(3).repeat(11)[:32].sort().values
    hooks_of(model).add_tasks(["third"], reused=0)
    hooks_of(model).start_task(batches_of("third"))
    assert "2 of 2 layers have no directions left" in capsys.readouterr().err
    assert all(layer.badit_extensions["default"].of("A", 1).any() for layer in layers(model))


def test_rows_of_several_extensions_have_the_results_of_their_own_batches(tiny_model):
    model = trained(tiny_model("llama"), **KEY)
    add(model, "third")
    add(model, "fourth")
    parts = [batches_of(task)[task][0]["input_ids"] for task in ("first", "third", "fourth")]
    ids = torch.cat(parts)[torch.tensor([0, 4, 8, 1, 5, 9, 2])]
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    sequences = generate(model, ids[:, :5], mask[:, :5], new_tokens=4)
    for row in range(len(ids)):
        alone = generate(model, ids[row : row + 1, :5], mask[row : row + 1, :5], new_tokens=4)
        assert torch.equal(sequences[row : row + 1], alone)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits
        for row in range(len(ids)):
            alone = model(input_ids=ids[row : row + 1], attention_mask=mask[row : row + 1]).logits
            attended = mask[row].bool()
            torch.testing.assert_close(logits[row][attended], alone[0][attended])


@pytest.mark.parametrize("packed", [False, True])
def test_prompts_of_extensions_do_not_move_a_routers_moments(tiny_model, packed):
    model = trained(tiny_model("llama"), **KINDS["router"])
    add(model, "third")
    hooks_of(model).train_extensions({0})
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    own, other = (batches_of(task)[task][0] for task in ("first", "third"))

    def moments_after(batch):
        model.load_state_dict(before)
        for layer in layers(model):
            layer.gate_sums.clear()
        rows = {name: batch[name] for name in ("input_ids", "labels")}
        if packed:
            positions = torch.arange(9).repeat(len(batch["input_ids"]))[None]
            rows = {name: value.view(1, -1) for name, value in rows.items()}
            rows["position_ids"] = positions
        model(**rows, use_cache=False).loss.backward()
        return [
            (layer.badit_moments["default"].clone(), layer.gate_sums["default"])
            for layer in layers(model)
        ]

    mixed = {name: torch.cat([own[name], other[name]]) for name in ("input_ids", "labels")}
    for found, expected in zip(moments_after(mixed), moments_after(own), strict=True):
        assert not torch.equal(expected[0], torch.zeros_like(expected[0]))
        torch.testing.assert_close(found, expected)


def test_packed_rows_have_the_results_of_separate_rows(tiny_model):
    model = trained(tiny_model("llama"), **KEY)
    add(model, "third")
    rows = [batches_of(task)[task][0] for task in ("first", "third")]
    ids = torch.cat([rows[0]["input_ids"][:1], rows[1]["input_ids"][:1]])
    labels = torch.cat([rows[0]["labels"][:1], rows[1]["labels"][:1]])
    positions = torch.arange(9).repeat(2)[None]
    with torch.no_grad():
        rows = {"input_ids": ids.view(1, -1), "labels": labels.view(1, -1)}
        packed = model(**rows, position_ids=positions, use_cache=False).logits
        alone = model(input_ids=ids, labels=labels, use_cache=False).logits
    torch.testing.assert_close(packed.view_as(alone), alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_adapter_has_the_same_results_through_peft(tiny_model, tmp_path, kind):
    model = trained(tiny_model("llama"), **KINDS[kind])
    add(model, "third")
    expected = results(model, "first", "third")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path).eval()
    assert_same(results(loaded, *expected), expected)
    # Extended again after loading, in bfloat16 too.
    add(loaded, "fourth")
    assert_same(results(loaded, *expected), expected)


def test_a_cast_keeps_the_clusters(tiny_model):
    model = trained(tiny_model("llama"), **KEY)
    add(model, "third")
    holder = layers(model)[0].badit_extensions["default"]
    before = {name: value.clone() for name, value in holder.named_buffers()}
    model.to(torch.bfloat16)
    assert all(torch.equal(value, before[name]) for name, value in holder.named_buffers())
    assert holder.of("A", 1).dtype == torch.bfloat16
    results(model, "first", "third")


def test_training_rows_are_those_of_the_extension_and_others_of_their_centroid(tiny_model):
    model = trained(tiny_model("llama"), **KEY)
    add(model, "third")
    routing = layers(model)[0].routing
    found = []
    layers(model)[0].register_forward_hook(
        lambda *_: found.append(parts_of(routing, "default").whole)
    )
    batch = batches_of("first")["first"][0]
    model.train()(**batch)
    model.eval()
    model(**batch)
    with torch.no_grad():
        model(**batch)
        model(**batches_of("third", seed=5)["third"][0])
    assert found == [1, 0, 0, 1]


def test_a_pass_multiplies_only_the_experts_that_its_rows_use(tiny_model, monkeypatch):
    model = trained(tiny_model("llama"), **KEY)
    add(model, "third", rank=3, reused=1)
    add(model, "fourth", rank=5, reused=0)
    widths = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(
        "badit.tuner.extension.F.linear",
        lambda x, weight, *bias: widths.append(tuple(weight.shape)) or linear(x, weight, *bias),
    )
    results(model, "third")
    assert (3 + 2, 32) in widths  # its own rank and that of one expert
    assert all(5 + 3 not in shape for shape in widths)
    widths.clear()
    results(model, "fourth")
    assert (5, 32) in widths


def test_gradient_checkpointing_gives_the_same_losses(tiny_model):
    losses = {}
    for reentrant in (None, False):
        torch.manual_seed(0)
        model = trained(tiny_model("llama"), **KEY)
        if reentrant is not None:
            enable_checkpointing(model, reentrant)
        losses[reentrant] = add(model, "third")
    assert losses[None] == losses[False]


def test_added_tasks_are_started_before_they_are_trained_or_others_are_added(tiny_model):
    model = trained(tiny_model("llama"), **KEY)
    hooks = hooks_of(model)
    hooks.add_tasks(["third"])
    refuses("add_tasks: third was added, but its clusters", hooks.add_tasks, ["fourth"])
    (batch, *_) = batches_of("third")["third"]
    refuses("third: was added, but its prompts have no clusters yet", model.train(), **batch)
    with torch.no_grad():
        model.eval()(**batch)
    hooks.start_task(batches_of("third"))
    model.train()(**batch).loss.backward()
    hooks.add_tasks(["fourth"])


@pytest.mark.parametrize(
    ("tasks", "options", "message"),
    [
        ("third", {}, r"tasks must be a list of names, such as \['third'\]"),
        ([], {}, "tasks: "),
        ([3], {}, "tasks"),
        (["third", "third"], {}, "a name is given twice"),
        (["third"], {"clusters": 0}, "clusters: input should be greater than or equal to 1"),
    ],
)
def test_wrong_tasks_are_refused(tiny_model, tasks, options, message):
    model = trained(tiny_model("llama"), **KEY)
    refuses(message, hooks_of(model).add_tasks, tasks, **options)
    assert not model.peft_config["default"].extensions


@pytest.mark.parametrize("names", [(), ("fourth",), ("third", "fourth"), ("first",)])
def test_batches_of_other_tasks_do_not_start_an_extension(tiny_model, names):
    model = trained(tiny_model("llama"), **KEY)
    hooks = hooks_of(model)
    hooks.add_tasks(["third"])
    refuses("the tasks to start are third", hooks.start_task, batches_of(*names))
    hooks.start_task({"all": batches_of("third")["third"]})
    (batch, *_) = batches_of("third")["third"]
    model.train()(**batch).loss.backward()


def test_tasks_are_neither_compared_nor_merged_without_batches(tiny_model):
    model = trained(tiny_model("llama"), **KEY)
    refuses("batches: there are none", hooks_of(model).survey, {}, threshold=1.0)
    third = batches_of("third")
    refuses("clusters: .*greater than", hooks_of(model).survey, third, threshold=1.0, clusters=0)
    refuses("batches: there are none", hooks_of(model).merge_tasks, {})
    refuses("task third: has no batches", hooks_of(model).merge_tasks, {"third": []})


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # PEFT 0.19
def test_a_loaded_adapter_keeps_what_earlier_tasks_use(tiny_model, tmp_path):
    # PEFT before 0.21 saves no trained biases.
    bias = "all" if hasattr(BaseTuner, "_get_learnable_bias_state_dict") else "none"
    options = {**KEY, "modules_to_save": ["lm_head"], "bias": bias}
    model = trained(tiny_model("gpt2"), **options)
    add(model, "third")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("gpt2"), tmp_path, is_trainable=True)
    expected = results(loaded, "first", "second")
    (batch, *_) = batches_of("third")["third"]
    for _ in range(2):  # activated again, as a reader of several adapters would
        loaded.set_adapter("default")
        loaded.train()
        optimizer = torch.optim.SGD(loaded.parameters(), lr=0.1)
        take_steps(optimizer, 2, lambda: loaded(**batch).loss)
        assert_same(results(loaded.eval(), "first", "second"), expected)


def test_a_batch_of_frozen_experts_is_refused_in_training(tiny_model, tmp_path):
    model = trained(tiny_model("llama"), **KEY)
    add(model, "third")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path, is_trainable=True).train()
    batches = batches_of("first")
    refuses("all prompts of the batch belong to tasks whose experts", loaded, **batches["first"][0])
    loaded.eval()(**batches["first"][0])
    frozen = PeftModel.from_pretrained(tiny_model("llama"), tmp_path).train()
    frozen(**batches["first"][0])
    hooks_of(loaded).merge_tasks(batches)
    loaded.train()(**batches["first"][0]).loss.backward()


def test_clusters_of_another_adapter_do_not_make_an_adapter_extendable(tiny_model):
    model = trained(tiny_model("llama"), **KEY)
    model.add_adapter("other", config(**KEY))
    model.set_adapter("other")
    refuses("the adapter has no clusters for later tasks", hooks_of(model).add_tasks, ["third"])


def test_tasks_are_not_added_to_classifiers(tiny_model):
    model = adapt(LlamaForSequenceClassification(tiny_model("llama").config), **KEY, task_type=None)
    ids = batches_of("first")["first"][0]["input_ids"]
    hooks_of(model).start_task({"first": [{"input_ids": ids, "labels": torch.arange(4) % 2}]})
    refuses("tasks can be added to language models only", hooks_of(model).add_tasks, ["third"])


def test_refusals(tiny_model):
    model = trained(tiny_model("llama"), **KEY)
    add(model, "third", steps=1)
    hooks = hooks_of(model)
    refuses("task third: the run has a task of this name", hooks.add_tasks, ["third"])
    refuses("at most rank 32, not 64; set extend.rank=32", hooks.add_tasks, ["fourth"], rank=64)
    hooks.add_tasks(["fourth"])
    unlabelled = [{"input_ids": batches_of("fourth")["fourth"][0]["input_ids"]}]
    refuses("the batches of a new task need labels", hooks.start_task, {"fourth": unlabelled})
    for message, options in REFUSED.items():
        other = adapt(tiny_model("llama"), **options)
        refuses(message, hooks_of(other).add_tasks, ["third"])


REFUSED = {
    "routing: 'token' has no clusters of prompts": {"routing": "token"},
    "the released form cannot be extended": {"gates": "softmax", "gated": "factors"},
    "the adapter has no clusters for later tasks": KEY,
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # PEFT 0.19
@pytest.mark.parametrize(
    ("number", "options"), [(0, {}), (1, {}), (2, {}), (0, {"modules_to_save": ["lm_head"]})]
)
def test_training_an_extension_changes_its_tasks_and_those_that_use_its_expert(
    tiny_model, number, options
):
    model = trained(tiny_model("llama"), **KEY, **options, tasks=["first", "second"])
    add(model, "third", reused=0)
    add(model, "fourth", reused=4, start=1.0)
    for layer in layers(model):  # the last extension uses the expert of the first
        layer.badit_extensions["default"].of("used", 2)[0] = 3
        layer.badit_extensions["default"].of("gates", 2).data.fill_(1.0)
    hooks = hooks_of(model)
    before = results(model, "first", "second", "third", "fourth")
    hooks.train_extensions({number})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3)
    after = results(model, *before)
    changed = [task for task in before if not torch.equal(before[task][0], after[task][0])]
    assert hooks.changed_tasks({number}) == changed


def test_every_batch_trains_the_extensions_of_its_prompts(tiny_model):
    model = trained(tiny_model("llama"), **KEY)
    add(model, "third")
    # The prompts of the last batch are those of an expert that no earlier batch needs.
    batches = [*batches_of("third", rows=64)["third"], *batches_of("first", rows=4)["first"]]
    hooks = hooks_of(model)
    hooks.train_extensions(hooks.nearest_extensions({"new": batches}))
    model.train()
    for batch in batches:
        model(**batch).loss.backward()


def test_inner_products_of_experts_are_those_of_their_products(tiny_model):
    model = trained(tiny_model("llama"), **KINDS["gated change"])
    add(model, "third")
    layer = layers(model)[0]
    products = [
        (b @ a).flatten() for a, b in (ability_factors(layer, "default", k) for k in range(4))
    ]
    expected = torch.stack(products) @ torch.stack(products).T
    torch.testing.assert_close(ability_gram(layer, "default"), expected)


def test_fixed_gates_equal_the_pass_of_a_prompt(tiny_model):
    model = trained(tiny_model("llama"), **KEY)
    add(model, "third")
    layer = layers(model)[0]
    seen = []
    layer.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    with torch.no_grad():
        batch = batches_of("third")["third"][0]
        model(**batch)
        (x, y), *_ = seen
        gates = torch.tensor([0.0, 0.0, 0.0, 1.0])
        extensions = layer.badit_extensions["default"]
        gates[extensions.of("used", 1)] = extensions.of("gates", 1)
        a, b = layer.frozen_factors("default", gates)
        torch.testing.assert_close(layer.base_layer(x) + x @ a.T @ b.T, y, atol=1e-4, rtol=1e-4)


MIXED = 10.0  # a temperature with which the shares of two tasks are close to equal


def mixed(model, temperature):
    """Returns a model with two added tasks whose experts are mixed."""
    add(model, "third")
    add(model, "fourth", mixing=temperature)
    return model


def shares_of(model, batch):
    """Returns the parts of a pass by row: the extensions of a prompt and their shares."""
    routing = layers(model)[0].routing
    seen = []
    hook = layers(model)[0].register_forward_hook(
        lambda *_: seen.append(parts_of(routing, "default"))
    )
    with torch.no_grad():
        model(**batch)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "bad with clusters"])
def test_mixing_gives_the_weighted_sum_of_two_tasks_changes(tiny_model, monkeypatch, kind):
    model = mixed(trained(tiny_model("llama"), **KINDS[kind]), MIXED)
    batch = {"input_ids": batches_of("first")["first"][0]["input_ids"], "use_cache": False}
    (part, *_) = shares_of(model, batch).parts
    row = int(part.rows_R[0])
    layer = layers(model)[0]  # its input does not depend on an adapter
    outputs = []
    layer.register_forward_hook(lambda _, args, output: outputs.append(output[row]))
    with torch.no_grad():
        model(**batch)
        for number in part.numbers:
            whole = Parts((), whole=number)
            monkeypatch.setattr(badit_layer, "parts_of", lambda *_, whole=whole: whole)
            model(**batch)
    found, first, second = outputs
    share, other = part.share_RX[0].tolist()
    assert 0.1 < share < 0.9
    torch.testing.assert_close(found, share * first + other * second, atol=1e-5, rtol=1e-4)


def test_clear_prompts_keep_their_bits_with_mixing(tiny_model):
    model = trained(tiny_model("llama"), **KEY)
    add(model, "third")
    expected = results(model, "first", "second", "third")
    add(model, "fourth", mixing=1e-4)
    assert_same(results(model, *expected), expected)


@pytest.mark.parametrize("kind", ["key", "router"])
def test_mixed_prompts_have_the_same_results_in_batches_caches_and_packed_rows(tiny_model, kind):
    model = mixed(trained(tiny_model("llama"), **KINDS[kind]), MIXED)
    parts = [batches_of(task)[task][0]["input_ids"][:2] for task in ("first", "third", "fourth")]
    ids = torch.cat(parts)
    labels = ids.where(torch.arange(9) > 4, -100)
    found = {len(part.numbers) for part in shares_of(model, {"input_ids": ids}).parts}
    assert found == {2}
    tokens = generate(model, ids[:, :5], torch.ones_like(ids[:, :5]), new_tokens=3)
    with torch.no_grad():
        logits = model(input_ids=ids, labels=labels, use_cache=False).logits
        torch.testing.assert_close(packed_logits(model, ids, labels), logits, atol=1e-4, rtol=1e-4)
        for row in range(len(ids)):
            one = slice(row, row + 1)
            alone = model(input_ids=ids[one], labels=labels[one], use_cache=False).logits
            torch.testing.assert_close(logits[one], alone, atol=1e-4, rtol=1e-4)
            prompt = ids[one, :5]
            of_row = generate(model, prompt, torch.ones_like(prompt), new_tokens=3)
            assert torch.equal(tokens[one], of_row)


def test_mixing_is_saved_and_training_passes_do_not_mix(tiny_model, tmp_path):
    model = mixed(trained(tiny_model("llama"), **KEY), MIXED)
    expected = results(model, "first", "third", "fourth")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path).eval()
    assert_same(results(loaded, *expected), expected)
    batch = batches_of("first")["first"][0]
    assert shares_of(loaded, batch).whole is None
    loaded.train()
    assert shares_of(loaded, batch).whole == 0


def test_experts_whose_factors_are_gated_are_not_mixed(tiny_model):
    model = trained(tiny_model("llama"), **{**KEY, "init_weights": "bad", "gated": "factors"})
    add_mixed = partial(hooks_of(model).add_tasks, ["third"])
    refuses("extend.mixing: with gated='factors'", add_mixed, mixing=0.01)


def test_mixing_does_not_depend_on_autocast(tiny_model):
    model = mixed(trained(tiny_model("llama"), **KEY), 0.05)
    batch = {"input_ids": batches_of("first")["first"][0]["input_ids"], "use_cache": False}
    expected = shares_of(model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = shares_of(model, batch)
    assert len(found.parts) == len(expected.parts)
    for part, of_part in zip(found.parts, expected.parts, strict=True):
        assert part.numbers == of_part.numbers
        assert torch.equal(part.rows_R, of_part.rows_R)
        torch.testing.assert_close(part.share_RX, of_part.share_RX)


def test_prompts_between_the_same_tasks_are_one_part(tiny_model):
    model = mixed(trained(tiny_model("llama"), **KEY), MIXED)
    batches = [batches_of(task)[task][0]["input_ids"] for task in ("first", "third", "fourth")]
    parts = shares_of(model, {"input_ids": torch.cat(batches), "use_cache": False}).parts
    numbers = [part.numbers for part in parts]
    assert numbers == sorted({tuple(sorted(of_part)) for of_part in numbers})
    assert any(len({*part.share_RX.argmax(dim=1).tolist()}) == 2 for part in parts)


def test_a_later_extension_keeps_the_temperature(tiny_model):
    model = trained(tiny_model("llama"), **KEY)
    add(model, "third", mixing=MIXED)
    add(model, "fourth")
    hooks = hooks_of(model)
    assert hooks.peft_config["default"].mixing == MIXED
    # Any prompt may mix the expert that is trained further.
    assert set(hooks.changed_tasks([1])) == {"the run's tasks", "third", "fourth"}
    hooks.add_tasks(["fifth"], mixing=0.0)
    assert hooks.peft_config["default"].mixing == 0


@pytest.mark.parametrize("mixing", [-0.01, float("nan"), "warm"])
def test_a_wrong_temperature_is_refused(tiny_model, mixing):
    model = trained(tiny_model("llama"), **KEY)
    refuses("mixing: input should be", partial(hooks_of(model).add_tasks, ["third"]), mixing=mixing)


def test_only_training_passes_force_the_new_task(tiny_model):
    model = trained(tiny_model("llama"), **KEY)
    (batch, *_) = batches_of("first")["first"]
    with torch.no_grad():
        expected = model(**batch).logits
    add(model, "third")
    assert torch.equal(model(**batch).logits, expected)  # such as the gradients of an analysis
    assert not torch.allclose(model.train()(**batch).logits, expected)


def test_later_tasks_need_one_active_adapter(tiny_model):
    model = trained(tiny_model("llama"), **KEY)
    model.add_adapter("other", model.peft_config["default"])
    model.base_model.set_adapter(["default", "other"])
    message = r"later tasks need one active adapter, but 2 are active; call set_adapter\(NAME\)"
    refuses(message, hooks_of(model).add_tasks, ["third"])
    refuses(message, hooks_of(model).survey, batches_of("third"), threshold=1.0)

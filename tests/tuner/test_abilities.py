"""Abilities in the tuner: gated change, the key of a prompt, and codes from gradients."""

import copy
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy, normalize
from transformers import LlamaForSequenceClassification, LlamaForTokenClassification

from badit.method.abilities import code_overlap
from badit.tuner import abilities, hooks_of
from badit.tuner.abilities import Gradients, evidence_of_key, evidence_of_layers
from badit.tuner.answers import answer_logits
from badit.tuner.badit_layer import BaditLinear
from badit.tuner.examples import Example
from badit.tuner.keys import frozen_embedding
from refusals import refuses
from tuner.helpers import (
    CLUSTERS,
    adapt,
    clear_batches,
    config,
    generate,
    layers,
    packed_logits,
    randomise,
    teacher_forced,
)

KEY = {**CLUSTERS, "key": "embedding"}


def _examples(batches):
    return [
        Example(ids, labels, torch.arange(9) < 5)
        for of_task in batches.values()
        for batch in of_task
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)
    ]


def _started(model, **batches):
    hooks_of(model).start_task(batches or clear_batches())
    return model


def _codes(model):
    return torch.stack([layer.badit_codes["default"] for layer in layers(model)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gates", ["clusters", "softmax", "mean_one"])
def test_gated_change_leaves_step_0_bit_identical_with_any_gates(tiny_model, gates, dtype):
    base = tiny_model("llama").to(dtype)
    ids = torch.randint(4, 90, (3, 9))
    with torch.no_grad():
        expected = base(input_ids=ids).logits
        options = {**CLUSTERS, "gates": gates}
        model = adapt(copy.deepcopy(base), init_weights="bad", gated="change", **options)
        if gates == "clusters":
            _started(model)
        else:
            for layer in layers(model):
                layer.badit_router["default"].normal_()
        assert torch.equal(model(input_ids=ids).logits, expected)
        # Dropout acts on the change only.
        for layer in layers(model):
            layer.badit_dropout["default"] = torch.nn.Dropout(0.5)
        assert torch.equal(model.train()(input_ids=ids).logits, expected)


def test_the_change_is_scaled_by_the_gates(tiny_model):
    model = _started(adapt(tiny_model("llama"), init_weights="bad", gated="change", **CLUSTERS))
    layer = layers(model)[0]
    with torch.no_grad():
        layer.badit_A["default"].add_(0.1 * torch.randn_like(layer.badit_A["default"]))
        layer.badit_B["default"].add_(0.1 * torch.randn_like(layer.badit_B["default"]))
    gates = torch.rand(3)
    scale = torch.diag(gates[layer.expert_of("default")])
    product = layer.badit_B["default"] @ scale @ layer.badit_A["default"]
    initial = layer.badit_B0["default"] @ scale @ layer.badit_A0["default"]
    expected = layer.badit_config["default"].scaling * (product - initial)
    torch.testing.assert_close(layer.get_delta_weight("default", gates), expected)


def test_a_prompt_has_one_cluster_in_all_layers_also_in_generation(tiny_model):
    model = _started(adapt(tiny_model("llama"), **KEY))
    first, *others = layers(model)
    assert all("default" not in layer.badit_key for layer in others)
    assert not any(layer.badit_centroids or layer.badit_moments for layer in layers(model))
    randomise_factors(model)
    ids = torch.cat(
        [batch["input_ids"] for batches in clear_batches(3).values() for batch in batches]
    )
    mask = torch.ones_like(ids)
    mask[::2, :2] = 0  # left padding
    prompts = ids[:, :5]
    clusters = _clusters_of(model, first, prompts, mask[:, :5])
    assert len(clusters.unique()) > 1
    sequences = generate(model, prompts, mask[:, :5], new_tokens=4)
    whole = torch.cat([mask[:, :5], torch.ones(len(ids), 4, dtype=mask.dtype)], dim=1)
    logits = teacher_forced(model, sequences, whole, 5)
    assert torch.equal(logits[:, 4:-1].argmax(dim=-1), sequences[:, 5:])
    uncached = generate(model, prompts, mask[:, :5], new_tokens=4, use_cache=False)
    assert torch.equal(uncached, sequences)


def randomise_factors(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in layers(model):
            layer.badit_B["default"].normal_(std=0.3)


def _clusters_of(model, holder, ids, mask):
    """Returns the nearest cluster of each prompt, computed one prompt at a time."""
    embedding = frozen_embedding(model.get_base_model())
    clusters = []
    for row, attended in zip(ids, mask, strict=True):
        mean = embedding(row[attended.bool()]).mean(dim=0)
        scores = holder.badit_key["default"] @ mean + holder.badit_key_offset["default"]
        clusters.append(int(scores.argmax()))
    return torch.tensor(clusters)


def test_prompts_of_different_vocabulary_have_different_clusters(tiny_model):
    model = _started(adapt(tiny_model("llama"), **{**KEY, "num_clusters": 2}))
    holder = layers(model)[0]
    clusters = []
    for batches in clear_batches(7).values():
        ids = torch.cat([batch["input_ids"] for batch in batches])[:, :5]
        clusters.append(_clusters_of(model, holder, ids, torch.ones_like(ids)))
    first, second = clusters
    assert (first == first.mode().values).float().mean() > 0.7
    assert first.mode().values != second.mode().values


def test_packed_rows_have_the_gates_of_separate_rows(tiny_model):
    model = _started(adapt(tiny_model("llama"), **KEY))
    randomise_factors(model)
    batch = clear_batches()["first"][0]
    ids, labels = batch["input_ids"], batch["labels"]
    other = clear_batches()["second"][0]
    ids = torch.cat([ids, other["input_ids"]])
    labels = torch.cat([labels, other["labels"]])
    with torch.no_grad():
        separate = model(input_ids=ids, labels=labels, use_cache=False).logits
        packed = packed_logits(model, ids, labels)
    torch.testing.assert_close(packed, separate, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("key", ["layer", "embedding"])
def test_packed_rows_and_checkpointing_give_the_codes_of_separate_rows(tiny_model, key):
    options = {**CLUSTERS, "key": key, "codes": "grouped"}

    def started(batches, checkpointing=False):
        torch.manual_seed(0)
        model = adapt(tiny_model("llama"), **options)
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return _started(model, **batches)

    def packed(batch):
        rows = {name: tensor.view(1, -1) for name, tensor in batch.items()}
        return {**rows, "position_ids": torch.arange(9).repeat(len(batch["input_ids"]))[None]}

    separate = started(clear_batches())
    others = {
        task: [packed(batch) for batch in of_task] for task, of_task in clear_batches().items()
    }
    for model in (started(others), started(clear_batches(), checkpointing=True)):
        torch.testing.assert_close(_codes(model), _codes(separate), rtol=1e-3, atol=1e-4)
        for layer, expected in zip(layers(model), layers(separate), strict=True):
            assert torch.equal(layer.expert_of("default"), expected.expert_of("default"))


@pytest.mark.parametrize("codes", ["random", "matched", "grouped", "grouped-random"])
def test_adapters_with_a_key_are_saved_and_loaded(tiny_model, tmp_path, codes):
    model = _started(adapt(tiny_model("llama"), **KEY, codes=codes))
    randomise_factors(model)
    ids = torch.randint(4, 90, (8, 7))
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_codes_follow_the_agreement_of_gradients(tiny_model):
    """Clusters of one task share experts, clusters of tasks with other answers do not."""
    torch.manual_seed(0)
    matched = _started(adapt(tiny_model("llama"), **KEY, codes="matched"))
    holder = layers(matched)[0]
    task_of = {}
    for task, batches in clear_batches().items():
        ids = torch.cat([batch["input_ids"] for batch in batches])[:, :5]
        for cluster in _clusters_of(matched, holder, ids, torch.ones_like(ids)).tolist():
            task_of.setdefault(cluster, []).append(task)
    # A cluster with prompts of both tasks agrees with neither.
    tasks = {
        cluster: names[0]
        for cluster, names in task_of.items()
        if max(map(names.count, set(names))) > 0.8 * len(names)
    }
    tasks = {cluster: max(task_of[cluster], key=task_of[cluster].count) for cluster in tasks}
    assert set(tasks.values()) == {"first", "second"}
    overlap = code_overlap(_codes(matched)).mean(dim=0)
    pairs = [(c, d) for c in tasks for d in tasks if c < d]
    same = [float(overlap[c, d]) for c, d in pairs if tasks[c] == tasks[d]]
    other = [float(overlap[c, d]) for c, d in pairs if tasks[c] != tasks[d]]
    assert min(same) > max(other)


def test_random_codes_of_groups_are_those_without_groups(tiny_model):
    def started(codes):
        torch.manual_seed(0)
        return _started(adapt(tiny_model("llama"), **KEY, codes=codes))

    random, grouped, both = map(started, ("random", "grouped", "grouped-random"))
    assert torch.equal(_codes(both), _codes(random))
    differs = False
    for layer, of_grouped, of_random in zip(*map(layers, (both, grouped, random)), strict=True):
        experts = layer.expert_of("default")
        assert torch.equal(experts, of_grouped.expert_of("default"))
        differs |= not torch.equal(experts, of_random.expert_of("default"))
    assert differs


@pytest.mark.parametrize("codes", ["matched", "grouped"])
def test_codes_have_the_norm_of_random_ones_and_balanced_experts(tiny_model, codes):
    torch.manual_seed(0)
    random = _codes(_started(adapt(tiny_model("llama"), **KEY)))
    torch.manual_seed(0)
    model = _started(adapt(tiny_model("llama"), **KEY, codes=codes))
    expected = random.norm(dim=-1).mean(dim=-1, keepdim=True).expand(random.shape[:2])
    torch.testing.assert_close(_codes(model).norm(dim=-1), expected)
    for layer in layers(model):
        assert sorted(layer.expert_of("default").tolist()) == [0, 0, 1, 1, 2, 2]


def test_the_placebo_has_the_codes_in_another_order(tiny_model):
    def codes(**options):
        torch.manual_seed(0)
        return _codes(_started(adapt(tiny_model("llama"), **KEY, codes="matched", **options)))

    own, placebo = codes(), codes(permute_codes=True)
    assert not torch.equal(own, placebo)
    for of_layer, of_placebo in zip(own, placebo, strict=True):
        torch.testing.assert_close(of_layer.sort(dim=0).values, of_placebo.sort(dim=0).values)


def test_gradients_are_those_of_single_examples(tiny_model):
    """Compares the energy of a cluster's components with autograd on its examples."""
    model = adapt(tiny_model("llama"), init_weights="bad", gated="change", **KEY)
    hooks_of(model).start_task(clear_batches())
    for layer in layers(model):
        layer.badit_codes["default"].fill_(1.0)
    rows = clear_batches()["first"][0]
    examples = [
        Example(ids, labels, torch.arange(9) < 5)
        for ids, labels in zip(rows["input_ids"], rows["labels"], strict=True)
    ]
    gradients = Gradients(model.get_base_model(), "default", layers(model))
    with torch.no_grad():
        evidence = evidence_of_key(gradients, [[], examples, []])
    loss = sum(
        cross_entropy(model(input_ids=ids[None]).logits[0, 4:-1], ids[5:])
        for ids in rows["input_ids"]
    )
    (loss / 4).backward()
    for layer, of_layer in zip(layers(model), evidence, strict=True):
        assert of_layer.present == [1]
        expected = layer.badit_B["default"].grad.square().sum(dim=0)
        expected = expected + layer.badit_A["default"].grad.square().sum(dim=1)
        torch.testing.assert_close(of_layer.energy_PN[0], expected, rtol=1e-3, atol=1e-9)


def test_layers_with_their_own_clusters_get_codes_from_gradients(tiny_model):
    """Compares the energies with autograd on each example, in the clusters of each layer."""
    options = {**CLUSTERS, "init_weights": "bad", "gated": "change", "key": "layer"}
    torch.manual_seed(0)
    random = _started(adapt(tiny_model("llama"), **options))
    torch.manual_seed(0)
    model = _started(adapt(tiny_model("llama"), **options, codes="grouped"))
    expected = (
        _codes(random).norm(dim=-1).mean(dim=-1, keepdim=True).expand(_codes(random).shape[:2])
    )
    torch.testing.assert_close(_codes(model).norm(dim=-1), expected)
    assert not torch.equal(_codes(model), _codes(random))
    for layer, other in zip(layers(model), layers(random), strict=True):
        assert torch.equal(layer.badit_centroids["default"], other.badit_centroids["default"])

    examples = _examples(clear_batches(1))
    for layer in layers(model):
        layer.badit_codes["default"].fill_(1.0)
    with torch.no_grad():
        gradients = Gradients(model.get_base_model(), "default", layers(model))
        evidence = evidence_of_layers(gradients, examples, 4)
    sums = [{} for _ in layers(model)]
    for example in examples:
        routing = layers(model)[0].routing
        model.zero_grad()
        with routing.collecting_means() as means:
            answer = model(input_ids=example.input_ids_T[None], labels=example.labels_T[None])
        answer.loss.backward()
        for layer, of_layer in zip(layers(model), sums, strict=True):
            cluster = int(layer.clusters_of("default", means[f"{layer.name}.default"][0]))
            factors = (layer.badit_B["default"].grad.T, layer.badit_A["default"].grad)
            of_layer.setdefault(cluster, []).append(torch.cat(factors, dim=1))
    for of_layer, by_cluster in zip(evidence, sums, strict=True):
        present = sorted(c for c, of_cluster in by_cluster.items() if len(of_cluster) > 1)
        assert of_layer.present == present
        means_PNP = torch.stack([torch.stack(by_cluster[c]).mean(dim=0) for c in present])
        energy_PN = means_PNP.square().sum(dim=2)
        torch.testing.assert_close(of_layer.energy_PN, energy_PN, rtol=1e-3, atol=1e-9)
        centred_PNP = means_PNP - means_PNP.mean(dim=0)
        unit_NP = normalize(centred_PNP.transpose(0, 1).flatten(1))  # joined over clusters
        torch.testing.assert_close(
            of_layer.cosines_NN.float(), unit_NP @ unit_NP.T, atol=1e-3, rtol=0
        )


@pytest.mark.parametrize("few", [False, True])
def test_codes_of_layers_are_the_same_in_every_run(tiny_model, few, monkeypatch):
    monkeypatch.setattr(abilities, "LEAST_RELIABILITY", -1.0)
    batches = {task: of_task[: 1 if few else None] for task, of_task in clear_batches().items()}
    if few:  # one prompt for each task, so most clusters are equal
        for (batch,) in batches.values():
            batch["input_ids"][:, :5] = batch["input_ids"][0, :5]
    codes = []
    for _ in range(2):
        torch.manual_seed(0)
        options = {**CLUSTERS, "key": "layer", "codes": "grouped"}
        model = _started(adapt(tiny_model("llama"), **options), **batches)
        codes.append(_codes(model))
    assert torch.equal(*codes)
    if few:
        assert all(len(codes_CK.unique(dim=0)) <= 2 for codes_CK in codes[0])


def test_copies_of_a_cluster_count_as_one(tiny_model, monkeypatch):
    """Rounding decides which of the equal centroids is nearest."""
    model = _started(adapt(tiny_model("llama"), **CLUSTERS))
    examples = _examples({task: of_task[:1] for task, of_task in clear_batches().items()})
    for layer in layers(model):
        centroids_CI = layer.badit_centroids["default"]
        centroids_CI[1::2] = centroids_CI[::2]
    gradients = Gradients(model.get_base_model(), "default", layers(model))
    nearest_first = evidence_of_layers(gradients, examples, 4)

    clusters_of = BaditLinear.clusters_of
    monkeypatch.setattr(BaditLinear, "clusters_of", lambda *args: clusters_of(*args) // 2 * 2 + 1)
    nearest_last = evidence_of_layers(gradients, examples, 4)
    for first, last in zip(nearest_first, nearest_last, strict=True):
        assert set(first.present) <= {0, 2}
        assert last.present == first.present
        assert last.missing == first.missing == 2 - len(first.present)


@pytest.mark.parametrize("key", ["layer", "embedding"])
def test_training_is_refused_after_an_error_in_the_gradients(tiny_model, monkeypatch, key):
    options = {**CLUSTERS, "key": key, "codes": "grouped"}
    model = adapt(tiny_model("llama"), **options)

    def fail(*args):
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Gradients, "_loss", fail)
        with pytest.raises(torch.OutOfMemoryError):
            _started(model)
    batch = clear_batches()["first"][0]
    refuses("have no clusters yet", model.train(), **batch)
    model.eval()
    _started(model)
    assert not (_codes(model) == 1).all(dim=-1).any()
    model.train()(**batch)


@pytest.mark.parametrize("key", ["layer", "embedding"])
def test_one_cluster_has_a_random_code_and_a_line_says_why(tiny_model, capsys, key):
    options = {**CLUSTERS, "key": key, "num_clusters": 1}
    torch.manual_seed(0)
    random = _codes(_started(adapt(tiny_model("llama"), **options, codes="random")))
    torch.manual_seed(0)
    model = _started(adapt(tiny_model("llama"), **options, codes="grouped"))
    assert torch.equal(_codes(model), random)
    assert capsys.readouterr().err == (
        "badit: codes='grouped': there is one cluster of prompts and no other to compare it with; "
        "codes are random, and components are grouped by singular value\n"
    )


def test_only_layers_with_unreliable_gradients_have_random_codes(tiny_model, capsys, monkeypatch):
    options = {**CLUSTERS, "key": "layer", "codes": "grouped"}
    torch.manual_seed(0)
    reliable = _codes(_started(adapt(tiny_model("llama"), **options)))

    of_layers = evidence_of_layers

    def unreliable_in_the_first(*args):
        first, *others = of_layers(*args)
        return [first._replace(reliability=0.05), *others]

    monkeypatch.setattr(abilities, "evidence_of_layers", unreliable_in_the_first)
    capsys.readouterr()
    torch.manual_seed(0)
    model = _started(adapt(tiny_model("llama"), **options))
    said = capsys.readouterr().err
    number = len(layers(model))
    assert f"are not reliable (below 0.1) in 1 of {number} layers; there, codes are random" in said
    assert torch.equal(_codes(model)[1:], reliable[1:])
    assert not torch.equal(_codes(model)[0], reliable[0])
    first = layers(model)[0].expert_of("default")
    assert torch.equal(first, first.sort().values), "not grouped"


def test_examples_of_a_cluster_are_from_all_of_its_tasks(tiny_model):
    model = _started(adapt(tiny_model("llama"), **KEY))
    examples = _examples(clear_batches(rows=12))

    def energies(examples):
        gradients = Gradients(model.get_base_model(), "default", layers(model))
        with torch.no_grad():
            evidence = evidence_of_key(gradients, [examples])
        return torch.stack([of_layer.energy_PN for of_layer in evidence])

    torch.testing.assert_close(energies(examples), energies(examples[::3]))
    assert not torch.allclose(energies(examples), energies(examples[:8]))


def test_unreliable_gradients_and_tasks_without_answers_give_random_codes(tiny_model, capsys):
    torch.manual_seed(0)
    random = _codes(_started(adapt(tiny_model("llama"), **KEY)))
    without_answers = {
        task: [{"input_ids": batch["input_ids"]} for batch in batches]
        for task, batches in clear_batches().items()
    }
    torch.manual_seed(0)
    model = _started(adapt(tiny_model("llama"), **KEY, codes="matched"), **without_answers)
    torch.testing.assert_close(_codes(model), random)
    assert "are not reliable (0.00, at least 0.1); codes are random" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # PEFT 0.19
def test_the_key_reads_the_frozen_embedding(tiny_model):
    model = _started(adapt(tiny_model("llama"), **KEY, modules_to_save=["embed_tokens"]))
    randomise_factors(model)
    ids = torch.randint(4, 90, (8, 7))
    routing = layers(model)[0].routing
    seen = []
    layer = layers(model)[0]
    layer.register_forward_hook(lambda *_: seen.append(routing.clusters("default")))
    with torch.no_grad():
        model(input_ids=ids)
        model.get_input_embeddings().modules_to_save["default"].weight.normal_()
        model(input_ids=ids)
    assert torch.equal(*seen)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # PEFT 0.19
def test_trained_and_saved_embeddings_do_not_move_the_clusters(tiny_model, tmp_path):
    options = {**KEY, "codes": "matched", "modules_to_save": ["embed_tokens"]}
    model = _started(adapt(tiny_model("llama"), **options)).train()
    ids = torch.randint(4, 90, (16, 7))
    before = _clusters(model.eval(), ids)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=10.0)
    batch = clear_batches()["first"][0]
    for _ in range(5):
        model.train()(**batch).loss.backward()
        optimizer.step()
    trained = model.get_input_embeddings()
    assert not torch.equal(
        trained.modules_to_save["default"].weight, trained.original_module.weight
    )
    assert torch.equal(_clusters(model.eval(), ids), before)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    assert torch.equal(_clusters(loaded, ids), before)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def _clusters(model, ids):
    """Returns the clusters of prompts that the layers see in a forward pass."""
    layer = layers(model)[0]
    seen = []
    hook = layer.register_forward_hook(lambda *_: seen.append(layer.routing.clusters("default")))
    with torch.no_grad():
        model(input_ids=ids)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("when", ["before", "after"])
def test_resized_embeddings_keep_the_clusters(tiny_model, when):
    ids = torch.randint(4, 90, (16, 7))
    model = _started(adapt(tiny_model("llama"), **KEY))
    before = _clusters(model, ids)
    if when == "before":
        base = tiny_model("llama")
        base.resize_token_embeddings(110, mean_resizing=False)
        resized = adapt(base, **KEY)
        resized.load_state_dict(
            {name: t for name, t in model.state_dict().items() if "badit_" in name}, strict=False
        )
    else:
        resized = model
        resized.resize_token_embeddings(110, mean_resizing=False)
    assert torch.equal(_clusters(resized, ids), before)
    assert _clusters(resized, ids + 19).max() < 4


@pytest.mark.parametrize("tied", [False, True])
def test_tied_embeddings_have_the_codes_of_untied_ones(tiny_model, tied):
    base = tiny_model("llama", tie_word_embeddings=tied)
    if not tied:
        base.lm_head.weight = torch.nn.Parameter(base.model.embed_tokens.weight.detach().clone())
    torch.manual_seed(0)
    model = _started(adapt(base, **KEY, codes="matched"))
    expected = tiny_model("llama", tie_word_embeddings=True)
    torch.manual_seed(0)
    expected = _started(adapt(expected, **KEY, codes="matched"))
    assert torch.equal(_codes(model), _codes(expected))


class _Int8Embedding(torch.nn.Embedding):
    """Stores rounded numbers and one scale."""

    def __init__(self, embedding):
        super().__init__(embedding.num_embeddings, embedding.embedding_dim)
        self.scale = embedding.weight.detach().abs().max() / 127
        rounded = (embedding.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = torch.nn.Parameter(rounded, requires_grad=False)

    def forward(self, ids):
        return self.weight[ids].float() * self.scale


def test_quantised_embeddings_are_read_as_the_model_uses_them(tiny_model):
    base, plain = tiny_model("llama"), tiny_model("llama")
    quantised = _Int8Embedding(base.get_input_embeddings())
    base.set_input_embeddings(quantised)
    with torch.no_grad():
        plain.get_input_embeddings().weight.copy_(quantised(torch.arange(100)))
    ids = torch.randint(4, 90, (16, 7))
    found = []
    for model in (base, plain):
        torch.manual_seed(0)
        model = _started(adapt(model, **KEY, codes="matched"))
        found.append((_codes(model), _clusters(model, ids)))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("codes", ["random", "matched", "grouped"])
def test_equal_clusters_of_few_prompts_have_equal_codes(tiny_model, codes, monkeypatch):
    monkeypatch.setattr(abilities, "LEAST_RELIABILITY", -1.0)
    batches = {task: of_task[:1] for task, of_task in clear_batches().items()}
    for (batch,) in batches.values():
        batch["input_ids"][:, :5] = batch["input_ids"][0, :5]  # one prompt for each task
    options = {**KEY, "num_clusters": 6, "codes": codes}
    model = _started(adapt(tiny_model("llama"), **options), **batches)
    for codes_CK in _codes(model):
        assert len(codes_CK.unique(dim=0)) == 2
    clusters = [_clusters(model, batch["input_ids"][:, :5]) for (batch,) in batches.values()]
    first, second = (_codes(model)[0][of_task] for of_task in clusters)
    assert not torch.equal(first[0], second[0])


def test_prompts_with_equal_mean_embeddings_are_refused(tiny_model):
    ids = torch.stack([torch.arange(10, 16), torch.arange(15, 9, -1)])
    batches = {"all": [{"input_ids": ids}]}
    model = adapt(tiny_model("llama"), **KEY)
    refuses(
        "^start_task: 2 different prompts have equal mean token embeddings.*key='layer'",
        hooks_of(model).start_task,
        batches,
    )
    refuses("have no clusters yet", model.train(), input_ids=ids)
    single = adapt(tiny_model("llama"), **{**KEY, "num_clusters": 1})
    hooks_of(single).start_task(batches)
    same = adapt(tiny_model("llama"), **KEY)
    hooks_of(same).start_task({"all": [{"input_ids": ids[[0, 0]]}]})
    assert len(_codes(same)[0].unique(dim=0)) == 1


def test_clusters_without_answers_keep_random_codes_and_say_so(tiny_model, capsys):
    batches = clear_batches()
    for batch in batches["second"]:
        batch["labels"][:] = -100
    for codes in ("matched", "grouped"):
        torch.manual_seed(0)
        random = _codes(_started(adapt(tiny_model("llama"), **KEY), **clear_batches()))
        torch.manual_seed(0)
        model = _started(adapt(tiny_model("llama"), **KEY, codes=codes), **batches)
        is_random_LC = (_codes(model) == random).all(dim=-1)
        assert 0 < is_random_LC.sum() < is_random_LC.numel()
        assert (is_random_LC == is_random_LC[0]).all(), "the same clusters in all layers"
        said = capsys.readouterr().err
        assert f"{int(is_random_LC[0].sum())} of 4 clusters have no gradients" in said


@pytest.mark.parametrize("key", ["layer", "embedding"])
def test_a_line_says_that_a_task_has_no_answers(tiny_model, capsys, key):
    batches = clear_batches()
    for batch in batches["second"]:
        batch["labels"][:] = -100
    _started(adapt(tiny_model("llama"), **KEY | {"key": key}, codes="grouped-random"), **batches)
    said = capsys.readouterr().err
    examples = len(_examples(batches))
    without = len(_examples({"second": batches["second"]}))
    assert f"{without} of {examples} prompts have no answer; components are grouped by" in said


def test_frozen_adapters_get_the_codes_of_others(tiny_model):
    options = {**KEY, "codes": "grouped"}
    torch.manual_seed(0)
    expected = _codes(_started(adapt(tiny_model("llama"), **options)))
    torch.manual_seed(0)
    model = adapt(tiny_model("llama"), **options)
    model.requires_grad_(False)
    assert torch.equal(_codes(_started(model)), expected)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("broken", [0.0, float("nan")])
def test_zero_and_non_finite_gradients_give_random_codes(tiny_model, capsys, broken):
    base = tiny_model("llama")
    with torch.no_grad():
        base.lm_head.weight.mul_(broken)
    torch.manual_seed(0)
    random = _codes(_started(adapt(tiny_model("llama"), **KEY)))
    torch.manual_seed(0)
    model = _started(adapt(base, **KEY, codes="grouped"))
    assert torch.equal(_codes(model), random)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "are not reliable (0.00, at least 0.1); codes are random" in said


def test_an_example_with_non_finite_gradients_does_not_count(tiny_model):
    model = _started(adapt(tiny_model("llama"), init_weights="bad", gated="change", **KEY))
    with torch.no_grad():
        model.get_input_embeddings().weight[99] = float("nan")
    batch = clear_batches()["first"][0]

    def energy(*last_ids):
        gradients = Gradients(model.get_base_model(), "default", layers(model))
        rows = [ids.clone() for ids in batch["input_ids"][:2].repeat(2, 1)]
        examples = [Example(ids, batch["labels"][0], torch.arange(9) < 5) for ids in rows]
        for last in last_ids:
            ids = batch["input_ids"][0].clone()
            ids[4] = last
            examples.append(Example(ids, batch["labels"][0], torch.arange(9) < 5))
        with torch.no_grad():
            evidence = evidence_of_key(gradients, [examples])
        return torch.stack([of_layer.energy_PN for of_layer in evidence])

    assert energy(99, 99).isfinite().all()
    torch.testing.assert_close(energy(99, 99), energy())


def test_embeddings_that_are_not_finite_are_refused(tiny_model):
    base = tiny_model("llama")
    with torch.no_grad():
        base.model.embed_tokens.weight[3] = float("nan")
    model = adapt(base, **KEY)
    refuses("key='embedding': .*NaN or infinite", hooks_of(model).start_task, clear_batches())
    refuses("have no clusters yet", model.train(), input_ids=torch.ones(1, 3, dtype=torch.long))


def test_trained_embeddings_without_a_frozen_copy_are_reported(tiny_model, capsys):
    model = adapt(tiny_model("llama"), **KEY)
    model.get_input_embeddings().weight.requires_grad_()
    _started(model)
    assert "the token embeddings are trained" in capsys.readouterr().err


@pytest.mark.parametrize("embedding", [None, torch.nn.Linear(3, 3), NotImplementedError])
def test_models_without_a_table_of_embeddings_are_refused(tiny_model, monkeypatch, embedding):
    def get(self):
        if embedding is NotImplementedError:
            raise embedding
        return embedding

    base = tiny_model("llama")
    monkeypatch.setattr(type(base), "get_input_embeddings", get)
    refuses(
        "key='embedding': LlamaForCausalLM has no table of token embeddings", adapt, base, **KEY
    )


def test_classifiers_get_random_codes(tiny_model, capsys):
    config = tiny_model("llama").config
    ids = torch.stack(
        [batch["input_ids"][0] for of_task in clear_batches().values() for batch in of_task]
    )
    for kind, labels in (
        (LlamaForSequenceClassification, torch.arange(len(ids)) % 2),
        (LlamaForTokenClassification, ids % 2),
    ):
        model = adapt(kind(config), **KEY, codes="matched", task_type=None)
        _started(model, all=[{"input_ids": ids, "labels": labels}])
        said = capsys.readouterr().err
        assert f"{kind.__name__} does not predict the next token" in said
        assert "not reliable" not in said
        model.train()(input_ids=ids, labels=labels).loss.backward()


def test_weights_divided_by_zero3_give_the_key_and_random_codes(tiny_model, capsys, monkeypatch):
    torch.manual_seed(0)
    expected = _started(adapt(tiny_model("llama"), **KEY))
    divided = []
    zero = SimpleNamespace(
        GatheredParameters=lambda weights: divided.extend(weights) or nullcontext()
    )
    monkeypatch.setitem(sys.modules, "deepspeed.runtime.zero", zero)
    torch.manual_seed(0)
    model = adapt(tiny_model("llama"), **KEY, codes="grouped")
    for parameter in model.get_base_model().parameters():
        parameter.ds_id = 0
    _started(model)
    assert divided[0] is model.get_input_embeddings().weight
    assert torch.equal(_codes(model), _codes(expected))
    holder, other = layers(model)[0], layers(expected)[0]
    assert torch.equal(holder.badit_key["default"], other.badit_key["default"])
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "DeepSpeed has divided the weights" in said
    by_layer = adapt(tiny_model("llama"), **CLUSTERS)
    next(by_layer.parameters()).ds_id = 0
    refuses("start_task: DeepSpeed has divided", hooks_of(by_layer).start_task, clear_batches())


def test_examples_of_one_batch_have_similar_lengths():
    lengths = [30, 100, 95, 79, 81, 20, 24, 25]
    ids = [torch.arange(length) for length in lengths]
    batches = abilities._of_similar_length([Example(row, row, row > 2) for row in ids])
    made = [[len(example.input_ids_T) for example in batch] for batch in batches]
    assert made == [[100, 95, 81], [79], [30, 25], [24, 20]]


def test_the_base_model_called_with_embeddings_or_conflicting_options_is_refused(tiny_model):
    model = _started(adapt(tiny_model("llama"), **KEY))
    embedded = model.get_input_embeddings()(torch.randint(4, 90, (2, 7)))
    refuses("key='embedding'.*call the whole model with input_ids", model, inputs_embeds=embedded)
    refuses("key: 'embedding' needs gates='clusters'", config, key="embedding")
    refuses(
        "codes: 'matched' needs key='embedding'", config, **CLUSTERS, key="layer", codes="matched"
    )
    for codes in ("random", "grouped-random"):
        refuses("permute_codes: needs codes", config, **KEY, codes=codes, permute_codes=True)


def test_randomised_adapters_can_be_merged_into_an_equal_lora(tiny_model):
    """At fixed gates the change is a LoRA of rank 2N."""
    model = _started(adapt(tiny_model("llama"), init_weights="bad", gated="change", **KEY))
    randomise(model)
    layer = layers(model)[0]
    a_PI, b_OP = layer.frozen_factors("default", torch.rand(3))
    assert a_PI.shape[0] == b_OP.shape[1] == 12


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # PEFT 0.19
def test_a_head_that_reads_only_answers_is_refused(tiny_model):
    model = adapt(tiny_model("llama"), **KEY, target_modules=["gate_proj", "lm_head"])
    batch = {"input_ids": torch.randint(4, 90, (6, 9))}
    batch["labels"] = batch["input_ids"].where(torch.arange(9) > 4, -100)
    _started(model, all=[batch])
    message = r"lm_head: the input has shape \(1, 24, 32\), but the batch has \(6, 24\); leave it"
    refuses(message, answer_logits, model, {"input_ids": batch["input_ids"]}, batch["labels"])

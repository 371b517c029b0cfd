"""One adapted layer against a naive loop over experts: outputs, gradients, running moments."""

import warnings

import numpy as np
import pytest
import torch
from peft import PeftModel

import reference
from badit.tuner import BaditConfig, BaditLinear, hooks_of
from badit.tuner.context import ForwardPass, RoutingContext
from refusals import refuses
from tuner.helpers import CLUSTERS, KINDS, adapt, base_layer, config, layers, logits, randomise

IN = 12
OUT = 10
GATES = ("mean_one", "softmax")
MASK = torch.tensor([[0, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 1, 0]]).bool()
OPTIONS = [
    *(
        {"routing": r, "gates": g, "top_k": k}
        for r in ("prompt", "token")
        for g in GATES
        for k in (None, 1, 2)
    ),
    *(
        {"init_weights": w, "router_input": r}
        for w in ("bad", "lora", "directions")
        for r in ("mean", "standardised")
    ),
    CLUSTERS,
    {**CLUSTERS, "gated": "change"},
    *({"routing": r, "gates": g, "gated": "change"} for r in ("prompt", "token") for g in GATES),
]


def naive_gates(layer, x, mask):
    """Returns gates per position (batch, positions, K) or per prompt (batch, 1, K)."""
    options = layer.badit_config["default"]
    seen = x
    if options.routing == "prompt":
        seen = torch.stack([row[prompt].mean(dim=0) for row, prompt in zip(x, mask, strict=True)])[
            :, None
        ]
    if options.router_input == "standardised":
        mean, variance = layer.badit_moments["default"].double()
        seen = 8 / IN**0.5 * (seen - mean) / variance.sqrt()
    if options.gates == "clusters":
        return layer.badit_codes["default"][
            (seen @ layer.badit_centroids["default"].T.double()).argmax(dim=-1)
        ]
    logits = seen @ layer.badit_router["default"].T
    if options.top_k is not None:
        logits = logits.scatter(-1, logits.argsort(dim=-1)[..., : -options.top_k], float("-inf"))
    return logits.softmax(dim=-1) * (options.num_experts if options.gates == "mean_one" else 1)


def naive_forward(layer, x, mask):
    """Returns y = W x + b + s·Σ_k gate_k B_k A_k x − s·B0 A0 x, computed one expert at a time."""
    options = layer.badit_config["default"]
    gates = naive_gates(layer, x, mask)
    y = layer.get_base_layer()(x)
    for k in range(options.num_experts):
        mine = layer.expert_of("default") == k
        a_k = layer.badit_A["default"][mine]
        b_k = layer.badit_B["default"][:, mine]
        y = y + options.scaling * gates[..., k : k + 1] * (x @ a_k.T @ b_k.T)
    a0, b0 = layer.kept_factors("default") if options.subtracted_share else (None, None)
    if options.gates_change:
        gates_N = gates[..., layer.expert_of("default")]
        y = y - options.scaling * ((gates_N * (x @ a0.T)) @ b0.T)
    elif options.subtracted_share:
        y = y - options.scaling * (x @ a0.T @ b0.T)
    return y


def make(kind="linear", *, dtype=torch.float64, at_start=False, **options):
    layer = BaditLinear(
        base_layer(kind, IN, OUT).to(dtype), "layer", RoutingContext(), "default", config(**options)
    )
    layer.set_adapter("default")
    return (layer if at_start else randomise(layer)).eval()


def batch(dtype=torch.float64):
    return torch.randn(3, 5, IN, dtype=dtype), MASK


def run(layer, x, mask):
    layer.routing._running = ForwardPass(
        lambda: (mask, None), begun_with_gradients=torch.is_grad_enabled()
    )
    return layer(x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_outputs_and_gradients_equal_a_loop_over_experts(kind, options):
    layer = make(kind, **options)
    (x, mask) = batch()
    x.requires_grad_()
    assert options.get("top_k") == 1 or naive_gates(layer, x, mask).std(dim=0).max() > 0.1
    output = run(layer, x, mask)
    expected = naive_forward(layer, x, mask)
    torch.testing.assert_close(output, expected, atol=1e-6, rtol=1e-6)
    trained = [x, *(p for name in layer.adapter_layer_names for p in getattr(layer, name).values())]
    upstream = torch.randn(3, 5, OUT, dtype=torch.float64)
    gradients = (torch.autograd.grad((y * upstream).sum(), trained) for y in (output, expected))
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)  # the router computes in float32


def dropped(layer, x, seed):
    """The inputs that the layer's next pass has after dropout."""
    torch.manual_seed(seed)
    return layer.badit_dropout["default"](x)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("routing", ["prompt", "token"])
def test_dropout_acts_on_the_change_of_the_initial_factors(routing, gates, seed):
    """Also with regrouped components (``randomise`` permutes the labels)."""
    layer = make(routing=routing, gates=gates, lora_dropout=0.3).train()
    x, mask = batch()
    inputs = dropped(layer, x, seed)
    torch.manual_seed(seed)
    y = run(layer, x, mask)
    gates_N = naive_gates(layer, x, mask).expand(3, 5, -1)[..., layer.expert_of("default")]
    pairs = [layer.factors("default"), layer.kept_factors("default")]
    rows = (x.flatten(0, 1), inputs.flatten(0, 1))
    options = (gates_N.flatten(0, 1), layer.badit_config["default"].scaling, 1.0)
    expected = reference.layer_output(layer.weight_OI, *rows, *pairs, *options)
    expected += reference.float64(layer.get_base_layer().bias)
    np.testing.assert_allclose(reference.float64(y).reshape(expected.shape), expected, atol=1e-5)
    assert not torch.allclose(run(layer.eval(), x, mask), y, atol=1e-2)


@pytest.mark.parametrize("routing", ["prompt", "token"])
@pytest.mark.parametrize("gates", [{"gates": "mean_one"}, {"gates": "softmax"}, {"top_k": 1}])
def test_dropout_adds_no_noise_before_the_initial_factors_change(gates, routing):
    layer = make(at_start=True, routing=routing, lora_dropout=0.5, **gates).train()
    x, mask = batch()
    y = run(layer, x, mask)
    torch.testing.assert_close(y, run(layer.eval(), x, mask), atol=1e-12, rtol=0)
    if gates == {"gates": "mean_one"}:
        torch.testing.assert_close(y, layer.get_base_layer()(x), atol=1e-12, rtol=0)


def test_dropout_of_the_change_has_exact_gradients():
    layer = make(routing="token", gates="softmax", lora_dropout=0.3).train()
    layer.badit_router["default"].data *= 0.1
    x = torch.randn(2, 3, IN, dtype=torch.float64, requires_grad=True)

    def output(x, *_):
        torch.manual_seed(1)
        return layer(x)

    factors = [layer.badit_A["default"], layer.badit_B["default"]]
    # In float64, apart from the gates, which are computed in float32.
    torch.autograd.gradcheck(output, (x, *factors), eps=1e-4, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("init_weights", "gates"),
    [
        ("bad", {}),
        *(("directions", g) for g in ({}, {"gates": "softmax"}, {"top_k": 1})),
        ("lora", {}),
    ],
    ids=str,
)
def test_layer_equals_the_base_layer_at_step_0(kind, init_weights, gates):
    layer = make(kind, dtype=torch.float32, at_start=True, init_weights=init_weights, **gates)
    x, mask = batch(torch.float32)
    output = run(layer, x, mask)
    expected = layer.get_base_layer()(x)
    A = layer.badit_A["default"]
    B = layer.badit_B["default"]
    u, s, vh = torch.linalg.svd(layer.weight_OI)
    assert not layer.badit_router["default"].any()
    assert A.any()
    if init_weights == "bad":
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(2 * B @ A, u[:, :6] * s[:6] @ vh[:6], atol=1e-5, rtol=1e-4)
    else:
        assert torch.equal(output, expected)
        assert not B.any()
    if init_weights == "directions":
        torch.testing.assert_close(3 * A @ A.T, torch.eye(6), atol=1e-5, rtol=0)
        torch.testing.assert_close(
            (3**0.5 * A * vh[:6]).sum(dim=1).abs(), torch.ones(6), atol=1e-4, rtol=0
        )


def test_only_training_passes_update_moments_and_gate_sums():
    layer = make(router_input="standardised", at_start=True)
    passes = [batch() for _ in range(3)]
    for x, mask in passes:
        layer.train()
        run(layer, x, mask)
        with torch.no_grad():  # like the reference passes of a preference loss
            run(layer, x + 1, mask)
        layer.eval()
        run(layer, x + 1, mask)
    expected = reference.prompt_moments([reference.prompt_mean(x, mask) for x, mask in passes])
    np.testing.assert_allclose(layer.badit_moments["default"], expected, atol=1e-5)
    assert layer.badit_batches["default"] == 3
    *sums, count = layer.gate_sums["default"].tolist()
    assert (count, sum(sums)) == (9, pytest.approx(27))
    before = layer.badit_moments["default"].clone()
    run(layer.train(), x * float("inf"), mask)  # an overflow is not counted
    assert torch.equal(layer.badit_moments["default"], before)
    layer.badit_router.requires_grad_(False)  # a frozen adapter does not change
    run(layer, x, mask)
    assert layer.badit_batches["default"] == 3
    layer.badit_router.requires_grad_(True)
    run(layer.to(torch.bfloat16), x.to(torch.bfloat16), mask)
    assert layer.badit_batches["default"] == 4
    assert layer.badit_moments["default"].isfinite().all()
    # Another adapter of this name.
    layer.double().update_layer("default", config(num_experts=2, r=2))
    run(layer, x, mask)


def test_clusters_are_found_once_and_saved(tiny_model, tmp_path):
    model = adapt(tiny_model("llama"), **CLUSTERS)
    ids = torch.randint(4, 90, (6, 4, 9))
    answer = torch.arange(9) > 4
    batches = [{"input_ids": row_ids, "labels": row_ids.where(answer, -100)} for row_ids in ids]
    refuses("the prompts have no clusters yet; before trainer", model.train(), **batches[0])
    hooks_of(model).start_task({"first": batches[:2], "second": batches[2:]})
    assert all(module.training for module in model.modules())
    first, second, *_ = layers(model)
    assert first.badit_batches["default"] == 1
    torch.testing.assert_close(first.badit_centroids["default"].norm(dim=1), torch.ones(4))
    assert (first.badit_codes["default"].amax(dim=1) > 0.4).any()
    assert not torch.equal(first.badit_codes["default"], second.badit_codes["default"])
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert model(**batches[0]).loss.requires_grad  # training changes none of them
    # Another task of a sequence keeps the clusters.
    hooks_of(model).start_task({"first": batches[:1]})
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    replaced = adapt(tiny_model("llama"), **CLUSTERS)
    replaced.delete_adapter("default")
    replaced.add_adapter("default", config())
    assert replaced.train()(**batches[0]).loss.isfinite()
    randomise(model.eval())
    assert len(logits(model)[:, -1].unique(dim=0)) > 1
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model))
    layer = layers(loaded)[0]
    exact = {
        name: getattr(layer, name)["default"]
        for name in layer.exact_buffers
        if "default" in getattr(layer, name)
    }
    assert layers(loaded.to(torch.bfloat16))[0].badit_A["default"].dtype == torch.bfloat16
    torch.testing.assert_close(
        {name: getattr(layer, name)["default"] for name in exact}, exact, rtol=0, atol=0
    )


def test_clusters_have_the_moments_of_their_prompts_also_without_or_with_equal_prompts():
    layer = make(**CLUSTERS)
    (x, mask) = batch()
    assert not layer.badit_router
    means = torch.randn(40, IN, dtype=torch.float64)
    layer.cluster("default", means)
    np.testing.assert_allclose(
        layer.badit_moments["default"], reference.prompt_moments([means]), rtol=1e-5, atol=1e-6
    )
    means[[0, 1, 2]] = torch.tensor([[0.0], [torch.nan], [torch.inf]]).double()
    means[3, 0] = torch.inf
    layer.cluster("default", means)  # an overflow in some prompts
    assert (layer.badit_moments["default"][1] > 0).all()
    assert layer.badit_centroids["default"].isfinite().all()
    assert len(layer.badit_centroids["default"].unique(dim=0)) == 4
    layer.cluster("default", torch.zeros(5, IN))  # such as an MoE's expert that gets no tokens
    assert layer.badit_moments["default"].isfinite().all()
    assert run(layer, x, mask).isfinite().all()
    layer.cluster("default", torch.randn(2, IN)[[0, 1, 0, 1, 1]])  # 4 clusters, 2 prompts
    assert len(layer.badit_codes["default"].unique(dim=0)) == 2
    # One prompt, and rounding.
    layer.cluster("default", torch.randn(IN) + 1e-7 * torch.randn(20, IN))
    assert not layer.badit_centroids["default"].any()


def test_prompts_are_clustered_as_training_reads_them(tiny_model, monkeypatch):
    prompts = set()

    def centroids(*batches):
        model = adapt(tiny_model("llama"), **CLUSTERS)
        hooks_of(model).start_task({"all": batches})
        return layers(model)[1].badit_centroids["default"]

    ids = torch.randint(4, 90, (6, 9))
    answer = torch.arange(9).expand(6, 9) > 4
    labels = ids.where(answer, -100)
    positions = torch.arange(9).repeat(6)[None]
    expected = centroids(
        {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    )
    assert not torch.allclose(expected, centroids({"input_ids": ids}), atol=1e-2)
    preference = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "completion_mask": answer.long(),
    }
    packed = {"input_ids": ids.view(1, -1), "labels": labels.view(1, -1), "position_ids": positions}
    for batch in (preference, packed):
        torch.testing.assert_close(centroids(batch), expected, atol=1e-4, rtol=1e-4)
    refuses("there are no batches; an iterator that was read before has none left", centroids)
    for batch in ([{"prompt": "text"}], {"input_ids": ids.tolist()}):
        refuses("a batch must be a dict of tensors", centroids, batch)
    refuses(
        "needs the batches of each task, such as",
        hooks_of(adapt(tiny_model("llama"), **CLUSTERS)).start_task,
        [],
    )

    def cluster(layer, name, means_SI):
        prompts.add(len(means_SI))
        return 4

    monkeypatch.setattr(BaditLinear, "cluster", cluster)
    centroids({**packed, "position_ids": None, "cu_seq_lens_q": torch.arange(0, 55, 9)})
    assert prompts == {6}
    divided = adapt(tiny_model("llama"), **CLUSTERS)
    divided.get_input_embeddings().weight.ds_id = 0
    refuses("DeepSpeed has divided the weights", hooks_of(divided).start_task, {})


def test_2d_input_is_routed_by_row_and_a_shape_mismatch_is_refused():
    layer = make()
    x = torch.randn(4, IN, dtype=torch.float64)
    torch.testing.assert_close(layer(x), torch.cat([layer(row[None]) for row in x]))
    torch.testing.assert_close(layer(x), layer(x[:, None])[:, 0])
    x, mask = batch()
    refuses(
        r"layer: the input has shape \(3, 4, 12\).*leave it out of target_modules",
        run,
        layer,
        x[:, :4],
        mask,
    )


def test_layers_without_prompts_are_refused_on_all_ranks(tiny_model, monkeypatch):
    batches = {"all": [{"input_ids": torch.randint(4, 90, (6, 9))}]}
    base = tiny_model("llama")
    base.unused = torch.nn.Linear(32, 48)
    model = adapt(base, **CLUSTERS, target_modules=["gate_proj", "unused"])
    refuses("no batch reaches unused; pass other", hooks_of(model).start_task, batches)
    # Another rank lacks a layer; this one would otherwise wait for it.
    monkeypatch.setattr("badit.tuner.model.any_of_all", lambda value: True)
    model = adapt(tiny_model("llama"), **CLUSTERS)
    refuses("no batch reaches a layer of another process", hooks_of(model).start_task, batches)


def test_a_moved_model_counts_its_gates_on_the_new_device(tiny_model):
    model = adapt(tiny_model("llama"), gates="mean_one").train()
    model(input_ids=torch.randint(4, 90, (2, 9)), prompt_mask=torch.ones(2, 9))
    layer = layers(model)[0]
    layer.gate_sums["default"] = layer.gate_sums["default"].to("meta")
    sums = torch.zeros(2, 3)
    with pytest.raises(NotImplementedError, match="meta"):  # moved, not added as it is
        layer._add_to_gate_sums("default", torch.ones(2, 4), sums)


@pytest.mark.parametrize("options", [{}, {"key": "embedding"}, {"gates": "mean_one"}])
def test_a_model_can_be_adapted_after_a_refused_or_interrupted_adapter(
    tiny_model, monkeypatch, options, tmp_path
):
    options = {**CLUSTERS, "gated": None, "gates": "clusters", **options}
    batch = {"input_ids": torch.randint(4, 90, (16, 9))}
    batch["labels"] = batch["input_ids"].where(torch.arange(9) > 4, -100)
    base = tiny_model("llama")
    refuses("lower num_experts or r", adapt, base, **{**options, "r": 20})
    initial_factors = BaditConfig.initial_factors
    calls = []

    def interrupted(self, *arguments):
        calls.append(self)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return initial_factors(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(BaditConfig, "initial_factors", interrupted)
        with pytest.raises(KeyboardInterrupt):
            adapt(base, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You are trying to modify a model with PEFT")
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        model = adapt(base, **options)
    hooks_of(model).start_task({"all": [batch]})
    model.train()(**batch).loss.backward()
    assert all(layer in [*model.modules()] for layer in RoutingContext.of(base).mask_readers)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model.eval()))
    assert hooks_of(loaded).has_clusters

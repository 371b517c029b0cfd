"""Routing is the same in training and generation, with any padding, other rows and any cache.

Routers are random and groupings shuffled, so that gates computed from the wrong tokens change the
logits.
"""

from contextlib import nullcontext
from itertools import chain

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForTokenClassification,
    DynamicCache,
    StaticCache,
)

from badit.analysis.gates import adapted_layers
from badit.tuner.context import RoutingContext
from refusals import refuses
from tuner import helpers
from tuner.helpers import (
    CHANGE,
    CLUSTERS,
    FAMILIES,
    adapted,
    cached_steps,
    config,
    forward,
    padded,
    random_rows,
    teacher_forced,
)

PROMPTS = random_rows(5, 9, 7)
ANSWERS = random_rows(6, 6, 6, seed=1)
ROWS = [prompt + answer for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
LENGTH = 9  # of the left-padded prompts
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def logits_of(model, ids, mask, **options):
    with torch.no_grad():
        return forward(model, ids, mask, **options).logits


@pytest.mark.parametrize(
    "options", [{}, {"routing": "token"}, {"top_k": 1}, {"gates": "softmax"}, CHANGE], ids=str
)
@pytest.mark.parametrize("family", FAMILIES)
def test_teacher_forcing_equals_cached_decoding(tiny_model, family, options):
    model = adapted(tiny_model(family), target_modules="all-linear", **options)
    inner = model.get_base_model().config
    (ids, mask) = padded(ROWS)
    forced = teacher_forced(model, ids, mask, LENGTH)[:, LENGTH - 1 :]
    for cache in (DynamicCache(config=inner), StaticCache(config=inner, max_cache_len=24)):
        torch.testing.assert_close(cached_steps(model, ids, mask, LENGTH, cache), forced, **CLOSE)
    # Without labels, prompt routing also reads the answer, which changes the logits.
    assert ((logits_of(model, ids, mask)[:, LENGTH - 1 :] - forced).abs().max() > 0.1) == (
        "routing" not in options
    )


def test_cached_decoding_with_two_active_adapters_equals_teacher_forcing(tiny_model):
    model = adapted(tiny_model("llama"))
    (ids, mask) = padded(ROWS)
    model.add_adapter("second", config(num_experts=4))
    helpers.randomise(model, "second", seed=1).base_model.set_adapter(["default", "second"])
    forced = teacher_forced(model, ids, mask, LENGTH)[:, LENGTH - 1 :]
    torch.testing.assert_close(
        cached_steps(model, ids, mask, LENGTH, DynamicCache()), forced, **CLOSE
    )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", [*FAMILIES, "opt"])  # OPT's MLP flattens positions into rows
def test_logits_do_not_depend_on_padding_or_other_rows(tiny_model, family, side):
    model = adapted(helpers.opt() if family == "opt" else tiny_model(family))
    rows = [
        prompt + answer
        for prompt, answer in zip(PROMPTS, random_rows(2, 6, 3, seed=1), strict=True)
    ]
    ids, mask = padded(rows, side)
    answers = mask.cumsum(dim=1) > torch.tensor([[len(prompt)] for prompt in PROMPTS])
    labels = ids.masked_fill(~(answers & mask.bool()), -100)
    together = logits_of(model, ids, mask, labels=labels)
    for i, (prompt, row) in enumerate(zip(PROMPTS, rows, strict=True)):
        alone = teacher_forced(model, *padded([row]), len(prompt))[0]
        torch.testing.assert_close(together[i][mask[i].bool()], alone, **CLOSE)


def test_mask_may_be_omitted_and_inputs_positional_or_embedded(tiny_model):
    model = adapted(tiny_model("llama"))
    ids, mask = padded(random_rows(7, 7))
    expected = logits_of(model, ids, mask)
    torch.testing.assert_close(model(ids).logits, expected, **CLOSE)
    torch.testing.assert_close(
        model(inputs_embeds=model.get_input_embeddings()(ids)).logits, expected, **CLOSE
    )
    torch.testing.assert_close(model.get_base_model()(ids, mask).logits, expected, **CLOSE)
    cache = {
        helpers.cache_name(model): StaticCache(
            config=model.get_base_model().config, max_cache_len=24
        )
    }
    with_long_mask = model(
        input_ids=ids, attention_mask=F.pad(mask, (0, 24 - mask.shape[1])), **cache
    ).logits
    torch.testing.assert_close(with_long_mask, expected, **CLOSE)


@pytest.mark.parametrize(
    ("labelled", "prompt_length", "message"),
    [
        ([range(9), range(9)], 1, "labels begin at the first token"),
        ([[3, 4, 7, 8], range(3, 9)], 3, "several answers"),
    ],
)
def test_ambiguous_labels_warn_once_and_prompt_mask_overrides_labels(
    tiny_model, labelled, prompt_length, message
):
    model = adapted(tiny_model("llama"))
    ids, mask = padded(random_rows(9, 9))
    labels = torch.full_like(ids, -100)
    for row, where in enumerate(labelled):
        labels[row, list(where)] = ids[row, list(where)]
    with pytest.warns(UserWarning, match=message):
        by_labels = logits_of(model, ids, mask, labels=labels)
    logits_of(model, ids, mask, labels=labels)  # a second warning would be an error
    # Also in packed rows, where TRL removes the first label of each segment.
    batch = {"input_ids": ids, "labels": F.pad(labels[:, 1:], (1, 0), value=-100)}
    batch["position_ids"] = torch.arange(9).repeat(2)
    with pytest.warns(UserWarning, match=message):
        adapted(tiny_model("llama"))(**{key: rows.reshape(1, 18) for key, rows in batch.items()})
    shifted_left = [
        F.pad(rows, (2, 0), value=fill) for rows, fill in ((ids, 0), (mask, 0), (labels, -100))
    ]
    with pytest.warns(UserWarning, match=message):
        shifted = logits_of(adapted(tiny_model("llama")), *shifted_left[:2], labels=shifted_left[2])
    torch.testing.assert_close(shifted[:, 2:], by_labels, **CLOSE)
    logits_of(adapted(tiny_model("llama"), routing="token"), ids, mask, labels=labels)
    prompt = torch.zeros_like(mask)
    prompt[:, :prompt_length] = 1
    torch.testing.assert_close(
        by_labels, logits_of(model, ids, mask, labels=ids, prompt_mask=prompt), **CLOSE
    )


def test_decoder_calls_block_masks_and_data_parallel_are_refused(tiny_model):
    from torch.nn.attention.flex_attention import create_block_mask

    ids, mask = padded(PROMPTS)
    model, by_token = (
        adapted(tiny_model("llama"), routing=routing) for routing in ("prompt", "token")
    )
    decoder = model.get_base_model().get_decoder()
    refuses(
        "the model's decoder was called by itself.*routing='token'",
        decoder,
        input_ids=ids,
        attention_mask=mask,
    )
    by_token.get_base_model().get_decoder()(input_ids=ids, attention_mask=mask)
    blocks = create_block_mask(
        lambda b, h, q, k: q >= k, B=3, H=None, Q_LEN=LENGTH, KV_LEN=LENGTH, device="cpu"
    )
    refuses(
        r"attention mask of type BlockMask.*prompt_mask=",
        model,
        input_ids=ids,
        attention_mask=blocks,
    )
    model.get_base_model()._is_replica = True  # nn.DataParallel marks its replicas this way
    refuses(r"nn\.DataParallel: .*accelerate launch", model, input_ids=ids)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"router_input": "standardised"}, CLUSTERS, CHANGE], ids=str
)
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_loss_and_gradients_of_packed_rows_equal_those_of_padded_rows(
    tiny_model, family, options, checkpointing
):
    """Rows are packed as by the padding-free collators of TRL and transformers."""
    labels = [
        [-100] * len(prompt) + answer for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)
    ]
    ids, mask = padded(ROWS, side="right")
    padded_labels = padded(labels, side="right")[0].masked_fill(mask == 0, -100)
    packed = {
        "input_ids": torch.tensor([[*chain(*ROWS)]]),
        "labels": torch.tensor([[*chain(*labels)]]),
    }
    packed["position_ids"] = torch.cat([torch.arange(len(row)) for row in ROWS])[None]
    filled = {
        key: F.pad(rows, (0, 2), value=-100 if key == "labels" else 0)
        for key, rows in packed.items()
    }
    results = []
    gate_sums = []
    for batch in (
        {"input_ids": ids, "attention_mask": mask, "labels": padded_labels},
        packed,
        filled,
    ):
        model = adapted(tiny_model(family), **options).train()
        if checkpointing:
            model.enable_input_require_grads()
            helpers.enable_checkpointing(model, reentrant=False)
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
        gate_sums.append([experts.layer.gate_sums["default"] for experts in adapted_layers(model)])
    assert any(gradient.abs().max() > 1e-3 for gradient in results[0][1:])
    for number in (1, 2):
        torch.testing.assert_close(results[number], results[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gate_sums[number], gate_sums[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("unlabelled", [0, 2])
@pytest.mark.parametrize("packed", [False, True])
def test_first_or_last_row_of_a_batch_may_have_no_labels(tiny_model, unlabelled, packed):
    """As when its answer is truncated away."""
    ids = torch.tensor(random_rows(6, 6, 6))
    labels = ids.index_fill(1, torch.arange(3), -100)
    labels[unlabelled] = -100
    batch = {"input_ids": ids, "labels": labels}
    if packed:
        batch = {name: rows.view(1, -1) for name, rows in batch.items()}
        batch["position_ids"] = torch.arange(6).repeat(3)[None]
    assert adapted(tiny_model("llama")).train()(**batch, use_cache=False).loss.isfinite()


def test_packed_segments_have_their_own_prompts_from_labels_or_mask(tiny_model):
    model = adapted(tiny_model("llama"))
    context = RoutingContext.of(tiny_model("llama").model)
    ids = torch.tensor(random_rows(9))
    expected = torch.tensor([[1, 1, 0, 0, 1, 1, 1, 0, 0]]).bool()
    labels = ids.masked_fill(expected, -100)
    positions_ = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    # As for flash attention.
    by_ends = {"labels": labels, "cu_seq_lens_q": torch.tensor([0, 4, 9, 9], dtype=torch.int32)}
    by_positions = {"labels": labels.repeat(2, 1), "position_ids": positions_.repeat(2, 1)}
    for rows, batch in (
        (1, by_ends),
        (2, by_positions),
        (1, {"position_ids": positions_, "prompt_mask": expected}),
    ):
        forward_pass = context.describe(model, {"input_ids": ids.repeat(rows, 1), **batch})
        assert torch.equal(forward_pass.prompt[0], expected.repeat(rows, 1))
        assert (
            forward_pass.prompt[1].of_BT.tolist() == [[0] * 4 + [1] * 5, [2] * 4 + [3] * 5][:rows]
        )
        padding = {"labels": torch.cat([labels, torch.full((1, 2), -100)], dim=1).repeat(rows, 1)}
        padding["position_ids"] = torch.cat(
            [positions_, torch.zeros(1, 2, dtype=torch.long)], dim=1
        ).repeat(rows, 1)
        padded_ids = torch.cat([ids, ids[:, :2]], dim=1).repeat(rows, 1)
        assert (
            not context.describe(model, {"input_ids": padded_ids, **padding}).prompt[0][:, 9:].any()
        )
        # Methods with one set of gates per row refuse packed rows.
        refuses("packing=False and padding_free=False", getattr, forward_pass, "prompt_mask_BT")


@pytest.mark.parametrize(
    ("filled_by", "decoded_by", "rows"),
    [(None, "default", 3), ("default", "other", 3), ("default", "default", 2)],
)
def test_cache_of_another_adapter_or_batch_size_is_refused(tiny_model, filled_by, decoded_by, rows):
    model = adapted(tiny_model("llama"))
    cache = DynamicCache()
    (ids, mask) = padded(ROWS)
    model.add_adapter("other", config())
    if filled_by is None:  # gates of an earlier prompt on the same cache do not count
        logits_of(model, ids[:, :3], mask[:, :3], cache=cache, use_cache=True)
        cache.reset()
    with nullcontext() if filled_by else model.disable_adapter():
        logits_of(model, ids[:, :LENGTH], mask[:, :LENGTH], cache=cache, use_cache=True)
    model.set_adapter(decoded_by)
    cache.batch_select_indices(torch.arange(rows))
    message = (
        "filled with a batch of 3 rows, but the batch now has 2"
        if rows == 2
        else "filled without the adapter"
    )
    newest = ids[:rows, LENGTH : LENGTH + 1], mask[:rows, : LENGTH + 1]
    refuses(message, logits_of, model, *newest, cache=cache, use_cache=True)


def test_failed_forward_pass_leaves_no_state(tiny_model):
    model = adapted(tiny_model("llama"))
    ids, mask = padded(PROMPTS)
    expected = logits_of(model, ids, mask)
    with pytest.raises(IndexError):
        logits_of(model, ids + 1000, mask)
    assert RoutingContext.of(model.get_base_model())._running is None
    torch.testing.assert_close(logits_of(model, ids, mask), expected)


def test_training_without_labels_warns_once(tiny_model):
    ids, mask = padded(random_rows(6, 6))
    model = adapted(tiny_model("llama")).train()
    with pytest.warns(UserWarning, match="trained without labels"):
        model(input_ids=ids, attention_mask=mask)
    model(input_ids=ids, attention_mask=mask)  # a second warning would be an error
    others = adapted(tiny_model("llama")).train()
    others(input_ids=ids, attention_mask=mask, prompt_mask=mask)
    with torch.no_grad():
        others(input_ids=ids, attention_mask=mask)
    others.eval()(input_ids=ids, attention_mask=mask)
    adapted(tiny_model("llama"), routing="token").train()(input_ids=ids, attention_mask=mask)


@pytest.mark.parametrize("kind", [BertForTokenClassification, BertForMaskedLM])
def test_labels_that_are_not_next_tokens_do_not_change_the_routing(kind):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 100}
    bert = kind(BertConfig(**sizes, num_attention_heads=4, num_labels=3)).eval()
    model = adapted(bert, task_type="TOKEN_CLS", target_modules=["intermediate.dense"])
    ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        model(input_ids=ids).logits, model(input_ids=ids, labels=torch.ones_like(ids)).logits
    )


def test_a_module_that_runs_several_times_does_not_decode_with_the_gates_of_one_run(tiny_model):
    def shared(**options):
        base = tiny_model("llama")
        base.model.layers[1].mlp = base.model.layers[0].mlp
        return adapted(base, target_modules=["gate_proj"], **options)

    ids, mask = padded(PROMPTS)
    model = shared()
    model(input_ids=ids, attention_mask=mask)
    refuses("the module runs several times in a pass", helpers.generate, model, ids, mask)
    # One key for all layers, so its gates are the same in each run.
    helpers.generate(shared(**CHANGE), ids, mask)


def test_adapted_model_can_be_pickled(tiny_model, tmp_path):
    model = adapted(tiny_model("llama")).train()
    ids, mask = padded(PROMPTS)
    model(input_ids=ids, attention_mask=mask, prompt_mask=mask).logits.sum().backward()
    torch.save(model.eval(), tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(helpers.generate(loaded, ids, mask), helpers.generate(model, ids, mask))
    assert loaded.get_base_model().generate.args == (loaded.get_base_model(),)

"""``generate`` chooses the same tokens as a teacher-forced pass in all of its modes."""

import copy
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import pytest
import torch
from transformers import (
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    MambaConfig,
    MambaForCausalLM,
)
from transformers.utils import generic

from badit.tuner.prompt import cache_of
from refusals import refuses
from tuner.helpers import (
    CHANGE,
    FAMILIES,
    NEW,
    adapted,
    forward,
    generate,
    greedy_by_hand,
    layers,
    opt,
    padded,
    random_rows,
)

ROWS = random_rows(5, 9, 7)
STATIC = {"cache_implementation": "static"}  # `generate` then passes 4-D masks to the model
EAGER = {"_attn_implementation": "eager"}


@pytest.mark.parametrize(
    ("overrides", "options"),
    [({}, {}), ({}, {"use_cache": False}), ({}, STATIC), (EAGER, STATIC)],
    ids=str,
)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_decoding_equals_teacher_forcing(
    tiny_model, family, overrides, options, monkeypatch
):
    # A deprecated name of the cache would only be logged.
    monkeypatch.setattr(generic.logger, "warning_once", pytest.fail)
    model = adapted(tiny_model(family, **overrides))
    ids, mask = padded(ROWS)
    assert torch.equal(generate(model, ids, mask, **options), greedy_by_hand(model, ids, mask, NEW))


@pytest.mark.parametrize(("family", "use_cache"), [*product(FAMILIES, [True]), ("llama", False)])
def test_batched_beam_search_equals_beam_search_of_single_rows(tiny_model, family, use_cache):
    model = adapted(tiny_model(family))
    together = generate(model, *padded(ROWS), num_beams=3, use_cache=use_cache)[:, -NEW:]
    for row, expected in zip(ROWS, together, strict=True):
        assert torch.equal(generate(model, *padded([row]), num_beams=3)[0, -NEW:], expected)


def test_generate_accepts_inputs_embeds_and_positional_input_ids(tiny_model):
    model = adapted(tiny_model("llama"))
    ids, mask = padded(ROWS)
    expected = generate(model, ids, mask)
    for use_cache in (True, False):
        options = {
            "attention_mask": mask,
            "max_new_tokens": NEW,
            "do_sample": False,
            "use_cache": use_cache,
        }
        assert torch.equal(model.base_model.generate(ids, **options), expected)
        generated = model.generate(inputs_embeds=model.get_input_embeddings()(ids), **options)
        assert torch.equal(generated, expected[:, -NEW:])


@torch.no_grad()
def continue_by_hand(model, cache, ids, mask, steps):
    """Yields the first token after a prefilled cache, then greedy ones.

    A generator, so that runs can be interleaved.
    """
    for _ in range(steps):
        yield ids
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        ids = forward(model, ids, mask, cache, use_cache=True).logits[:, -1:].argmax(-1)


@torch.no_grad()
def prefill(model, ids, mask):
    cache = DynamicCache(config=model.get_base_model().config)
    return cache, forward(model, ids, mask, cache, use_cache=True).logits[:, -1:].argmax(-1)


@pytest.mark.parametrize(
    ("family", "options"), [*((family, {}) for family in FAMILIES), ("llama", CHANGE)], ids=str
)
def test_interleaved_prompt_caches_and_copies_keep_their_gates(tiny_model, family, options):
    model = adapted(tiny_model(family), **options)
    batches = [padded(ROWS), padded(ROWS), padded(random_rows(8, 4, seed=9))]
    caches = [prefill(model, *batch) for batch in (batches[0], batches[2])]
    caches.insert(1, copy.deepcopy(caches[0]))
    runs = [
        continue_by_hand(model, *start, mask, NEW)
        for start, (_, mask) in zip(caches, batches, strict=True)
    ]
    steps = zip(*runs, strict=True)
    for tokens, batch in zip(zip(*steps, strict=True), batches, strict=True):
        assert torch.equal(torch.cat(tokens, dim=1), greedy_by_hand(model, *batch, NEW)[:, -NEW:])


def generate_from_copy(model, cache, ids):
    """Calls ``generate`` with a copy of a cache that holds the beginning of these prompts."""
    return generate(model, ids, torch.ones_like(ids), cache=copy.deepcopy(cache))


def next_tokens(model, ids, prompt_length):
    """Returns the most likely token after each position, from one full pass.

    It is routed by the first ``prompt_length`` tokens.
    """
    prompt_mask = (torch.arange(ids.shape[1]) < prompt_length).expand(len(ids), -1)
    return model(input_ids=ids, prompt_mask=prompt_mask).logits.argmax(dim=-1)


@pytest.mark.parametrize("family", ["llama", "opt"])  # OPT's MLP flattens positions into rows
def test_generate_continues_from_a_copied_prompt_cache(tiny_model, family):
    """The cache of a shared prefix keeps its gates for any appended text, until it is reset."""
    model = adapted(opt() if family == "opt" else tiny_model(family))
    cache, _ = prefill(model, *padded(random_rows(6, 6)))
    ids = torch.cat([padded(random_rows(6, 6))[0], torch.tensor([[7, 8], [9, 10]])], dim=1)
    with pytest.warns(UserWarning, match="keeps the gates of its first prompt"):
        generated = generate_from_copy(model, cache, ids)
    # A second warning is an error.
    assert torch.equal(generate_from_copy(model, cache, ids), generated)
    assert torch.equal(generated[:, 8:], next_tokens(model, generated, 6)[:, 7:-1])
    mask = torch.ones_like(ids)
    with torch.no_grad():
        continued = forward(model, ids[:, 6:], mask, copy.deepcopy(cache)).logits
        fresh = forward(model, ids, mask).logits
        assert (continued - fresh[:, 6:]).abs().max() > 0.01
        cache.reset()
        torch.testing.assert_close(
            forward(model, ids, mask, cache).logits, fresh, atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("routing", ["prompt", "token"])
def test_generation_of_a_recurrent_model_equals_one_full_pass(routing):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 100, "state_size": 4}
    mamba = MambaForCausalLM(
        MambaConfig(**sizes, pad_token_id=0, eos_token_id=None, initializer_range=0.2)
    ).eval()
    model = adapted(mamba, routing=routing, target_modules=["in_proj"])
    ids = torch.tensor([[5, 6, 7, 8]])
    generated = generate(model, ids, torch.ones_like(ids))
    assert torch.equal(generated[:, 4:], next_tokens(model, generated, 4)[:, 3:-1])
    # Earlier releases of transformers: cache_params.
    for cache in cache_of(model(ids, use_cache=True)).values():
        cache.reset()
        reset = model(ids + 9, cache=cache, use_cache=True).logits
        torch.testing.assert_close(reset, model(ids + 9).logits, atol=1e-5, rtol=1e-5)


def test_generate_in_a_second_thread_is_refused(tiny_model):
    model = adapted(tiny_model("llama"))
    ids = torch.tensor([[5, 6, 7]])
    call = generate, model, ids, torch.ones_like(ids)

    def refused_in_a_thread(*_, **__):
        with ThreadPoolExecutor() as pool:
            assert pool.submit(refuses, "another thread uses this model", *call).result()
        return torch.zeros(1, dtype=torch.bool)

    assert torch.equal(
        generate(*call[1:], stopping_criteria=[refused_in_a_thread]), generate(*call[1:])
    )


def test_prompt_cache_is_decoded_with_the_current_weights(tiny_model):
    """What ``generate`` stores is dropped when it returns: weights may change afterwards."""
    model = adapted(tiny_model("llama"))
    ids, mask = padded(random_rows(6))
    cache, first = prefill(model, ids, mask)
    ids = torch.cat([ids, first], dim=1)
    before = generate_from_copy(model, cache, ids)
    with torch.no_grad():
        for layer in layers(model):
            layer.badit_B["default"].mul_(-3)
    after = generate_from_copy(model, cache, ids)
    assert not torch.equal(before, after)
    tokens = list(continue_by_hand(model, cache, first, mask, NEW + 1))
    assert torch.equal(torch.cat(tokens, dim=1), after[:, -NEW - 1 :])


def test_prompt_lookup_decoding_equals_greedy_decoding(tiny_model):
    """The first pass of prompt lookup has candidate tokens, which are not part of the prompt."""
    model = adapted(tiny_model("llama"))
    ids, mask = padded([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
    assert torch.equal(
        generate(model, ids, mask, 12, prompt_lookup_num_tokens=3), generate(model, ids, mask, 12)
    )


@pytest.mark.parametrize("rows", [1, 3])
def test_component_gates_are_computed_twice_per_generation(tiny_model, monkeypatch, rows):
    model = adapted(tiny_model("llama"))
    first = layers(model)[0]
    times = []
    component_gates = first.component_gates
    monkeypatch.setattr(
        first, "component_gates", lambda *arguments: times.append(1) or component_gates(*arguments)
    )
    for generation in (1, 2):
        generate(model, *padded(ROWS[:rows]))
        assert len(times) == 2 * generation, (
            "expected one call for the prompt and one for the first token after it"
        )


def test_chunked_prefill_guidance_and_generate_batch_need_token_routing(tiny_model):
    by_prompt, by_token = (
        adapted(tiny_model("llama"), routing=routing) for routing in ("prompt", "token")
    )
    refuses(
        "without prefill_chunk_size, or use routing='t",
        generate,
        by_prompt,
        *padded(ROWS),
        prefill_chunk_size=4,
    )
    assert torch.equal(
        generate(by_token, *padded(ROWS), prefill_chunk_size=4), generate(by_token, *padded(ROWS))
    )
    ids, mask = padded([ROWS[1]])
    for options in (
        {"guidance_scale": 2.0},
        {"generation_config": GenerationConfig(guidance_scale=2.0)},
    ):
        refuses(
            "guidance_scale: generates from an unconditional prompt",
            by_prompt.generate,
            input_ids=ids,
            **options,
        )
    assert generate(by_token, ids, mask, guidance_scale=2.0).shape == (1, len(ROWS[1]) + NEW)
    # Without these limits, it would allocate most of the machine's memory.
    room = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1)
    options = {"generation_config": config, "continuous_batching_config": room}
    (refused,) = by_prompt.generate_batch(inputs=ROWS[:1], **options).values()
    assert "generate_batch: does not store a prompt's gates" in refused.error
    for row, answer in zip(
        ROWS, by_token.generate_batch(inputs=ROWS, **options).values(), strict=True
    ):
        assert answer.generated_tokens == generate(by_token, *padded([row]))[0, -NEW:].tolist()

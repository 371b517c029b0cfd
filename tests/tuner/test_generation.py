"""`generate` chooses the tokens that a teacher-forced pass would, in every way of running it."""

import copy

import pytest
import torch
from transformers import DynamicCache

from badit.errors import BaditError
from tuner.helpers import (
    FAMILIES,
    NEW,
    adapted,
    cache_name,
    forward,
    generate,
    greedy_by_hand,
    layers,
    padded,
    random_rows,
)

ROWS = random_rows(5, 9, 7)


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_teacher_forcing(tiny_model, family, options):
    model = adapted(tiny_model(family))
    ids, mask = padded(ROWS)
    assert torch.equal(generate(model, ids, mask, **options), greedy_by_hand(model, ids, mask, NEW))


@pytest.mark.parametrize("options", [{}, {"use_cache": False}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_beams_equal_the_beams_of_a_batch_of_one(tiny_model, family, options):
    model = adapted(tiny_model(family))
    together = generate(model, *padded(ROWS), num_beams=3, **options)[:, -NEW:]
    for row, expected in zip(ROWS, together, strict=True):
        assert torch.equal(generate(model, *padded([row]), num_beams=3)[0, -NEW:], expected)


def test_inputs_embeds_and_positional_input(tiny_model):
    model = adapted(tiny_model("llama"))
    ids, mask = padded(ROWS)
    expected = generate(model, ids, mask)
    embedded = model.get_input_embeddings()(ids)
    options = {"attention_mask": mask, "max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    for use_cache in (True, False):
        assert torch.equal(model.base_model.generate(ids, use_cache=use_cache, **options), expected)
        new = model.generate(inputs_embeds=embedded, use_cache=use_cache, **options)
        assert torch.equal(new, expected[:, -NEW:])


@torch.no_grad()
def continue_by_hand(model, cache, ids, mask, steps):
    """Greedy steps from a prefilled cache; yields every new token, so that two runs can take turns."""
    for _ in range(steps):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        ids = forward(model, ids, mask, cache, use_cache=True).logits[:, -1:].argmax(-1)
        yield ids


@torch.no_grad()
def prefill(model, ids, mask):
    cache = DynamicCache(config=model.get_base_model().config)
    return cache, forward(model, ids, mask, cache, use_cache=True).logits[:, -1:].argmax(-1)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_copied_prompt_cache_carries_its_routing(tiny_model, family):
    model = adapted(tiny_model(family))
    ids, mask = padded(ROWS)
    cache, first = prefill(model, ids, mask)
    expected = greedy_by_hand(model, ids, mask, NEW)[:, -NEW:]
    for _ in range(2):
        tokens = [first, *continue_by_hand(model, copy.deepcopy(cache), first, mask, NEW - 1)]
        assert torch.equal(torch.cat(tokens, dim=1), expected)


def test_generate_continues_from_a_copied_prompt_cache(tiny_model):
    """The prompt cache of a shared beginning: its routing stays, whatever text is appended."""
    model = adapted(tiny_model("llama"))
    ids, mask = padded(random_rows(6, 6))
    cache, _ = prefill(model, ids, mask)
    longer = torch.cat([ids, torch.tensor([[7, 8], [9, 10]])], dim=1)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    name = cache_name(model)
    found = [
        model.generate(
            input_ids=longer, attention_mask=torch.ones_like(longer), **options, **{name: copy.deepcopy(cache)}
        )
        for _ in range(2)
    ]
    assert torch.equal(found[0], found[1])
    expected = longer
    with torch.no_grad():
        for _ in range(4):
            all_of_it = torch.ones_like(expected)
            prompt = all_of_it.clone()
            prompt[:, 6:] = 0
            token = forward(model, expected, all_of_it, prompt_mask=prompt).logits[:, -1:].argmax(-1)
            expected = torch.cat([expected, token], dim=1)
    assert torch.equal(found[0], expected)


def test_two_generations_in_turns(tiny_model):
    model = adapted(tiny_model("llama"))
    batches = [padded(ROWS), padded(random_rows(8, 4, seed=9))]
    expected = [greedy_by_hand(model, ids, mask, NEW)[:, -NEW:] for ids, mask in batches]
    runs, tokens = [], []
    for ids, mask in batches:
        cache, first = prefill(model, ids, mask)
        runs.append(continue_by_hand(model, cache, first, mask, NEW - 1))
        tokens.append([first])
    for _ in range(NEW - 1):
        for run, mine in zip(runs, tokens, strict=True):
            mine.append(next(run))
    for mine, theirs in zip(tokens, expected, strict=True):
        assert torch.equal(torch.cat(mine, dim=1), theirs)


def test_a_prompt_in_pieces_is_refused(tiny_model):
    model = adapted(tiny_model("llama"))
    with pytest.raises(BaditError, match="without prefill_chunk_size, or use routing='token'"):
        generate(model, *padded(ROWS), prefill_chunk_size=4)
    by_token = adapted(tiny_model("llama"), routing="token")
    ids, mask = padded(ROWS)
    assert torch.equal(generate(by_token, ids, mask, prefill_chunk_size=4), generate(by_token, ids, mask))


def test_candidate_tokens_do_not_join_the_prompt(tiny_model):
    """Prompt lookup's first pass holds the prompt and guesses at the answer."""
    model = adapted(tiny_model("llama"))
    ids, mask = padded([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
    assert torch.equal(generate(model, ids, mask, 12, prompt_lookup_num_tokens=3), generate(model, ids, mask, 12))


@pytest.mark.parametrize("rows", [1, 3])
def test_gates_are_worked_in_once_a_generation(tiny_model, monkeypatch, rows):
    model = adapted(tiny_model("llama"))
    first, times = layers(model)[0], []
    own = first.component_gates
    monkeypatch.setattr(first, "component_gates", lambda *arguments: times.append(1) or own(*arguments))
    for generation in (1, 2):
        generate(model, *padded(ROWS[:rows]))
        assert len(times) == 2 * generation, "for the prompt, and for the first token after it"


def test_a_prompt_cache_is_decoded_with_the_weights_of_the_day(tiny_model):
    """What a generation works in does not outlive it: the cache may, and training may continue in between."""
    model = adapted(tiny_model("llama"))
    ids, mask = padded(random_rows(6))
    cache, first = prefill(model, ids, mask)
    longer = torch.cat([ids, first], dim=1)
    options = {"attention_mask": torch.ones_like(longer), "max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    name = cache_name(model)

    def continued():
        return model.generate(input_ids=longer, **options, **{name: copy.deepcopy(cache)})

    before = continued()
    with torch.no_grad():
        for layer in layers(model):
            layer.badit_B["default"].mul_(-3)
    after = continued()
    assert not torch.equal(before, after)
    tokens = [first, *continue_by_hand(model, cache, first, mask, NEW)]
    assert torch.equal(torch.cat(tokens, dim=1), after[:, -NEW - 1 :])

import itertools
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model

from badit import BaditConfig, generation
from badit.errors import BaditError
from badit.generation import generate_answers, stream_answer
from data.examples import make_tokenizer
from tuner.helpers import randomise


def naive_tokens(model, prompt, *, ends=(), limit=12):
    """One prompt at a time, no cache, no padding: the largest logit, again and again. The end token is left out."""
    tokens = list(prompt)
    for _ in range(limit):
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits
        token = int(logits[0, -1].argmax())
        if token in ends:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


def words(tokens):
    return " ".join(f"w{token}" for token in tokens if token > 1)  # 0 and 1 are special


def generate(model, tokenizer, prompts, **options):
    return generate_answers(model, tokenizer, prompts, **{"max_new_tokens": 12, "progress": False, **options})


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_equals_naive_decoding_in_the_order_of_the_prompts(model, tokenizer, prompts, batch_size):
    expected = [words(naive_tokens(model, prompt, ends={1})) for prompt in prompts]
    assert len(set(expected)) > 4  # the answers differ, so that a wrong order shows
    assert generate(model, tokenizer, prompts, batch_size=batch_size) == expected


def test_decodes_the_longest_prompts_first_with_masked_left_padding(model, tokenizer, prompts, monkeypatch):
    batches = []
    original = model.generate

    def spy(input_ids, attention_mask, **options):
        if not options.keys() & {"cache", "past_key_values"}:  # with a cache, the rest of a batch goes on
            batches.append((input_ids, attention_mask))
        return original(input_ids=input_ids, attention_mask=attention_mask, **options)

    monkeypatch.setattr(model, "generate", spy)
    generate(model, tokenizer, prompts, batch_size=3)
    assert [mask.sum(1).tolist() for _, mask in batches] == [[30, 17, 9], [9, 5, 3], [2, 1]]
    for ids, mask in batches:
        assert mask[:, -1].all()
        assert (ids[mask == 0] == tokenizer.pad_token_id).all()


def test_stops_at_every_end_token_of_model_and_tokenizer(model, tokenizer, prompts):
    free = [naive_tokens(model, prompt) for prompt in prompts]
    first, second = free[1][4], free[5][2]
    model.generation_config.eos_token_id = [first, 127]
    tokenizer.eos_token = f"w{second}"
    ends = {first, 127, second}
    expected = [words(naive_tokens(model, prompt, ends=ends)) for prompt in prompts]
    assert sum(len(answer.split()) < 12 for answer in expected) >= 2
    assert generate(model, tokenizer, prompts) == expected


def test_padding_with_an_ordinary_token_is_not_part_of_the_answer(model, tokenizer_without_special_tokens, prompts):
    end = naive_tokens(model, prompts[1])[4]
    model.generation_config.eos_token_id = end
    expected = [" ".join(f"w{token}" for token in naive_tokens(model, prompt, ends={end})) for prompt in prompts]
    assert len({len(answer.split()) for answer in expected}) > 1  # some answers end early and are padded
    assert generate(model, tokenizer_without_special_tokens, prompts) == expected


def test_sets_aside_the_models_own_decoding_options_and_restores_them(model, tokenizer, prompts):
    expected = generate(model, tokenizer, prompts)
    own = model.generation_config
    own.do_sample, own.temperature, own.top_p, own.repetition_penalty, own.no_repeat_ngram_size = True, 2.0, 0.5, 9.0, 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert generate(model, tokenizer, prompts) == expected
    assert model.generation_config is own


def test_leaves_training_mode_and_tokenizer_as_they_were(model, tokenizer, prompts, monkeypatch):
    model.train()
    model.model.layers[0].eval()
    tokenizer.padding_side = "right"
    before = [module.training for module in model.modules()]
    generate(model, tokenizer, prompts)
    assert [module.training for module in model.modules()] == before
    assert tokenizer.padding_side == "right"

    own = model.generation_config
    monkeypatch.setattr(model, "generate", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(model, tokenizer, prompts)
    assert [module.training for module in model.modules()] == before
    assert model.generation_config is own


def test_adapters_take_part(model, tokenizer, prompts):
    plain = generate(model, tokenizer, prompts)
    lora = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, lora).train()
    answers = generate(adapted, tokenizer, prompts)
    assert adapted.training
    adapted.eval()
    assert answers == [words(naive_tokens(adapted, prompt, ends={1})) for prompt in prompts]
    assert answers != plain


@pytest.fixture
def ending(model, prompts):
    """The model with two end tokens, by which its answers to the prompts have several lengths."""
    free = [naive_tokens(model, prompt) for prompt in prompts]
    model.generation_config.eos_token_id = [free[1][4], free[5][2], free[2][7]]
    return model


def rows_of_each_call(model, monkeypatch):
    rows, original = [], model.generate

    def spy(input_ids, **options):
        rows.append(len(input_ids))
        return original(input_ids=input_ids, **options)

    monkeypatch.setattr(model, "generate", spy)
    return rows


def test_a_batch_goes_on_without_the_half_that_has_ended(ending, tokenizer, prompts, monkeypatch):
    ends = {1, *ending.generation_config.eos_token_id}
    expected = [words(naive_tokens(ending, prompt, ends=ends)) for prompt in prompts]
    assert len({len(answer.split()) for answer in expected}) >= 3
    rows = rows_of_each_call(ending, monkeypatch)
    assert generate(ending, tokenizer, prompts) == expected
    assert rows[0] == 8
    assert len(rows) > 1
    assert all(2 * after <= before for before, after in itertools.pairwise(rows))


@pytest.mark.parametrize("routing", ["prompt", "token"])
def test_the_mixtures_of_the_rows_that_go_on_are_theirs(ending, tokenizer, prompts, routing, monkeypatch):
    config = BaditConfig(num_experts=4, r=2, target_modules=["gate_proj"], routing=routing, task_type="CAUSAL_LM")
    adapted = randomise(get_peft_model(ending, config))
    alone = generate(adapted, tokenizer, prompts, batch_size=1)
    rows = rows_of_each_call(adapted, monkeypatch)
    assert generate(adapted, tokenizer, prompts) == alone
    assert len(rows) > 1
    assert len({len(answer.split()) for answer in alone}) > 1


def test_where_rows_cannot_be_taken_out_of_a_cache_a_batch_is_decoded_in_one_go(
    ending, tokenizer, prompts, monkeypatch
):
    expected = generate(ending, tokenizer, prompts)
    monkeypatch.setattr(generation, "select_rows", lambda cache, rows: False)
    rows = rows_of_each_call(ending, monkeypatch)
    assert generate(ending, tokenizer, prompts) == expected
    assert rows == [8, 8]


def test_progress_goes_to_stderr_only_when_asked_for(model, tokenizer, prompts, capsys):
    generate(model, tokenizer, prompts)
    assert capsys.readouterr() == ("", "")
    generate(model, tokenizer, prompts, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "8/8" in err


def test_no_prompts_no_answers(model, tokenizer):
    assert generate(model, tokenizer, []) == []


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[5], []], {}, "number 1 has no tokens"),
        ([[5]], {"batch_size": 0}, "batch_size"),
        ([[5]], {"max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_refuses_what_cannot_be_decoded(model, tokenizer, prompts, options, message):
    with pytest.raises(BaditError, match=message):
        generate(model, tokenizer, prompts, **options)


def stream(model, tokenizer, prompt, **options):
    shown = []
    return stream_answer(model, tokenizer, prompt, show=shown.append, max_new_tokens=12, **options), shown


def test_a_streamed_answer_is_the_same_and_grows_by_tokens(model, tokenizer, prompts):
    ends = 0
    for prompt in prompts:
        tokens = naive_tokens(model, prompt, ends={1})
        answer, shown = stream(model, tokenizer, prompt)
        ended = len(tokens) < 12
        assert answer == (words(tokens), len(tokens), ended)
        expected = [words(tokens[: i + 1]) for i in range(len(tokens))]
        assert shown == [*expected, *expected[-1:] * ended]
        ends += ended
    assert generate(model, tokenizer, prompts[:1]) == [stream(model, tokenizer, prompts[0])[0].text]


def test_what_the_show_raises_ends_the_answer_and_restores_the_model(model, tokenizer, prompts):
    model.train()
    own, shown = model.generation_config, []

    def show(text):
        shown.append(text)
        if len(shown) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stream_answer(model, tokenizer, prompts[1], show=show, max_new_tokens=12)
    assert len(shown) == 3
    assert model.training
    assert model.generation_config is own


def test_half_a_character_waits_for_its_other_half(model, prompts):
    tokenizer = make_tokenizer()
    ids = tokenizer("naïve €", add_special_tokens=False)["input_ids"]

    def generate(streamer, **_):
        for token in ([1, 2], *[[token] for token in ids]):  # the prompt first
            streamer.put(torch.tensor(token))

    model.generate = generate
    answer, shown = stream(model, tokenizer, prompts[0])
    assert answer.text == "naïve €"
    assert all("naïve €".startswith(text) for text in shown)
    assert len(set(shown)) < len(ids), "some tokens are a part of a character"


@pytest.mark.parametrize(("prompt", "limit", "message"), [([], 12, "has no tokens"), ([5], 0, "at least 1, not 0")])
def test_a_stream_refuses_what_has_no_answer(model, tokenizer, prompt, limit, message):
    with pytest.raises(BaditError, match=message):
        stream_answer(model, tokenizer, prompt, show=print, max_new_tokens=limit)

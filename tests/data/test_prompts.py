from __future__ import annotations

import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from badit.data import (
    Instance,
    build_prompt,
    encode_answer,
    encode_example,
    encode_prompt,
    end_of_turn_id,
    example_length,
    prompt_text,
)
from badit.errors import BaditError
from data.examples import BRACKETS, CHATML, UNMARKED, make_task, make_tokenizer

TASK = make_task()
FRANCE = Instance(id="x", input="France", outputs=("Paris", "City of Paris"))
PLAIN, CHAT, BRACKETED = (make_tokenizer(chat_template=template) for template in (None, CHATML, BRACKETS))
ALL = pytest.mark.parametrize("tokenizer", [PLAIN, CHAT, BRACKETED], ids=["plain", "chatml", "brackets"])


def test_the_text_with_the_definition_alone():
    assert prompt_text(TASK, FRANCE) == (
        "Answer with the capital of the country.\n\nNow complete the following example -\nInput: France\nOutput: "
    )


def test_the_text_with_two_demonstrations():
    assert prompt_text(TASK, FRANCE, "def+pos2") == (
        "Answer with the capital of the country.\n\n"
        " Positive Example 1 -\nInput: Italy\n Output: Rome\n\n"
        " Positive Example 2 -\nInput: Peru\n Output: Lima\n\n"
        "Now complete the following example -\nInput: France\nOutput: "
    )


def test_more_demonstrations_than_there_are_show_all():
    assert prompt_text(TASK, FRANCE, "def+pos9") == prompt_text(TASK, FRANCE, "def+pos2")
    assert "Peru" not in prompt_text(TASK, FRANCE, "def+pos1")


@pytest.mark.parametrize("encoding", ["def+pos0", "def+pos10", "def+pos", "pos2", "", "Def"])
def test_an_unknown_encoding_is_refused(encoding):
    with pytest.raises(BaditError, match="encoding: unknown"):
        prompt_text(TASK, FRANCE, encoding)


def test_a_misspelt_encoding_names_the_nearest():
    with pytest.raises(BaditError, match=r"did you mean 'def\+pos2'"):
        prompt_text(TASK, FRANCE, "def-pos2")  # pyright: ignore[reportArgumentType]


def test_the_plain_prompt_is_bos_and_the_text():
    ids = encode_prompt(PLAIN, build_prompt(TASK, FRANCE), max_source_tokens=100)
    assert PLAIN.decode(ids) == "<s>" + prompt_text(TASK, FRANCE)


def test_the_chat_prompt_is_the_users_turn_and_the_assistants_header():
    ids = encode_prompt(CHAT, build_prompt(TASK, FRANCE), max_source_tokens=100)
    text = prompt_text(TASK, FRANCE)
    assert CHAT.decode(ids) == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("adds", ["$A", "<s> $A", "<s> $A </s>"])
@pytest.mark.parametrize("template", [None, BRACKETS])
def test_never_two_bos_and_never_eos_after_the_prompt(adds, template):
    tokenizer = make_tokenizer(adds=adds, chat_template=template)
    ids = encode_prompt(tokenizer, build_prompt(TASK, FRANCE), max_source_tokens=100)
    expected = 1 if template or adds != "$A" else 0
    assert ids.count(tokenizer.bos_token_id) == expected
    assert tokenizer.eos_token_id not in ids


def test_a_text_that_starts_with_bos_gets_no_other():
    ids = encode_prompt(PLAIN, "<s>France", max_source_tokens=100)
    assert ids.count(PLAIN.bos_token_id) == 1


def test_never_ignores_the_template_and_always_needs_one():
    prompt = build_prompt(TASK, FRANCE)
    assert encode_prompt(CHAT, prompt, max_source_tokens=99, chat_template="never") == encode_prompt(
        PLAIN, prompt, max_source_tokens=99
    )
    assert encode_prompt(CHAT, prompt, max_source_tokens=99, chat_template="always") == encode_prompt(
        CHAT, prompt, max_source_tokens=99
    )
    with pytest.raises(BaditError, match="has none"):
        encode_prompt(PLAIN, prompt, max_source_tokens=99, chat_template="always")
    with pytest.raises(BaditError, match="did you mean 'never'"):
        encode_prompt(PLAIN, prompt, max_source_tokens=99, chat_template="nevr")  # pyright: ignore[reportArgumentType]


@ALL
@settings(max_examples=40, deadline=None)
@given(text=st.text(max_size=300), limit=st.integers(40, 120))
def test_truncation_keeps_the_definition_and_the_end(tokenizer, text, limit):
    instance = Instance(id="x", input=text, outputs=("Paris",))
    ids = encode_prompt(tokenizer, build_prompt(TASK, instance), max_source_tokens=limit)
    decoded = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert f"{TASK.definition}\n\nNow complete the following example -\nInput: " in decoded
    assert "\nOutput: " in decoded
    frame = len(encode_prompt(tokenizer, "", max_source_tokens=1))
    assert len(ids) <= limit + frame


@ALL
def test_a_long_input_uses_the_room_it_has(tokenizer):
    instance = Instance(id="x", input="France and Italy " * 500, outputs=("Paris",))
    ids = encode_prompt(tokenizer, build_prompt(TASK, instance), max_source_tokens=100)
    frame = len(encode_prompt(tokenizer, "", max_source_tokens=1))
    assert 95 <= len(ids) - frame <= 100


@ALL
def test_a_long_head_gives_way_too(tokenizer):
    task = make_task().model_copy(update={"definition": "Name the capital. " * 200})
    ids = encode_prompt(tokenizer, build_prompt(task, FRANCE), max_source_tokens=30)
    text = tokenizer.decode(ids)
    assert "Name the capital. Name" in text
    assert "\nOutput: " in text
    assert "France" not in text


def test_no_room_for_the_end_is_refused():
    with pytest.raises(BaditError, match="max_source_tokens: 1 has no room") as caught:
        encode_prompt(PLAIN, build_prompt(TASK, FRANCE), max_source_tokens=1)
    assert "\n" not in str(caught.value)


def test_a_plain_string_is_cut_at_its_end():
    ids = encode_prompt(PLAIN, "France " * 100, max_source_tokens=10)
    assert len(ids) <= 11
    assert PLAIN.decode(ids).startswith("<s>France ")


def test_a_text_beyond_the_models_window_raises_no_warning(caplog):
    with caplog.at_level(logging.WARNING):
        encode_prompt(make_tokenizer(), "France " * 500, max_source_tokens=20)
    assert not caplog.records


@pytest.mark.parametrize(
    ("template", "end"), [(None, "</s>"), (CHATML, "<|im_end|>"), (BRACKETS, "</s>"), (UNMARKED, "</s>")]
)
def test_the_end_of_turn_is_what_the_template_writes(template, end):
    tokenizer = make_tokenizer(chat_template=template)
    assert end_of_turn_id(tokenizer) == tokenizer.convert_tokens_to_ids(end)
    assert end_of_turn_id(tokenizer, "never") == tokenizer.eos_token_id


def test_a_changed_template_changes_the_end_of_turn():
    tokenizer = make_tokenizer(chat_template=CHATML)
    before = end_of_turn_id(tokenizer)
    tokenizer.chat_template = BRACKETS
    assert end_of_turn_id(tokenizer) == tokenizer.eos_token_id != before


def test_no_end_at_all_is_refused():
    with pytest.raises(BaditError, match="eos_token"):
        end_of_turn_id(make_tokenizer(eos_token=None))


@ALL
def test_an_answer_is_cut_and_then_ended(tokenizer):
    whole = encode_answer(tokenizer, "Paris and Rome", max_answer_tokens=50)
    cut = encode_answer(tokenizer, "Paris and Rome", max_answer_tokens=3)
    assert tokenizer.decode(whole[:-1]) == "Paris and Rome"
    assert cut == [*whole[:3], end_of_turn_id(tokenizer)]
    with pytest.raises(BaditError, match="max_answer_tokens"):
        encode_answer(tokenizer, "Paris", max_answer_tokens=-1)


@ALL
@settings(max_examples=30, deadline=None)
@given(text=st.text(max_size=200), answer=st.text(max_size=60))
def test_an_example_is_the_evaluations_prompt_and_then_the_whole_answer(tokenizer, text, answer):
    instance = Instance(id="x", input=text, outputs=(answer, "another"))
    lengths = {"max_source_tokens": 60, "max_answer_tokens": 20}
    trained = encode_example(tokenizer, TASK, instance, **lengths)
    asked = encode_example(tokenizer, TASK, instance, **lengths, with_answer=False)
    n = trained["prompt_length"]
    assert asked["input_ids"] == trained["input_ids"][:n]
    assert asked["labels"] == [-100] * n
    assert trained["labels"] == [-100] * n + trained["input_ids"][n:]
    assert trained["input_ids"][n:] == encode_answer(tokenizer, answer, max_answer_tokens=20)
    assert example_length(trained) == len(trained["labels"])
    assert trained["task"] == "capitals"


@ALL
def test_encoding_leaves_the_tokenizer_as_it_was(tokenizer):
    before = (tokenizer.special_tokens_map, tokenizer.chat_template, len(tokenizer), tokenizer.pad_token)
    encode_example(tokenizer, TASK, FRANCE)
    assert (tokenizer.special_tokens_map, tokenizer.chat_template, len(tokenizer), tokenizer.pad_token) == before

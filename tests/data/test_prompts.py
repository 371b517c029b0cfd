"""Prompts: text, token ids, truncation and labels; and rows from conversations."""

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from badit.data import (
    Instance,
    Task,
    answer_rows,
    build_prompt,
    encode_examples,
    own_input,
    prompt_text,
)
from badit.data.encoding import end_of_turn_id
from data.examples import BRACKETS, CHAT, CHATML, UNMARKED, encode_prompt, make_task, make_tokenizer
from refusals import refuses

TASK = make_task()
FRANCE = Instance(id="x", input="France", outputs=("Paris", "City of Paris"))
PROMPT = build_prompt(TASK, FRANCE)
DEFINITION = "Answer with the capital of the country."
QUESTION = "Now complete the following example -\nInput: France\nOutput: "
TEXT = f"{DEFINITION}\n\n{QUESTION}"
PLAIN, MARKED, BRACKETED = (
    make_tokenizer(chat_template=template) for template in (None, CHATML, BRACKETS)
)
ALL = pytest.mark.parametrize(
    "tokenizer", [PLAIN, MARKED, BRACKETED], ids=["plain", "chatml", "brackets"]
)
SYSTEM, USER, ANSWER = CHAT[:3]
LATER = {"role": "assistant", "content": "Lima.", "tool_calls": []}


def test_prompt_text_with_and_without_demonstrations():
    one = " Positive Example 1 -\nInput: Italy\n Output: Rome\n\n"
    two = f"{one} Positive Example 2 -\nInput: Peru\n Output: Lima\n\n"  # the task has only two
    for encoding, shots in {"def": "", "def+pos1": one, "def+pos2": two, "def+pos9": two}.items():
        assert prompt_text(TASK, FRANCE, encoding) == f"{DEFINITION}\n\n{shots}{QUESTION}"
    assert prompt_text(TASK.model_copy(update={"definition": ""}), FRANCE) == QUESTION
    assert own_input(TEXT) == "France"
    refuses(r"encoding: unknown 'def-pos2' \(did you", prompt_text, TASK, FRANCE, "def-pos2")


def test_prompt_is_bos_and_text_or_the_rendered_chat_template():
    assert PLAIN.decode(encode_prompt(PLAIN, PROMPT)) == f"<s>{TEXT}"
    rendered = f"<|im_start|>user\n{TEXT}<|im_end|>\n<|im_start|>assistant\n"
    assert MARKED.decode(encode_prompt(MARKED, PROMPT)) == rendered
    assert encode_prompt(PLAIN, "<s>France").count(PLAIN.bos_token_id) == 1
    assert encode_prompt(MARKED, PROMPT, chat_template="never") == encode_prompt(PLAIN, PROMPT)
    assert encode_prompt(MARKED, PROMPT, chat_template="always") == encode_prompt(MARKED, PROMPT)
    refuses("has no chat template", encode_prompt, PLAIN, PROMPT, chat_template="always")


@pytest.mark.parametrize("adds", ["$A", "<s> $A", "<s> $A </s>"])
@pytest.mark.parametrize("template", [None, BRACKETS])
def test_prompt_has_at_most_one_bos_and_no_eos(adds, template):
    tokenizer = make_tokenizer(adds=adds, chat_template=template)
    ids = encode_prompt(tokenizer, PROMPT)
    assert ids.count(tokenizer.bos_token_id) == (1 if template or adds != "$A" else 0)
    assert tokenizer.eos_token_id not in ids


@ALL
@given(text=st.text(max_size=300), limit=st.integers(40, 120))
def test_truncation_keeps_definition_and_end(tokenizer, text, limit):
    instance = Instance(id="x", input=text, outputs=("Paris",))
    ids = encode_prompt(tokenizer, build_prompt(TASK, instance), limit)
    decoded = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert f"{TASK.definition}\n\nNow complete the following example -\nInput: " in decoded
    assert "\nOutput: " in decoded
    assert len(ids) <= limit + len(encode_prompt(tokenizer, ""))


@ALL
def test_long_inputs_fill_the_limit_and_long_definitions_are_truncated(tokenizer):
    instance = Instance(id="x", input="France and Italy " * 500, outputs=("Paris",))
    template = len(encode_prompt(tokenizer, ""))
    assert 95 <= len(encode_prompt(tokenizer, build_prompt(TASK, instance))) - template <= 100
    task = TASK.model_copy(update={"definition": "Name the capital. " * 200})
    text = tokenizer.decode(encode_prompt(tokenizer, build_prompt(task, FRANCE), 30))
    assert "Name the capital. Name" in text
    assert "\nOutput: " in text
    assert "France" not in text


def test_plain_strings_are_truncated_silently_and_a_too_small_limit_is_refused(caplog):
    with caplog.at_level(logging.WARNING):
        ids = encode_prompt(PLAIN, "France " * 500, 10)
    assert len(ids) <= 11
    assert PLAIN.decode(ids).startswith("<s>France ")
    assert not caplog.records
    refuses("max_source_tokens: 1 is too small for the end", encode_prompt, PLAIN, PROMPT, 1)


@pytest.mark.parametrize("template", [None, CHATML, BRACKETS, UNMARKED])
def test_end_of_turn_token_comes_from_the_chat_template(template):
    tokenizer = make_tokenizer(chat_template=template)
    token = "<|im_end|>" if template == CHATML else "</s>"
    assert end_of_turn_id(tokenizer) == tokenizer.convert_tokens_to_ids(token)
    assert end_of_turn_id(tokenizer, "never") == tokenizer.eos_token_id
    tokenizer.chat_template = BRACKETS
    assert end_of_turn_id(tokenizer) == tokenizer.eos_token_id, "the current template is used"
    refuses("eos_token", end_of_turn_id, make_tokenizer(eos_token=None))


def state(tokenizer):
    named = (tokenizer.special_tokens_map, tokenizer.chat_template, tokenizer.pad_token)
    return (*named, len(tokenizer))


@ALL
@given(text=st.text(max_size=200), answer=st.text(max_size=60))
def test_example_is_evaluation_prompt_truncated_answer_and_end_token(tokenizer, text, answer):
    before = state(tokenizer)
    instance = Instance(id="x", input=text, outputs=(answer, "another"))
    lengths = {"max_source_tokens": 60, "max_answer_tokens": 20}
    (trained,) = encode_examples(tokenizer, [(TASK, instance)], **lengths)
    n = trained["prompt_length"]
    assert trained["input_ids"][:n] == encode_prompt(tokenizer, build_prompt(TASK, instance), 60)
    assert trained["labels"] == [-100] * n + trained["input_ids"][n:]
    whole = tokenizer(answer, add_special_tokens=False)["input_ids"]
    assert trained["input_ids"][n:] == [*whole[:20], end_of_turn_id(tokenizer)]
    assert trained["task"] == "capitals"
    assert state(tokenizer) == before


def test_chat_is_rendered_in_training_as_in_the_template():
    turns = tuple((message["role"], message["content"]) for message in CHAT)
    instance = Instance(id="x", input=turns[3][1], outputs=("Lima",), history=turns[:3])
    task = Task(name="chat", definition=None, train=(instance,))
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
    (example,) = encode_examples(MARKED, [(task, instance)])
    assert MARKED.decode(example["input_ids"]) == text.rstrip("\n")
    ids = encode_prompt(PLAIN, build_prompt(task, instance), 500)
    end = "user: Capital of France?\n\nassistant: Paris\n\nuser: And of Peru?\n\nassistant: "
    assert PLAIN.decode(ids).endswith(end)


def test_long_chats_drop_the_oldest_messages_first():
    questions = [("user", "first question"), ("user", "second")]
    answers = [("assistant", "first answer"), ("assistant", "reply")]
    turns = [turn for pair in zip(questions, answers, strict=True) for turn in pair]
    history = (("system", "Brief."), ("developer", "Calm."), *turns)
    instance = Instance(id="x", input="third", outputs=("end",), history=history)
    task = Task(name="chat", definition=None, train=(instance,))
    contents = [content for _, content in turns]
    counts = set()
    for limit in range(8, 120):
        text = MARKED.decode(encode_prompt(MARKED, build_prompt(task, instance), limit))
        assert "third" in text
        remaining = [content for content in contents if f"\n{content}<" in text]
        assert remaining == contents[len(contents) - len(remaining) :]
        assert not remaining or ("Brief." in text and "Calm." in text)
        counts.add(len(remaining))
    assert counts == {0, 2, 4}


def test_each_answer_of_a_chat_has_all_previous_messages_as_prompt():
    expected = [{"prompt": [SYSTEM, USER], "completion": [ANSWER]}]
    expected += [{"prompt": [SYSTEM, USER, ANSWER, USER], "completion": [LATER]}]
    assert answer_rows([SYSTEM, USER, ANSWER, USER, LATER, USER]) == expected
    assert answer_rows([USER]) == answer_rows([]) == []
    refuses("the first is an assistant message", answer_rows, [ANSWER, USER])
    refuses("message 1 must have a role", answer_rows, [USER, {"content": "Rome."}])

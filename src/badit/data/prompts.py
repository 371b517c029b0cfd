"""From a task's instance to token ids: the prompt's text, its truncation, and the end of the answer.

A prompt that is too long loses the end of its input first, since the definition and the closing "Output: " say what to
do. Truncation cuts characters and tokenises again, since tokens may merge across a cut. Prompt and answer are tokenised
separately, so that training continues the same tokens as evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from badit.data.tasks import Instance, Task
from badit.errors import BaditError, explained, refuse_unknown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PromptEncoding = Literal[
    "def", "def+pos1", "def+pos2", "def+pos3", "def+pos4", "def+pos5", "def+pos6", "def+pos7", "def+pos8", "def+pos9"
]
ChatTemplate = Literal["auto", "always", "never"]

# The loss of torch and transformers skips this label.
IGNORED_LABEL = -100


class Prompt(NamedTuple):
    """A prompt's text in the pieces that truncation treats differently."""

    head: str
    input: str
    tail: str


def build_prompt(task: Task, instance: Instance, encoding: PromptEncoding = "def") -> Prompt:
    """The prompt of one instance: "def" gives the definition alone, "def+posN" the first N demonstrations too.

    A task with fewer than N demonstrations shows all of them, as in the official evaluation.
    """
    refuse_unknown("encoding", encoding, get_args(PromptEncoding))
    shots = int(encoding.removeprefix("def").removeprefix("+pos") or 0)
    examples = "".join(
        f" Positive Example {number} -\nInput: {shot.input}\n Output: {shot.output}\n\n"
        for number, shot in enumerate(task.demonstrations[:shots], start=1)
    )
    head = f"{task.definition}\n\n{examples}Now complete the following example -\nInput: "
    return Prompt(head, instance.input, "\nOutput: ")


def prompt_text(task: Task, instance: Instance, encoding: PromptEncoding = "def") -> str:
    """The whole text of an instance's prompt, before truncation and chat template."""
    return "".join(build_prompt(task, instance, encoding))


def own_input(text: str) -> str:
    """The instance's own input in the text of a prompt; empty if there is none."""
    return text.rpartition("Input: ")[2].partition("\nOutput:")[0].strip()


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt | str,
    *,
    max_source_tokens: int,
    chat_template: ChatTemplate = "auto",
) -> list[int]:
    """Token ids of a prompt, ready for the model to continue.

    Args:
        prompt: its pieces, or a plain string, which is cut at its end.
        max_source_tokens: for the prompt's text. The tokens of the chat template, or BOS if the tokenizer adds it, come
            on top and are never cut.
        chat_template: "auto" makes the text the user's turn if the tokenizer has a template, "always" requires one,
            "never" gives the bare text.
    """
    head, content, tail = Prompt("", prompt, "") if isinstance(prompt, str) else prompt

    def fits(text: str) -> bool:
        return len(_tokens(tokenizer, text)) <= max_source_tokens

    if fits(head + content + tail):
        text = head + content + tail
    elif fits(head + tail):
        text = head + _longest_prefix(content, lambda part: fits(head + part + tail)) + tail
    elif fits(tail):
        text = _longest_prefix(head, lambda part: fits(part + tail)) + tail
    else:
        raise BaditError(f"max_source_tokens: {max_source_tokens} has no room for the end {tail!r}; raise it")
    if uses_template(tokenizer, chat_template):
        turn = [{"role": "user", "content": text}]
        fix = "use prompt.chat_template=never, or another template"
        with explained("chat_template", action="rendered", fix=fix, any_error=True):
            rendered = str(tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False))
        if text.strip() not in rendered:
            raise BaditError(f"chat_template: renders a prompt without the text that it is given; {fix}")
        # Templates write BOS themselves, so what they render is tokenised without adding another.
        return _tokens(tokenizer, rendered)
    ids = _tokens(tokenizer, text)
    # BOS by hand: some tokenizers would also close the prompt with EOS.
    bos: list[Any] = [tokenizer.bos_token_id]
    adds_bos = tokenizer("")["input_ids"][:1] == bos
    return bos + ids if adds_bos and ids[:1] != bos else ids


def _longest_prefix(text: str, fits: Callable[[str], bool]) -> str:
    """By bisection, a prefix that fits, given that the empty one does and the whole does not."""
    fitting, too_long = 0, len(text)
    while too_long - fitting > 1:
        middle = (fitting + too_long) // 2
        if fits(text[:middle]):
            fitting = middle
        else:
            too_long = middle
    return text[:fitting]


def encode_answer(
    tokenizer: PreTrainedTokenizerBase, answer: str, *, max_answer_tokens: int, chat_template: ChatTemplate = "auto"
) -> list[int]:
    """Token ids of an answer, at most `max_answer_tokens`, followed by the token that ends the turn."""
    return [*_tokens(tokenizer, answer)[:max_answer_tokens], end_of_turn_id(tokenizer, chat_template)]


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase, chat_template: ChatTemplate = "auto") -> int:
    """The token that ends an answer: what the chat template puts after an assistant's message, else EOS."""
    end: Any = None
    if uses_template(tokenizer, chat_template):
        end = _end_in_template(tokenizer, tokenizer.get_chat_template())
    end = tokenizer.eos_token_id if end is None else end
    if end is None:
        raise BaditError("tokenizer: has neither an end-of-turn nor an EOS token; set its eos_token")
    return end


def encode_example(
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    instance: Instance,
    *,
    encoding: PromptEncoding = "def",
    max_source_tokens: int = 1024,
    max_answer_tokens: int = 50,
    chat_template: ChatTemplate = "auto",
    with_answer: bool = True,
) -> dict[str, Any]:
    """One instance for a causal language model.

    The answer to train on is the first reference; evaluation takes the best over all of them.

    Returns:
        `input_ids` and `labels` (lists of one length; the prompt's labels are -100), `prompt_length` in tokens, and
        the names `task` and `id`. Without the answer, the prompt only.
    """
    source = build_prompt(task, instance, encoding)
    prompt = encode_prompt(tokenizer, source, max_source_tokens=max_source_tokens, chat_template=chat_template)
    answer: list[int] = []
    if with_answer:
        first = instance.outputs[0]
        answer = encode_answer(tokenizer, first, max_answer_tokens=max_answer_tokens, chat_template=chat_template)
    return {
        "input_ids": prompt + answer,
        "labels": [IGNORED_LABEL] * len(prompt) + answer,
        "prompt_length": len(prompt),
        "task": task.name,
        "id": instance.id,
    }


def uses_template(tokenizer: PreTrainedTokenizerBase, chat_template: ChatTemplate) -> bool:
    """Whether prompts are put into the tokenizer's chat template."""
    refuse_unknown("chat_template", chat_template, get_args(ChatTemplate))
    if chat_template == "always" and not tokenizer.chat_template:
        raise BaditError("chat_template: this tokenizer has none; use 'auto' or 'never'")
    return chat_template != "never" and bool(tokenizer.chat_template)


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # verbose=False: no warning that a text which is about to be cut is longer than the model's window.
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # pyright: ignore[reportReturnType]


@lru_cache(maxsize=8)
def _end_in_template(tokenizer: PreTrainedTokenizerBase, template: str) -> int | None:
    """The first added token after an assistant's message rendered by `template`."""
    turns = [{"role": "user", "content": "QUESTION"}, {"role": "assistant", "content": "ANSWER"}]
    rendered = tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False)
    _, found, after = str(rendered).rpartition("ANSWER")
    added = tokenizer.added_tokens_decoder
    # Text between the message and its end, such as Llama 2's space, is not an added token.
    return next((token for token in _tokens(tokenizer, after) if token in added), None) if found else None


def answer_rows(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, list[dict[str, Any]]]]:
    """A conversation, a list of dicts of ``role`` and ``content``, as one row per message of the assistant.

    A row ``{"prompt": [messages before it], "completion": [the message]}`` has TRL's conversational prompt–completion
    form, whose loss is on the completion only: training routes each answer on the whole conversation so far.
    """
    rows = []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message:
            raise BaditError(f"messages: message {number} must have a role, such as user or assistant: {message!r:.60}")
        if message["role"] == "assistant":
            if number == 0:
                raise BaditError("messages: the assistant speaks first; put a user's or system message before it")
            rows.append({"prompt": [dict(before) for before in messages[:number]], "completion": [dict(message)]})
    return rows

"""From a task's instance to token ids: the prompt's text, its truncation, and the answer's end.

A prompt has three pieces, and a long one is cut in the middle one: the definition says what to do and the closing
"Output: " says that it is time to do it, so the end of the input gives way.
Prompt and answer are tokenised apart, so that the tokens a model is trained to continue are the very tokens it is
asked to continue at evaluation. Truncation cuts characters and tokenises the result again, since tokens may merge
across a cut; this needs nothing of a tokenizer but a count, and only for prompts that are too long.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from badit.data.tasks import Instance, Task
from badit.errors import BaditError, refuse_unknown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PromptEncoding = Literal[
    "def", "def+pos1", "def+pos2", "def+pos3", "def+pos4", "def+pos5", "def+pos6", "def+pos7", "def+pos8", "def+pos9"
]
ChatTemplate = Literal["auto", "always", "never"]

# The loss of torch and transformers skips this label.
IGNORED_LABEL = -100


class Prompt(NamedTuple):
    """A prompt's text in the pieces that truncation tells apart."""

    head: str
    input: str
    tail: str

    @property
    def text(self) -> str:
        return self.head + self.input + self.tail


def build_prompt(task: Task, instance: Instance, encoding: PromptEncoding = "def") -> Prompt:
    """The prompt of one instance: "def" gives the definition alone, "def+posN" the first N demonstrations too.

    A task with fewer than N demonstrations shows all it has, as in the official evaluation.
    """
    refuse_unknown("encoding", encoding, get_args(PromptEncoding))
    shots = int(encoding.removeprefix("def+pos")) if encoding != "def" else 0
    examples = "".join(
        f" Positive Example {number} -\nInput: {shot.input}\n Output: {shot.output}\n\n"
        for number, shot in enumerate(task.demonstrations[:shots], start=1)
    )
    head = f"{task.definition}\n\n{examples}Now complete the following example -\nInput: "
    return Prompt(head, instance.input, "\nOutput: ")


def prompt_text(task: Task, instance: Instance, encoding: PromptEncoding = "def") -> str:
    """The whole text of an instance's prompt, before any truncation and chat template."""
    return build_prompt(task, instance, encoding).text


def own_input(text: str) -> str:
    """The instance's own input, out of the text of a prompt; empty where there is none."""
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
        tokenizer: left as it is; no special token is set or changed.
        prompt: its pieces, or a plain string, which is cut at its end.
        max_source_tokens: for the prompt's text. The tokens of the chat template, or the one at the beginning of the
            sequence (BOS) where the tokenizer adds one, come on top and are never cut.
        chat_template: "auto" makes the text the user's turn where the tokenizer has a template, "always" insists on
            one, "never" gives the bare text.

    Raises:
        BaditError: no template with "always", or no room for the prompt's last piece.
    """
    pieces = Prompt("", prompt, "") if isinstance(prompt, str) else prompt
    text = _shortened(*pieces, fits=lambda text: len(_tokens(tokenizer, text)) <= max_source_tokens)
    if text is None:
        raise BaditError(f"max_source_tokens: {max_source_tokens} has no room for the end {pieces.tail!r}; raise it")
    if uses_template(tokenizer, chat_template):
        turn = [{"role": "user", "content": text}]
        # Templates write BOS themselves, so what they render is tokenised without adding another.
        rendered = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        return _tokens(tokenizer, str(rendered))
    ids = _tokens(tokenizer, text)
    # Special tokens by hand: some tokenizers would close the prompt with EOS, which ends it before the answer.
    bos: list[Any] = [tokenizer.bos_token_id]
    adds_bos = tokenizer("")["input_ids"][:1] == bos
    return bos + ids if adds_bos and ids[:1] != bos else ids


def _shortened(head: str, content: str, tail: str, *, fits: Callable[[str], bool]) -> str | None:
    """The longest text that fits: `content` loses its end first, then `head` its own; None if `tail` alone is too long.

    Args:
        fits: whether a text is short enough.
    """
    if fits(head + content + tail):
        return head + content + tail
    if fits(head + tail):
        return head + _longest_prefix(content, lambda part: fits(head + part + tail)) + tail
    if fits(tail):
        return _longest_prefix(head, lambda part: fits(part + tail)) + tail
    return None


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
    tokenizer: PreTrainedTokenizerBase,
    answer: str,
    *,
    max_answer_tokens: int,
    chat_template: ChatTemplate = "auto",
) -> list[int]:
    """Token ids of an answer, at most `max_answer_tokens` of them, and the token that ends the turn after those."""
    if max_answer_tokens < 0:
        raise BaditError(f"max_answer_tokens: must be 0 or more, not {max_answer_tokens}")
    ids = _tokens(tokenizer, answer)[:max_answer_tokens]
    return [*ids, end_of_turn_id(tokenizer, chat_template)]


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase, chat_template: ChatTemplate = "auto") -> int:
    """The token that ends an answer: what the chat template puts after an assistant's message, else EOS.

    Raises:
        BaditError: the tokenizer has neither.
    """
    end: Any = None
    if uses_template(tokenizer, chat_template):
        end = _end_in_template(tokenizer, tokenizer.get_chat_template())
    if end is None:
        end = tokenizer.eos_token_id
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

    The answer to train on is the first reference, so that an instance is one example however many references it has;
    evaluation takes the best over all of them.

    Returns:
        `input_ids` and `labels` (lists of one length; the prompt's labels are -100), `prompt_length` in tokens, and
        `task` and `id`, their names. Without the answer the prompt is all there is.
    """
    prompt = encode_prompt(
        tokenizer,
        build_prompt(task, instance, encoding),
        max_source_tokens=max_source_tokens,
        chat_template=chat_template,
    )
    answer: list[int] = []
    if with_answer:
        answer = encode_answer(
            tokenizer, instance.outputs[0], max_answer_tokens=max_answer_tokens, chat_template=chat_template
        )
    labels = [IGNORED_LABEL] * len(prompt) + answer
    return {
        "input_ids": prompt + answer,
        "labels": labels,
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
    # verbose=False: a text about to be cut is no reason to warn that it is longer than the model's window.
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # pyright: ignore[reportReturnType]


@lru_cache(maxsize=8)
def _end_in_template(tokenizer: PreTrainedTokenizerBase, template: str) -> int | None:
    """The first added token after an assistant's message rendered by `template`, None if there is none."""
    answer = "ANSWER"
    turns = [{"role": "user", "content": "QUESTION"}, {"role": "assistant", "content": answer}]
    rendered = tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False)
    _, found, after = str(rendered).rpartition(answer)
    added = tokenizer.added_tokens_decoder
    # Text between the message and its end, such as Llama 2's space, is not an added token and is passed over.
    return next((token for token in _tokens(tokenizer, after) if token in added), None) if found else None


def answer_rows(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, list[dict[str, Any]]]]:
    """A conversation as a row for each of the assistant's messages, with all that came before it as the prompt.

    Rows have TRL's conversational prompt–completion form, whose loss is on the completion alone. In training each
    answer is then routed on what its generation reads: the whole conversation so far.

    Args:
        messages: dicts of ``role`` and ``content``, as chat templates take them.

    Returns:
        ``{"prompt": [messages], "completion": [one message]}``, in the order of the conversation; none where the
        assistant says nothing.

    Raises:
        BaditError: a message has no role, or the assistant speaks first.
    """
    rows = []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message:
            raise BaditError(f"messages: message {number} must have a role, such as user or assistant: {message!r:.60}")
        if message["role"] != "assistant":
            continue
        if number == 0:
            raise BaditError("messages: the assistant speaks first; put the user's or a system's message before it")
        rows.append({"prompt": [dict(before) for before in messages[:number]], "completion": [dict(message)]})
    return rows

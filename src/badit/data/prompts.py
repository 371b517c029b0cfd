"""From a task's instance to token ids: the prompt's text, its truncation, and the answer's end.

A prompt has three pieces, and a long one is cut in the middle one: the definition says what to do and the closing
"Output: " says that it is time to do it, so the end of the input gives way.
Prompt and answer are tokenised apart, so that the tokens a model is trained to continue are the very tokens it is
asked to continue at evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from badit.data.schema import Instance, Task
from badit.data.truncation import shortened
from badit.errors import BaditError, nearest

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
    if encoding not in get_args(PromptEncoding):
        raise BaditError(f"encoding: unknown {encoding!r:.60}{nearest(encoding, get_args(PromptEncoding))}")
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
    text = shortened(*pieces, fits=lambda text: len(_tokens(tokenizer, text)) <= max_source_tokens)
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


def example_length(example: Mapping[str, Any]) -> int:
    """Tokens in an encoded example, prompt and answer together."""
    return len(example["input_ids"])


def uses_template(tokenizer: PreTrainedTokenizerBase, chat_template: ChatTemplate) -> bool:
    if chat_template not in get_args(ChatTemplate):
        raise BaditError(
            f"chat_template: unknown {chat_template!r:.60}{nearest(chat_template, get_args(ChatTemplate))}"
        )
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

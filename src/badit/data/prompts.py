"""Encodes a task's instance as token ids: the text of the prompt, its truncation, and the token that ends the answer.

A prompt that is too long is first truncated at the end of its input; the definition and the final "Output: " are kept.
Truncation removes characters and tokenises again, since tokens may merge across a cut. Prompt and answer are tokenised
separately, so the prompt has the same tokens in training and in evaluation.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from badit.data.tasks import Instance, Messages, Task
from badit.support.errors import BaditError, explained, refuse_unknown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PromptEncoding = Literal[
    "def",
    "def+pos1",
    "def+pos2",
    "def+pos3",
    "def+pos4",
    "def+pos5",
    "def+pos6",
    "def+pos7",
    "def+pos8",
    "def+pos9",
]
ChatTemplate = Literal["auto", "always", "never"]

IGNORED_LABEL = -100  # ignored by the losses of PyTorch and transformers
_TEMPLATE_FIX = "use prompt.chat_template=never or another template"


class Prompt(NamedTuple):
    """The text of a prompt in three parts, which truncation treats differently.

    `history` has the (role, content) of a chat's earlier messages. `is_message`: the text is a user message.
    """

    head: str
    input: str
    tail: str
    history: Messages = ()
    is_message: bool = False


def build_prompt(task: Task, instance: Instance, encoding: PromptEncoding = "def") -> Prompt:
    """Returns the prompt of one instance: "def" has only the definition, "def+posN" also the first N demonstrations.

    If a task has fewer than N demonstrations, all of them are used, as in the official evaluation. Without a definition
    the instance's input is the whole prompt.
    """
    refuse_unknown("encoding", encoding, get_args(PromptEncoding))
    definition = task.definition if instance.instruction is None else instance.instruction
    if definition is None or instance.instruction == "":
        return Prompt("", instance.input, "", instance.history, is_message=True)
    shots = int(encoding.removeprefix("def").removeprefix("+pos") or 0)
    examples = "".join(
        f" Positive Example {number} -\nInput: {shot.input}\n Output: {shot.output}\n\n"
        for number, shot in enumerate(task.demonstrations[:shots], start=1)
    )
    before = f"{definition}\n\n" if definition else ""
    head = f"{before}{examples}Now complete the following example -\nInput: "
    return Prompt(head, instance.input, "\nOutput: ", instance.history)


def prompt_text(task: Task, instance: Instance, encoding: PromptEncoding = "def") -> str:
    """Returns the whole text of an instance's prompt with its chat history, before truncation and the chat template."""
    return "".join(
        [*(content for _, content in instance.history), *build_prompt(task, instance, encoding)[:3]]
    )


def own_input(text: str) -> str:
    """Returns the instance's input from the text of its prompt, or the whole text if it has no "Input: "."""
    return text.rpartition("Input: ")[2].partition("\nOutput:")[0].strip()


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt | str],
    *,
    max_source_tokens: int,
    chat_template: ChatTemplate = "auto",
) -> list[list[int]]:
    """Returns the token ids of prompts, for generation or training. A plain string is truncated at its end.

    ``max_source_tokens`` limits a prompt's text with its history. The tokens of the chat template, or the BOS that the
    tokenizer adds, are not included and never truncated. ``chat_template`` "auto" puts the text in the user's turn if
    the tokenizer has a template, "always" requires a template, "never" uses the plain text.
    """
    pieces = [Prompt("", prompt, "") if isinstance(prompt, str) else prompt for prompt in prompts]
    texts, histories = (
        ["".join(prompt[:3]) for prompt in pieces],
        [prompt.history for prompt in pieces],
    )
    # In ASCII text a token has at least one character, so most texts need no tokenising to show that they fit.
    short = [text.isascii() and len(text) < max_source_tokens for text in texts]
    unsure = [i for i, history in enumerate(histories) if history or not short[i]]
    for i, ids in zip(unsure, token_ids(tokenizer, [texts[i] for i in unsure]), strict=True):
        if len(ids) > max_source_tokens:
            texts[i] = _truncated(tokenizer, pieces[i], max_source_tokens)
        histories[i] = _recent_messages(tokenizer, histories[i], max_source_tokens - len(ids))
    templated = uses_template(tokenizer, chat_template)
    for i, (prompt, text, history) in enumerate(zip(pieces, texts, histories, strict=True)):
        turns = (*history, ("user", text))
        if templated:
            texts[i] = _rendered(tokenizer, turns, add_generation_prompt=True)
            if text.strip() not in texts[i]:
                raise BaditError(
                    f"chat_template: the rendered prompt lacks the message text; {_TEMPLATE_FIX}"
                )
        elif history:
            texts[i] = "".join(f"{role}: {content}\n\n" for role, content in turns) + "assistant: "
        elif prompt.is_message and not text[-1:].isspace():
            texts[i] += "\n"
    # BOS is added here, since some tokenizers would also append EOS to the prompt. Chat templates add BOS themselves.
    bos: list[Any] = [tokenizer.bos_token_id]
    adds_bos = not templated and tokenizer("")["input_ids"][:1] == bos
    return [
        bos + ids if adds_bos and ids[:1] != bos else ids for ids in token_ids(tokenizer, texts)
    ]


def _rendered(tokenizer: PreTrainedTokenizerBase, turns: Messages, **options: Any) -> str:
    messages = [{"role": role, "content": content} for role, content in turns]
    with explained("chat_template", action="rendered", fix=_TEMPLATE_FIX, any_error=True):
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))


def _truncated(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, most: int) -> str:
    """Returns a prompt's text, truncated to `most` tokens; BaditError if not even its end fits."""

    def fits(text: str) -> bool:
        return len(token_ids(tokenizer, [text])[0]) <= most

    for before, text in ((prompt.head, prompt.input), ("", prompt.head)):
        if fits(before + prompt.tail):  # bisect the number of characters to cut from the end
            cut = bisect_left(
                range(len(text)), True, 1, key=lambda cut: fits(before + text[:-cut] + prompt.tail)
            )
            return before + text[:-cut] + prompt.tail
    raise BaditError(
        f"max_source_tokens: {most} is too small for the end of the prompt, {prompt.tail!r}; increase it"
    )


def _recent_messages(tokenizer: PreTrainedTokenizerBase, history: Messages, most: int) -> Messages:
    """Returns the messages before the first user message if they fit in `most` tokens, and the latest that also fit."""
    lengths = [len(ids) for ids in token_ids(tokenizer, [content for _, content in history])]
    users = [
        i for i, (role, _) in enumerate(history) if role == "user"
    ]  # many templates require one of these first
    first = next(iter(users), len(history))
    before = history[:first] if sum(lengths[:first]) <= most else ()
    left = most - sum(lengths[: len(before)])
    return before + history[next((i for i in users if sum(lengths[i:]) <= left), len(history)) :]


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase, chat_template: ChatTemplate = "auto") -> int:
    """Returns the token that ends an answer: the first added token after the template's assistant message, or EOS."""
    if uses_template(tokenizer, chat_template):
        _, found, after = _rendered(
            tokenizer, (("user", "QUESTION"), ("assistant", "ANSWER"))
        ).rpartition("ANSWER")
        added = tokenizer.added_tokens_decoder
        # Text between the message and that token, such as Llama 2's space, has no added tokens.
        if found and (
            ends := [token for token in token_ids(tokenizer, [after])[0] if token in added]
        ):
            return ends[0]
    end: Any = tokenizer.eos_token_id
    if end is None:
        raise BaditError(
            "tokenizer: has neither an end-of-turn nor an EOS token; set its eos_token"
        )
    return end


def encode_examples(
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[Task, Instance]],
    *,
    encoding: PromptEncoding = "def",
    max_source_tokens: int = 1024,
    max_answer_tokens: int = 50,
    chat_template: ChatTemplate = "auto",
) -> list[dict[str, Any]]:
    """Encodes instances for a causal language model; many in one call take a fifth of the time of single calls.

    Training uses the first reference as the answer; Rouge-L and exact match use the best match of all references.

    Returns:
        For each instance: `input_ids` and `labels` (lists of equal length; the labels of the prompt are -100),
        `prompt_length` in tokens, and the names `task` and `id`.
    """
    sources = [build_prompt(task, instance, encoding) for task, instance in pairs]
    prompts = encode_prompts(
        tokenizer, sources, max_source_tokens=max_source_tokens, chat_template=chat_template
    )
    answers = token_ids(tokenizer, [instance.outputs[0] for _, instance in pairs])
    end = end_of_turn_id(tokenizer, chat_template)
    examples = []
    for (task, one), prompt, answer in zip(pairs, prompts, answers, strict=True):
        ids = [*prompt, *answer[:max_answer_tokens], end]
        examples.append(
            with_labels(
                {"task": task.name, "id": one.id, "prompt_length": len(prompt), "input_ids": ids}
            )
        )
    return examples


def with_labels(example: dict[str, Any]) -> dict[str, Any]:
    """Returns an encoded instance with `labels`: -100 for the prompt's tokens."""
    ids, length = example["input_ids"], example["prompt_length"]
    return {**example, "labels": [IGNORED_LABEL] * length + ids[length:]}


def uses_template(tokenizer: PreTrainedTokenizerBase, chat_template: ChatTemplate) -> bool:
    """Whether prompts use the tokenizer's chat template; BaditError if it is required but missing."""
    refuse_unknown("chat_template", chat_template, get_args(ChatTemplate))
    if chat_template == "always" and not tokenizer.chat_template:
        raise BaditError("chat_template: the tokenizer has no chat template; use 'auto' or 'never'")
    return chat_template != "never" and bool(tokenizer.chat_template)


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Returns the token ids of texts without special tokens."""
    # verbose=False: no warning about texts longer than the model's context window; they are truncated later.
    options: dict[str, Any] = {
        "add_special_tokens": False,
        "return_attention_mask": False,
        "verbose": False,
    }
    return tokenizer(list(texts), **options)["input_ids"] if texts else []  # pyright: ignore[reportReturnType]


def answer_rows(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, list[dict[str, Any]]]]:
    """Converts a conversation, a list of dicts with ``role`` and ``content``, to one row per assistant message.

    A row ``{"prompt": [messages before it], "completion": [the message]}`` has TRL's conversational prompt–completion
    format, with the loss on the completion only. So the gates of each answer depend on all messages before it.
    """
    rows = []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message:
            raise BaditError(
                f"messages: message {number} must have a role, such as user or assistant: {message!r:.60}"
            )
        if message["role"] == "assistant":
            if number == 0:
                raise BaditError(
                    "messages: the first is an assistant message; put a user or system message before it"
                )
            rows.append(
                {
                    "prompt": [dict(before) for before in messages[:number]],
                    "completion": [dict(message)],
                }
            )
    return rows

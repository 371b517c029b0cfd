"""Encodes prompts and answers as token ids: truncation, chat template, and end of the answer.

A prompt that is too long is first truncated at the end of its input; the definition and the final
"Output: " are kept. Truncation removes characters and tokenises again, since tokens may merge
across a cut. Prompt and answer are tokenised separately, so the prompt has the same tokens in
training and in evaluation.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

from badit.data.prompts import Prompt, PromptEncoding, build_prompt
from badit.data.tasks import Instance, Messages, Task
from badit.support.errors import BaditError, explained, refuse_unknown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ChatTemplate = Literal["auto", "always", "never"]

LINE_BREAK = "\n"  # the default between a whole prompt and its answer
IGNORED_LABEL = -100  # ignored by the losses of PyTorch and transformers
_TEMPLATE_FIX = "use prompt.chat_template=never or another template"


def encode_examples(  # noqa: PLR0913 (the keys of a recipe's section prompt)
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[Task, Instance]],
    *,
    encoding: PromptEncoding = "def",
    max_source_tokens: int = 1024,
    max_answer_tokens: int = 50,
    chat_template: ChatTemplate = "auto",
    separator: str = LINE_BREAK,
) -> list[dict[str, Any]]:
    """Encodes instances for a causal language model.

    Many in one call take a fifth of the time of single calls. Training uses the first reference as
    the answer; Rouge-L and exact match use the best match of all references.

    Returns:
        For each instance: `input_ids` and `labels` (lists of equal length; the labels of the prompt
        are -100), `prompt_length` in tokens, the names `task` and `id`, and `rejected_ids`, the
        tokens of a rejected answer without the prompt.
    """
    prompts = encode_prompts(
        tokenizer,
        [build_prompt(task, instance, encoding) for task, instance in pairs],
        max_source_tokens=max_source_tokens,
        chat_template=chat_template,
        separator=separator,
    )
    # Prompt and answer are tokenised separately, so the prompt's tokens are those of generation.
    answers = token_ids(tokenizer, [instance.outputs[0] for _, instance in pairs])
    worse = [instance.rejected for _, instance in pairs if instance.rejected is not None]
    rejected_answers = iter(token_ids(tokenizer, worse))
    end = end_of_turn_id(tokenizer, chat_template)
    examples = []
    for (task, instance), prompt, answer in zip(pairs, prompts, answers, strict=True):
        # The end token follows the truncation, so that a truncated answer ends, too.
        example = {
            "task": task.name,
            "id": instance.id,
            "prompt_length": len(prompt),
            "input_ids": [*prompt, *answer[:max_answer_tokens], end],
        }
        example["labels"] = labels_of(example)
        if instance.rejected is not None:
            example["rejected_ids"] = [*next(rejected_answers)[:max_answer_tokens], end]
        examples.append(example)
    return examples


def rejected_example(example: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the example of a pair's rejected answer from that of the chosen one."""
    length = example["prompt_length"]
    return {
        "task": example["task"],
        "id": example["id"],
        "prompt_length": length,
        "input_ids": [*example["input_ids"][:length], *example["rejected_ids"]],
    }


def sequences(examples: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Returns the examples, and after them those of rejected answers."""
    chosen = list(examples)
    return chosen + [rejected_example(one) for one in chosen if one.get("rejected_ids")]


def labels_of(example: Mapping[str, Any]) -> list[int]:
    """Returns an example's own labels, or its token ids with -100 for those of the prompt."""
    if "labels" in example:
        return example["labels"]
    length = example["prompt_length"]
    return [IGNORED_LABEL] * length + example["input_ids"][length:]


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt | str],
    *,
    max_source_tokens: int,
    chat_template: ChatTemplate = "auto",
    separator: str = LINE_BREAK,
) -> list[list[int]]:
    """Returns the token ids of prompts, for generation or training.

    A plain string is truncated at its end. ``max_source_tokens`` limits a prompt's text with
    its history. The tokens of the chat template, or the BOS that the tokenizer adds, are not
    included and never truncated. ``chat_template`` "auto" puts the text in the user's turn if the
    tokenizer has a template, "always" requires a template, "never" uses the plain text.
    Without a template, ``separator`` follows a whole prompt that does not end with white space.
    """
    has_template = uses_template(tokenizer, chat_template)
    wholes = [Prompt("", prompt, "") if isinstance(prompt, str) else prompt for prompt in prompts]
    fitting = _truncated(tokenizer, wholes, max_source_tokens)
    if has_template:  # which adds BOS itself
        return token_ids(tokenizer, [_templated(tokenizer, prompt) for prompt in fitting])

    encoded = token_ids(tokenizer, [_plain(prompt, separator) for prompt in fitting])
    bos: Any = tokenizer.bos_token_id
    # BOS is added here, since some tokenizers would also append EOS to the prompt.
    if tokenizer("")["input_ids"][:1] == [bos]:
        for ids in encoded:
            if ids[:1] != [bos]:
                ids.insert(0, bos)
    return encoded


def as_request(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    *,
    max_source_tokens: int,
    chat_template: ChatTemplate = "auto",
    separator: str = LINE_BREAK,
) -> dict[str, Any]:
    """Returns the field of a request in OpenAI's format that has a prompt as its value.

    It is `messages` if prompts use the chat template, else `prompt`. A server with this tokenizer
    makes the tokens of :func:`encode_prompts` of it.
    """
    (fitting,) = _truncated(tokenizer, [prompt], max_source_tokens)
    if uses_template(tokenizer, chat_template):
        turns = (*fitting.history, ("user", fitting.text))
        return {"messages": _messages(turns)}
    return {"prompt": _plain(fitting, separator)}


def _templated(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> str:
    """Returns the chat template's text of a prompt and its history."""
    turns = (*prompt.history, ("user", prompt.text))
    text = _rendered(tokenizer, turns, add_generation_prompt=True)
    # A template may strip the message, but without it the answer would have no prompt.
    if prompt.text.strip() not in text:
        problem = "the rendered prompt lacks the message text"
        raise BaditError(f"chat_template: {problem}; {_TEMPLATE_FIX}")
    return text


def _rendered(tokenizer: PreTrainedTokenizerBase, turns: Messages, **options: Any) -> str:
    with explained("chat_template", action="rendered", fix=_TEMPLATE_FIX, any_error=True):
        return str(tokenizer.apply_chat_template(_messages(turns), tokenize=False, **options))


def _messages(turns: Messages) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def _plain(prompt: Prompt, separator: str) -> str:
    """Returns the text of a prompt and its history without a chat template."""
    if prompt.history:
        turns = (*prompt.history, ("user", prompt.text))
        return "".join(f"{role}: {content}\n\n" for role, content in turns) + "assistant: "
    if prompt.is_message and not prompt.text[-1:].isspace():
        return prompt.text + separator
    return prompt.text


def _truncated(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], limit: int
) -> list[Prompt]:
    """Returns the prompts, truncated to ``limit`` tokens with their history."""
    # In ASCII text a token has at least one character, so most texts need no tokenising to show
    # that they fit.
    unsure = [
        number
        for number, prompt in enumerate(prompts)
        if prompt.history or not prompt.text.isascii() or len(prompt.text) >= limit
    ]
    lengths = map(len, token_ids(tokenizer, [prompts[number].text for number in unsure]))
    truncated = [*prompts]
    for number, length in zip(unsure, lengths, strict=True):
        prompt = prompts[number]
        if length > limit:
            text = _truncated_text(tokenizer, prompt, limit)
            prompt = prompt._replace(head="", input=text, tail="")
        # A truncated text leaves no room, so its whole history is dropped.
        history = _recent_messages(tokenizer, prompt.history, limit - length)
        truncated[number] = prompt._replace(history=history)
    return truncated


def _truncated_text(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, limit: int) -> str:
    """Returns a prompt's text, truncated to `limit` tokens; BaditError if not even its end fits."""

    def fits(text: str) -> bool:
        return len(token_ids(tokenizer, [text])[0]) <= limit

    # First the input is cut; if this is not enough, it is removed and the definition is cut.
    for before, text in ((prompt.head, prompt.input), ("", prompt.head)):
        if fits(before + prompt.tail):
            # Bisect the number of characters to cut from the end.
            # At least one, because text[:-0] is empty; cutting all of them fits, as just checked.
            cut = bisect_left(
                range(len(text)), True, 1, key=lambda cut: fits(before + text[:-cut] + prompt.tail)
            )
            return before + text[:-cut] + prompt.tail
    problem = f"{limit} is too small for the end of the prompt, {prompt.tail!r}"
    raise BaditError(f"max_source_tokens: {problem}; increase it")


def _recent_messages(tokenizer: PreTrainedTokenizerBase, history: Messages, limit: int) -> Messages:
    """Returns the latest messages that fit in `limit` tokens.

    The messages before the first user message come before them, if these fit.
    """
    lengths = [len(ids) for ids in token_ids(tokenizer, [content for _, content in history])]
    # Many templates require a user message first.
    users = [number for number, (role, _) in enumerate(history) if role == "user"]
    first = next(iter(users), len(history))
    beginning = history[:first]
    if sum(lengths[:first]) > limit:
        beginning = ()
    limit -= sum(lengths[: len(beginning)])
    # The earliest user message from which all others fit.
    starts = (number for number in users if sum(lengths[number:]) <= limit)
    return beginning + history[next(starts, len(history)) :]


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase, chat_template: ChatTemplate = "auto") -> int:
    """Returns the token that ends an answer.

    It is the first added token after the template's assistant message, or else EOS.
    """
    if uses_template(tokenizer, chat_template):
        text = _rendered(tokenizer, (("user", "QUESTION"), ("assistant", "ANSWER")))
        _, answer, after = text.rpartition("ANSWER")
        added_tokens = tokenizer.added_tokens_decoder
        # Text between the message and that token, such as Llama 2's space, has no added tokens.
        for token in token_ids(tokenizer, [after])[0]:
            if answer and token in added_tokens:
                return token
    end: Any = tokenizer.eos_token_id
    if end is None:
        problem = "has neither an end-of-turn nor an EOS token"
        raise BaditError(f"tokenizer: {problem}; set its eos_token")
    return end


def uses_template(tokenizer: PreTrainedTokenizerBase, chat_template: ChatTemplate) -> bool:
    """Whether prompts use the chat template; BaditError if it is required but missing."""
    refuse_unknown("chat_template", chat_template, get_args(ChatTemplate))
    if chat_template == "always" and not tokenizer.chat_template:
        raise BaditError("chat_template: the tokenizer has no chat template; use 'auto' or 'never'")
    return chat_template != "never" and bool(tokenizer.chat_template)


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Returns the token ids of texts without special tokens."""
    # A fast tokenizer raises an exception for an empty list.
    if not texts:
        return []
    # No warning about texts longer than the model's context window; they are truncated later.
    encoded: Any = tokenizer(
        list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
    )
    return encoded["input_ids"]

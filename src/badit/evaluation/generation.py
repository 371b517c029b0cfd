"""Greedy decoding of prompts (token ids) to answers (text), in batches or streamed for a single prompt."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)

from badit.data import AnswerCollator
from badit.support.errors import BaditError
from badit.tuner import hooks_of
from badit.tuner.prompt import cache_of, select_rows

_IGNORE_PADDING_MASK = {
    "rwkv",
    "recurrent_gemma",
    "xlstm",
    "minimax",
}  # padding on the left changes their state


def generate_answers(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 50,
    batch_size: int = 16,
    progress: bool = True,
    tasks: Sequence[str] | None = None,
    prefill: Callable[[list[int], dict[str, torch.Tensor]], dict[str, Any]] | None = None,
) -> list[str]:
    """Answers each prompt (its token ids) by greedy decoding, up to the first end token or `max_new_tokens`.

    Batches hold prompts of similar length, longest first, with left padding and an attention mask; those of recurrent
    models that ignore the mask hold one prompt. An answer does not depend on its batch (up to floating-point rounding).
    When half of a batch has ended, only the other rows continue. Options of the model's own generation config, such as
    a repetition penalty, are ignored, except for its end tokens: they end an answer, as the tokenizer's end token does.

    The model is in evaluation mode, on one device. ``tasks``, the task of each prompt, is used only by methods with
    parameters per task. ``prefill`` is called with the indices of a batch's prompts and their padded input_ids and
    attention_mask. It returns {name of the model's cache argument: cache of each prompt except its last token}, or {}.

    Returns the answers in the order of the prompts, without special tokens and surrounding white space. BaditError if a
    prompt is empty or a size is not positive.
    """
    if model.config.model_type in _IGNORE_PADDING_MASK:
        batch_size = 1
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    with (
        _greedy(
            model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size
        ) as settings,
        tqdm(total=len(prompts), desc="Generating", unit="answer", disable=not progress) as bar,
    ):
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            batch = _padded([prompts[i] for i in indices], settings, model)
            if prefill is not None:
                batch |= prefill(indices, batch)
            names = None if tasks is None else [tasks[i] for i in indices]
            for i, tokens in zip(
                indices, _continuations(model, batch, settings, names), strict=True
            ):
                answers[i] = _decode(tokenizer, tokens, settings.eos_token_id)
            bar.update(len(indices))
    return answers


def _continuations(
    model: Any,
    batch: dict[str, Any],
    settings: Any,
    tasks: list[str] | None,
    criteria: list[Any] | None = None,
) -> list[list[int]]:
    """Returns the new tokens of every row of a batch. A row's end token may be followed by further tokens.

    ``batch`` has input_ids and attention_mask (B, T), and may have a cache of all but the last token. When half of the
    rows have ended, decoding continues with the others only; ``criteria`` replace this rule.
    """
    ends_E = torch.tensor(settings.eos_token_id, dtype=torch.long, device=model.device)
    continuations: list[list[int]] = [[] for _ in batch["input_ids"]]
    rows = list(range(len(continuations)))
    prompts, settings_of_all = (
        {name: batch[name] for name in ("input_ids", "attention_mask")},
        settings,
    )
    settings = copy.copy(settings)  # max_new_tokens is reduced below

    def half_ended(input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        ended_B = torch.isin(input_ids[:, width:], ends_E).any(dim=1)  # in the current call
        return (2 * ended_B.sum() >= len(ended_B)).expand(len(ended_B))

    stopping = StoppingCriteriaList([half_ended] if criteria is None else criteria)
    while True:
        width = batch["input_ids"].shape[1]
        with hooks_of(model).rows_of(None if tasks is None else [tasks[row] for row in rows]):
            output = model.generate(**batch, generation_config=settings, stopping_criteria=stopping)
        new = output["sequences"][:, width:]
        for row, tokens in zip(rows, new.tolist(), strict=True):
            continuations[row] += tokens
        settings.max_new_tokens -= new.shape[1]
        going_R = (~torch.isin(new, ends_E).any(dim=1)).nonzero()[:, 0]
        if not settings.max_new_tokens or not len(going_R):
            return continuations
        cache = cache_of(output)
        if not select_rows(cache, going_R):
            # Rows of this cache cannot be selected (a recurrent model's): decode the whole batch again.
            return _continuations(model, prompts, settings_of_all, tasks, [])
        rows = [rows[row] for row in going_R.tolist()]
        attended = F.pad(batch["attention_mask"][going_R], (0, new.shape[1]), value=1)
        batch = {"input_ids": output["sequences"][going_R], "attention_mask": attended, **cache}


class StreamedAnswer(NamedTuple):
    """An answer's text, its number of tokens without the end token, and whether it has one (else it is cut)."""

    text: str
    tokens: int
    ended: bool


def stream_answer(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    *,
    show: Callable[[str], None],
    max_new_tokens: int = 50,
    task: str | None = None,
) -> StreamedAnswer:
    """Streams the answer to one prompt, with the arguments and errors of :func:`generate_answers`.

    ``show`` is called after every token with the answer so far. Its exceptions end the generation and are propagated.
    """
    with _greedy(model, tokenizer, [prompt], max_new_tokens=max_new_tokens) as settings:
        ends, names = settings.eos_token_id, None if task is None else [task]

        def show_all(input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            text = _decode(tokenizer, input_ids[0, len(prompt) :].tolist(), ends)
            show(text.rstrip("\ufffd"))  # replacement character of an incomplete UTF-8 sequence
            return torch.zeros(1, dtype=torch.bool, device=input_ids.device)

        (tokens,) = _continuations(
            model, _padded([prompt], settings, model), settings, names, [show_all]
        )
    ended = tokens[-1] in ends
    return StreamedAnswer(_decode(tokenizer, tokens, ends), len(tokens) - ended, ended)


@contextmanager
def _greedy(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], **sizes: int
) -> Iterator[Any]:
    """Checks prompts and sizes, and replaces the generation config, the source of unset options, by greedy decoding."""
    for name, value in sizes.items():
        if value < 1:
            raise BaditError(f"{name}: must be at least 1, not {value}")
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise BaditError(f"prompts: prompt {i} has no tokens; give a non-empty prompt")
    owner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    original = owner.generation_config
    own = original.eos_token_id
    ends: list[Any] = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    options = {
        "do_sample": False,
        "num_beams": 1,
        "use_cache": True,
        "return_dict_in_generate": True,
    }
    tokens = {"pad_token_id": tokenizer.pad_token_id or 0, "eos_token_id": sorted({*ends} - {None})}
    owner.generation_config = settings = GenerationConfig(
        max_new_tokens=sizes["max_new_tokens"], **options, **tokens
    )
    try:
        yield settings
    finally:
        owner.generation_config = original


def _padded(prompts: list[Sequence[int]], settings: GenerationConfig, model: Any) -> Any:
    """Returns a dict of input_ids and attention_mask, both (batch, longest prompt), int64, on the model's device."""
    batch = AnswerCollator(settings.pad_token_id, "left")(
        [{"input_ids": prompt} for prompt in prompts]
    )
    return send_to_device(batch, model.device)


def _decode(tokenizer: PreTrainedTokenizerBase, tokens: list[int], ends: list[int]) -> str:
    # Cut at the end token: the padding after it may have the id of an ordinary token (0, without a padding token), and
    # the end token itself may not be a special token of the tokenizer.
    stop = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return str(tokenizer.decode(tokens[:stop], skip_special_tokens=True)).strip()

"""Greedy decoding of prompts (token ids) to answers (text), in batches or streamed."""

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

# Padding on the left changes the state of these models.
_IGNORE_PADDING_MASK = {"rwkv", "recurrent_gemma", "xlstm", "minimax"}


def generate_answers(  # noqa: PLR0913 (documented options)
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
    """Answers each prompt (its token ids) by greedy decoding.

    An answer ends at the first end token or after ``max_new_tokens``.
    Batches hold prompts of similar length, longest first, with left padding and an attention mask;
    those of recurrent models that ignore the mask hold one prompt. An answer does not depend on its
    batch (up to floating-point rounding). When half of a batch has ended, only the other rows
    continue. Options of the model's own generation config, such as a repetition penalty, are
    ignored, except for its end tokens: they end an answer, as the tokenizer's end token does.

    The model is in evaluation mode, on one device. ``tasks``, the task of each prompt, is used only
    by methods with parameters per task. ``prefill`` is called with the indices of a batch's prompts
    and their padded input_ids and attention_mask. It returns {name of the model's cache argument:
    cache of each prompt except its last token}, or {}.

    Returns the answers in the order of the prompts, without special tokens and surrounding white
    space. BaditError if a prompt is empty or a size is not positive.
    """
    if model.config.model_type in _IGNORE_PADDING_MASK:
        batch_size = 1
    answers = [""] * len(prompts)
    # Prompts of similar length need little padding.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    sizes = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    with (
        _greedy(model, tokenizer, prompts, **sizes) as settings,
        tqdm(total=len(prompts), desc="Generating", unit="answer", disable=not progress) as bar,
    ):
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            batch = _padded([prompts[i] for i in indices], settings, model)
            if prefill is not None:
                batch |= prefill(indices, batch)
            row_tasks = _of_rows(tasks, indices)
            continuations = _continuations(model, batch, settings, row_tasks)
            for i, tokens in zip(indices, continuations, strict=True):
                answers[i] = _decode(tokenizer, tokens, settings.eos_token_id)
            bar.update(len(indices))
    return answers


def _continuations(
    model: Any, batch: dict[str, Any], settings: GenerationConfig, tasks: Sequence[str] | None
) -> list[list[int]]:
    """Returns the new tokens of every row; its end token may be followed by further tokens.

    ``batch`` has input_ids and attention_mask (B, T), and may have a cache of all but the last
    token. When half of the rows have ended, decoding continues with the others only.
    """
    ends_E = torch.tensor(settings.eos_token_id, dtype=torch.long, device=model.device)
    prompts = {name: batch[name] for name in ("input_ids", "attention_mask")}
    rows = list(range(len(batch["input_ids"])))  # those that have not ended
    continuations: list[list[int]] = [[] for _ in rows]
    remaining: Any = copy.copy(settings)  # max_new_tokens is reduced below

    def ended(tokens_RT: torch.Tensor) -> torch.Tensor:
        return torch.isin(tokens_RT, ends_E).any(dim=1)

    def half_ended(input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        ended_R = ended(input_ids[:, width:])  # in the current call
        # generate stops when the criterion holds for all rows, so all get the same value.
        return (2 * ended_R.sum() >= len(ended_R)).expand(len(ended_R))

    while True:
        width = batch["input_ids"].shape[1]
        output = _generate(model, batch, remaining, _of_rows(tasks, rows), half_ended)
        tokens_RN = output["sequences"][:, width:]
        for row, tokens in zip(rows, tokens_RN.tolist(), strict=True):
            continuations[row] += tokens

        remaining.max_new_tokens -= tokens_RN.shape[1]
        going_R = (~ended(tokens_RN)).nonzero()[:, 0]
        if not remaining.max_new_tokens or not len(going_R):
            return continuations

        cache = cache_of(output)
        if not select_rows(cache, going_R):
            # Rows of this cache cannot be selected (a recurrent model's): decode the whole batch
            # again, without the rule.
            sequences = _generate(model, prompts, settings, tasks)["sequences"]
            return sequences[:, prompts["input_ids"].shape[1] :].tolist()
        rows = [rows[index] for index in going_R.tolist()]
        mask = F.pad(batch["attention_mask"][going_R], (0, tokens_RN.shape[1]), value=1)
        batch = {"input_ids": output["sequences"][going_R], "attention_mask": mask, **cache}


def _generate(
    model: Any,
    batch: dict[str, Any],
    settings: GenerationConfig,
    tasks: Sequence[str] | None,
    *criteria: Any,
) -> Any:
    with hooks_of(model).rows_of(tasks):
        return model.generate(
            **batch, generation_config=settings, stopping_criteria=StoppingCriteriaList(criteria)
        )


def _of_rows(tasks: Sequence[str] | None, rows: Sequence[int]) -> list[str] | None:
    if tasks is None:
        return None
    return [tasks[row] for row in rows]


class StreamedAnswer(NamedTuple):
    """An answer's text, its number of tokens without the end token, and whether it has one.

    An answer without an end token is cut.
    """

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

    ``show`` is called after every token with the answer so far. Its exceptions end the generation
    and are propagated.
    """
    row_tasks = None if task is None else [task]
    with _greedy(model, tokenizer, [prompt], max_new_tokens=max_new_tokens) as settings:
        ends: Any = settings.eos_token_id

        # A stopping criterion, because generate calls it after every token; it never stops.
        def show_all(input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            text = _decode(tokenizer, input_ids[0, len(prompt) :].tolist(), ends)
            show(text.rstrip("\ufffd"))  # replacement character of an incomplete UTF-8 sequence
            return torch.zeros(1, dtype=torch.bool, device=input_ids.device)

        batch = _padded([prompt], settings, model)
        output = _generate(model, batch, settings, row_tasks, show_all)
    tokens = output["sequences"][0, len(prompt) :].tolist()
    ended = tokens[-1] in ends
    return StreamedAnswer(_decode(tokenizer, tokens, ends), len(tokens) - ended, ended)


@contextmanager
def _greedy(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], **sizes: int
) -> Iterator[GenerationConfig]:
    """Checks prompts and sizes, and replaces the model's generation config by greedy decoding.

    ``generate`` reads the options that are not set from the model's config.
    """
    for name, value in sizes.items():
        if value < 1:
            raise BaditError(f"{name}: must be at least 1, not {value}")
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise BaditError(f"prompts: prompt {i} has no tokens; give a non-empty prompt")

    # generate of a PeftModel uses the base model's configuration.
    owner: Any = model
    if isinstance(model, PeftModel):
        owner = model.get_base_model()
    original = owner.generation_config
    end_tokens: Any = original.eos_token_id
    if not isinstance(end_tokens, list):
        end_tokens = [end_tokens]
    settings = GenerationConfig(
        max_new_tokens=sizes["max_new_tokens"],
        do_sample=False,
        num_beams=1,
        use_cache=True,
        # The output then has the cache, from which the remaining rows continue.
        return_dict_in_generate=True,
        # Any token will do: padding is masked, and answers are cut before it.
        pad_token_id=tokenizer.pad_token_id or 0,
        eos_token_id=sorted({tokenizer.eos_token_id, *end_tokens} - {None}),
    )
    owner.generation_config = settings
    try:
        yield settings
    finally:
        owner.generation_config = original


def _padded(prompts: Sequence[Sequence[int]], settings: GenerationConfig, model: Any) -> Any:
    """Returns input_ids and attention_mask, (B, longest prompt), int64, on the model's device."""
    collate = AnswerCollator(settings.pad_token_id, "left")
    batch = collate([{"input_ids": prompt} for prompt in prompts])
    return send_to_device(batch, model.device)


def _decode(tokenizer: PreTrainedTokenizerBase, tokens: list[int], ends: Any) -> str:
    # Cut at the end token: the padding after it may have the id of an ordinary token (0, without a
    # padding token), and the end token itself may not be a special token of the tokenizer.
    length = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return str(tokenizer.decode(tokens[:length], skip_special_tokens=True)).strip()

"""Batched greedy decoding: token ids of prompts in, answers as text out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import torch
from tqdm.auto import tqdm

from badit.baselines import batch_of_tasks
from badit.errors import BaditError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


def generate_answers(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 50,
    batch_size: int = 16,
    progress: bool = True,
    tasks: Sequence[str] | None = None,
) -> list[str]:
    """Answer each prompt greedily, up to the first end-of-turn token or `max_new_tokens`.

    The prompts are sorted by length, which keeps the padding small, and the longest come first: memory peaks in the
    first batch, and the progress bar overestimates the time left rather than underestimating it. They are padded on the
    left, and the padding is masked, so an answer does not depend on its batch (up to floating-point rounding).

    Every decoding option of the model's own generation config, such as a repetition penalty, is set aside; its end
    tokens and the tokenizer's both end an answer. The model's training mode is restored; the tokenizer is only read.

    Args:
        model: a causal language model, with or without PEFT adapters, on one device.
        tokenizer: decodes the answers and names the padding token.
        prompts: token ids, one non-empty sequence for each prompt.
        max_new_tokens: the longest answer, in tokens.
        batch_size: prompts decoded at a time.
        progress: show a bar on stderr.
        tasks: each prompt's task, which only methods that tell tasks apart look at.

    Returns:
        The answers in the order of the prompts, without special tokens and outer white space.

    Raises:
        BaditError: an empty prompt, or a size that is not positive.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise BaditError(f"{name}: must be at least 1, not {value}")
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise BaditError(f"prompts: number {i} has no tokens")

    answers = [""] * len(prompts)
    generate = cast("Callable[..., torch.Tensor]", model.generate)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    with (
        _greedy(model, tokenizer, max_new_tokens) as settings,
        evaluation_mode(model),
        tqdm(total=len(prompts), desc="Generating", unit="answer", disable=not progress) as bar,
    ):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            input_ids, attention_mask = _pad_left([prompts[i] for i in batch], settings.pad_token_id)
            with batch_of_tasks(model, None if tasks is None else [tasks[i] for i in batch]):
                sequences = generate(
                    input_ids=input_ids.to(model.device),
                    attention_mask=attention_mask.to(model.device),
                    generation_config=settings,
                )
            new_tokens = sequences[:, input_ids.shape[1] :].tolist()
            for i, tokens in zip(batch, new_tokens, strict=True):
                answers[i] = _decode(tokenizer, tokens, settings.eos_token_id)
            bar.update(len(batch))
    return answers


@contextmanager
def _greedy(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int
) -> Iterator[GenerationConfig]:
    """Plain greedy decoding as the model's only generation config.

    `generate` fills what its argument leaves unset from the model's own config, so passing the settings is not enough:
    a temperature there would raise a warning, a repetition penalty would change the answers.
    """
    from peft import PeftModel
    from transformers import GenerationConfig

    owner = cast("PreTrainedModel", model.get_base_model() if isinstance(model, PeftModel) else model)
    original = owner.generation_config
    pad = tokenizer.pad_token_id
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        pad_token_id=0 if pad is None else pad,
        eos_token_id=_end_tokens(original, tokenizer),
    )
    owner.generation_config = settings
    try:
        yield settings
    finally:
        owner.generation_config = original


def _end_tokens(config: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    own = config.eos_token_id if config is not None else None
    ends = own if isinstance(own, list) else [own]
    return sorted({end for end in (tokenizer.eos_token_id, *ends) if isinstance(end, int)})


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Within, the model is in evaluation mode; afterwards each of its modules is in the mode that it was in."""
    # Module by module: a caller may have switched off the dropout of some parts only.
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _pad_left(prompts: list[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both (batch, longest prompt), int64."""
    width = max(map(len, prompts))
    input_ids = torch.full((len(prompts), width), pad)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = torch.tensor(prompt)
        attention_mask[row, width - len(prompt) :] = 1
    return input_ids, attention_mask


def _decode(tokenizer: PreTrainedTokenizerBase, tokens: list[int], ends: list[int]) -> str:
    # What follows the end is padding, whose id can be an ordinary token's where the tokenizer has no padding token; and
    # a model's end token need not be a special token of the tokenizer.
    stop = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return str(tokenizer.decode(tokens[:stop], skip_special_tokens=True)).strip()

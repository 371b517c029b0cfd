"""Prepares the training of an adapter by a trainer of transformers or TRL."""

from collections.abc import Iterator, Mapping
from typing import Any

from transformers import Trainer

from badit.data.examples import AnswerCollator
from badit.support.errors import BaditError
from badit.training.trainer import AnswerTrainer
from badit.tuner.model import Hooks, calls_during_training, hooks_of


def prepare(trainer: Trainer) -> None:
    """Does what an adapter needs before ``trainer.train()``; for BADIT, finds its clusters.

    It reads training prompts from the trainer's batches, also TRL's, with the base model
    (:meth:`badit.BaditModel.start_task`). With several processes, call it on each. A second call,
    and a call for a model without such needs, such as PEFT's LoRA, change nothing.

    Raises:
        BaditError: no row has a prompt, as if the labels begin at the first token; or the method
            needs calls during the training that the trainer does not make.
    """
    model = getattr(trainer, "model", None)
    if not isinstance(trainer, Trainer) or model is None:
        raise BaditError(
            f"prepare: needs a trainer of transformers or TRL, not {type(trainer).__name__}; in "
            "another loop, call hooks_of(model).start_task({'all': batches})"
        )
    hooks = hooks_of(model)
    if not isinstance(trainer, AnswerTrainer):
        _refuse_calls_during_training(hooks, type(trainer).__name__)
    hooks.start_task({"all": _batches(trainer)})


def _refuse_calls_during_training(hooks: Hooks, trainer: str) -> None:
    names = calls_during_training(type(hooks))
    if names:
        raise BaditError(
            f"prepare: {type(hooks).__name__} needs calls of {', '.join(names)} during the "
            f"training, which {trainer} does not make; use badit train, or your own loop"
        )


def _batches(trainer: Any) -> Iterator[Mapping[str, Any]]:
    """Yields the training batches.

    The batches of a trainer that generates answers (GRPO) are rows with a text or chat ``prompt``,
    repeated for several answers. Of these it yields each prompt once, with the tokens that the
    trainer generates from.
    """
    collate = AnswerCollator(0)
    yielded = set()
    for batch in trainer.get_train_dataloader():
        if isinstance(batch, Mapping):
            yield batch
            continue
        prompts = {_prompt_ids(trainer, row["prompt"]) for row in batch} - yielded
        yielded |= prompts
        if prompts:
            yield collate([{"input_ids": ids} for ids in sorted(prompts)])


def _prompt_ids(trainer: Any, prompt: Any) -> tuple[int, ...]:
    tokenizer = trainer.processing_class
    if isinstance(prompt, str):
        return tuple(tokenizer(prompt)["input_ids"])
    encoded = tokenizer.apply_chat_template(
        prompt,
        tools=trainer.tools or None,  # some templates render an empty list
        chat_template=trainer.chat_template,
        add_generation_prompt=True,
        return_dict=True,
        **trainer.chat_template_kwargs,
    )
    return tuple(encoded["input_ids"])

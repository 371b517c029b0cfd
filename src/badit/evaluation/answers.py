"""Answers the instances of tasks with a model, and scores the answers."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from badit.data import AnswerCollator, Instance, Task
from badit.evaluation.generation import generate_answers
from badit.evaluation.losses import reward_margins
from badit.metrics.answers import Prediction, instance_scores, mean_scores
from badit.recipe.schema import Recipe, Split
from badit.support.errors import BaditError
from badit.training.encoding import encoded, refuse_beyond_model
from badit.training.trainer import answer_losses
from badit.tuner.prompt import IGNORED_LABEL, cache_of, drop_last

#: Maps the token ids of prompts to answers.
Answer = Callable[[list[list[int]]], list[str]]


def score_model(  # noqa: PLR0913 (what is scored, and how)
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    tasks: Sequence[Task],
    split: Split,
    *,
    progress: bool,
    answer: Answer | None = None,
    reference: Any = None,
) -> tuple[dict[str, Any], list[Prediction]]:
    """Answers every instance in a split of the tasks, with the recipe's settings, and scores them.

    All tasks are decoded together, so that batches hold prompts of similar length. With ``answer``
    the model generates nothing, and only its answers are scored. ``reference`` is the untuned model
    of preference data (default: see :func:`badit.evaluation.losses.reward_margins`).

    Returns the scores in the format of :func:`badit.metrics.answers.mean_scores`, and the
    predictions, in the order of the tasks. BaditError if a prompt is empty.
    """
    pairs: list[tuple[Task, Instance]] = []
    for task in tasks:
        pairs += [(task, instance) for instance in getattr(task, split)]
    if not pairs:
        names = ", ".join(task.name for task in tasks)
        raise BaditError(f"{names}: no {split} instances to score")
    examples = encoded(tokenizer, recipe, pairs, model)
    prompts = [example["input_ids"][: example["prompt_length"]] for example in examples]

    losses: Sequence[float | None] = [None] * len(examples)
    margins: Sequence[float | None] = losses
    if answer is None:
        # One pass over a prompt measures its reference's NLL and fills the cache for decoding.
        prefill = ReferenceLosses(model, examples, prompts)
        losses = prefill.losses
        answer = _by_decoding(prefill, tokenizer, recipe, progress)
        if all("rejected_ids" in example for example in examples):
            margins = reward_margins(model, recipe, examples, reference)
    predictions = []
    for (task, instance), prompt, text, nll, margin in zip(
        pairs, prompts, answer(prompts), losses, margins, strict=True
    ):
        if not math.isfinite(nll or 0) or not math.isfinite(margin or 0):
            problem = "the NLL is not finite; the weights are damaged, or model.dtype has too small"
            fix = "a range: use bfloat16 or float32"
            raise BaditError(f"task {task.name}, instance {instance.id}: {problem} {fix}")
        decoded = str(tokenizer.decode(prompt))
        predictions.append(
            Prediction(task.name, instance.id, text, instance.outputs, decoded, nll, margin)
        )
    return mean_scores(instance_scores(predictions)), predictions


def _by_decoding(
    prefill: "ReferenceLosses", tokenizer: PreTrainedTokenizerBase, recipe: Recipe, progress: bool
) -> Answer:
    """Returns the function that answers by greedy decoding; BaditError if a prompt is too long."""
    sizes = recipe.evaluation.model_dump(include={"max_new_tokens", "batch_size"})
    # Prompts without references: the generated tokens take their place.
    inputs = [
        {**example, "input_ids": prompt}
        for example, prompt in zip(prefill.examples, prefill.prompts, strict=True)
    ]
    refuse_beyond_model(inputs, prefill.model, new_tokens=sizes["max_new_tokens"])
    options = {"progress": progress, "tasks": prefill.tasks, "prefill": prefill, **sizes}
    return partial(generate_answers, prefill.model, tokenizer, **options)


class ReferenceLosses:
    """Measures the mean NLL of each reference answer in the pass over its prompt.

    ``losses`` has the NLL of each example, None until its batch is decoded.
    """

    def __init__(
        self, model: Any, examples: Sequence[dict[str, Any]], prompts: Sequence[list[int]]
    ) -> None:
        self.model = model
        self.examples = examples
        self.prompts = prompts
        self.tasks = [example["task"] for example in examples]
        self.references = [
            example["input_ids"][len(prompt) :]
            for example, prompt in zip(examples, prompts, strict=True)
        ]
        self.losses: list[float | None] = [None] * len(examples)

    @torch.no_grad()
    def __call__(self, batch: list[int], padded: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Measures the losses of a batch, given by indices, and returns the prompts' cache.

        ``padded`` has the prompts' input_ids and attention_mask (B, T), padded on the left.
        """
        rows = [{"input_ids": ids, "labels": ids} for ids in (self.references[i] for i in batch)]
        # Prompts are padded on the left, references on the right: all start in one column.
        answers = send_to_device(AnswerCollator(0)(rows), self.model.device)
        inputs: dict[str, Any] = {}
        for name in padded:
            inputs[name] = torch.cat([padded[name], answers[name]], dim=1)
        # As in generate, positions do not count padding, which would otherwise be −1.
        positions = inputs["attention_mask"].cumsum(dim=1) - 1
        inputs["position_ids"] = positions.clamp(min=0)
        prompt_width = padded["input_ids"].shape[1]
        inputs["labels"] = F.pad(answers["labels"], (prompt_width, 0), value=IGNORED_LABEL)
        inputs["tasks"] = [self.tasks[i] for i in batch]

        losses_L, row_L, outputs = answer_losses(self.model, inputs, use_cache=True)
        sums_B = losses_L.new_zeros(len(batch)).index_add(0, row_L, losses_L)
        # Every token of a reference has a loss, so its length is the number of its losses.
        means_B = sums_B / answers["attention_mask"].sum(dim=1)
        for i, loss in zip(batch, means_B.tolist(), strict=True):
            self.losses[i] = loss
        cache = cache_of(outputs)
        # The last prompt token and the answer are removed: decoding starts with that token.
        if drop_last(cache, answers["labels"].shape[1] + 1):
            return cache
        return {}

"""Losses of reference answers (NLL in nats), which need only forward passes."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from peft import PeftModel

from badit.data import AnswerCollator, batches_by_task
from badit.data.encoding import sequences
from badit.data.table import chunks
from badit.recipe.schema import Recipe
from badit.runs.resolved import ResolvedRun
from badit.support.console import waiting
from badit.support.files import write_json
from badit.training.fit import validation_examples
from badit.training.loading import load_base, load_run
from badit.training.trainer import answer_losses


@torch.no_grad()
def prompt_losses(
    model: Any, batches: Iterable[Mapping[str, Any]]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns for each instance (P) the sum of its answer tokens' losses, and their number."""
    sums, counts = [], []
    for batch in batches:
        losses_L, row_L, _ = answer_losses(model, send_to_device(batch, model.device))
        row_L = row_L.cpu()
        rows = len(batch["input_ids"])
        # minlength, because the last rows may have no answer tokens.
        sums.append(row_L.bincount(losses_L.cpu().double(), minlength=rows))
        counts.append(row_L.bincount(minlength=rows))
    return torch.cat(sums).numpy(), torch.cat(counts).numpy()


def reward_margins(
    model: Any, recipe: Recipe, examples: Sequence[Mapping[str, Any]], reference: Any = None
) -> list[float]:
    """Returns by how much more a model prefers each chosen answer than the untuned model does.

    For a pair of answers c and r this is log π(c)/π₀(c) − log π(r)/π₀(r) in nats, with the
    likelihoods π of the whole answers: DPO's implicit reward of c minus that of r, over beta
    (Rafailov et al. 2023, arXiv:2305.18290). ``reference`` is the untuned model. By default it is
    the model with its adapter switched off, or is loaded.
    """
    likelihoods_2P = _log_likelihoods(model, recipe, examples)
    if reference is not None:
        untuned_2P = _log_likelihoods(reference, recipe, examples)
    elif isinstance(model, PeftModel):
        with model.disable_adapter():
            untuned_2P = _log_likelihoods(model, recipe, examples)
    else:
        reference, _ = load_base(recipe)
        untuned_2P = _log_likelihoods(reference, recipe, examples)
    chosen_P, rejected_P = likelihoods_2P - untuned_2P
    return (chosen_P - rejected_P).tolist()


def _log_likelihoods(
    model: Any, recipe: Recipe, examples: Sequence[Mapping[str, Any]]
) -> np.ndarray:
    """Returns the log-likelihoods (2, P) of the chosen and the rejected answers."""
    rows = sequences(examples)
    # Sequences of similar length need little padding.
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    collate = AnswerCollator(0, with_tasks=True)
    batches = [
        collate([rows[i] for i in batch]) for batch in chunks(order, recipe.evaluation.batch_size)
    ]
    sums, _ = prompt_losses(model, waiting(batches, "Preferences", "batch"))
    likelihoods = np.empty(len(rows))
    likelihoods[order] = -sums
    return likelihoods.reshape(2, -1)


def validation_loss(run: ResolvedRun) -> None:
    """Measures the loss per answer token on the validation split; writes ``validation.json``.

    Learning rates are chosen by this loss, which is far less noisy than generated answers. The file
    has ``loss``, the mean over tasks, and ``tasks``, the loss of each task, in nats. Of preference
    data it is DPO's loss of a pair, with its usual sigmoid.
    """
    run.refuse_unscorable("validation")
    model, tokenizer = load_run(run)
    examples = validation_examples(tokenizer, run.recipe, run.tasks, model)
    if run.recipe.training.objective == "dpo":
        _write_losses(run, _dpo_losses(model, run.recipe, examples))
        return
    collate = AnswerCollator(tokenizer.pad_token_id, with_tasks=True)
    batches = batches_by_task(examples, collate, run.recipe.evaluation.batch_size)
    losses = {}
    for task, batches_of_task in waiting([*batches.items()], "Validation loss", "task"):
        sums_P, counts_P = prompt_losses(model, batches_of_task)
        # A mean over tokens: long answers count more within a task, but not across tasks.
        losses[task] = float(sums_P.sum() / counts_P.sum())
    _write_losses(run, losses)


def _dpo_losses(
    model: Any, recipe: Recipe, examples: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """Returns the mean loss of the pairs of each task."""
    losses = defaultdict[str, list[float]](list)
    margins = reward_margins(model, recipe, examples)
    for example, margin in zip(examples, margins, strict=True):
        # −log σ(β · margin)
        losses[example["task"]].append(float(np.logaddexp(0, -recipe.training.dpo_beta * margin)))
    return {task: fmean(of_task) for task, of_task in losses.items()}


def _write_losses(run: ResolvedRun, losses: Mapping[str, float]) -> None:
    content = {"loss": fmean(losses.values()), "tasks": losses}
    write_json(run.folder.validation_path, content)

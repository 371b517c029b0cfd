"""Losses of reference answers (NLL in nats), which need only forward passes."""

from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device

from badit.data import AnswerCollator, batches_by_task
from badit.runs.resolved import ResolvedRun
from badit.support.console import waiting
from badit.support.files import write_json
from badit.training.fit import validation_examples
from badit.training.loading import load_run
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


def validation_loss(run: ResolvedRun) -> None:
    """Measures the loss per answer token on the validation split; writes ``validation.json``.

    Learning rates are chosen by this loss, which is far less noisy than generated answers. The file
    has ``loss``, the mean over tasks, and ``tasks``, the loss of each task, in nats.
    """
    run.refuse_unscorable("validation")
    model, tokenizer = load_run(run)
    examples = validation_examples(tokenizer, run.recipe, run.tasks, model)
    collate = AnswerCollator(tokenizer.pad_token_id, with_tasks=True)
    batches = batches_by_task(examples, collate, run.recipe.evaluation.batch_size)
    losses = {}
    for task, batches_of_task in waiting([*batches.items()], "Validation loss", "task"):
        sums_P, counts_P = prompt_losses(model, batches_of_task)
        # A mean over tokens: long answers count more within a task, but not across tasks.
        losses[task] = float(sums_P.sum() / counts_P.sum())
    content = {"loss": fmean(losses.values()), "tasks": losses}
    write_json(run.folder.validation_path, content)

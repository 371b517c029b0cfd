"""Trains and scores recipes, scores runs again, measures their validation loss and loads their models.

A run's scores are in ``scores.json``. The scored answers are in ``predictions/``, one file per task.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from badit.data import AnswerCollator, Instance, Task, batches_by_task
from badit.evaluation.generation import generate_answers
from badit.hub.card import write_run_card
from badit.metrics.answers import Prediction, instance_scores, mean_scores
from badit.metrics.statistics import both_forms
from badit.recipe.schema import Recipe, Split, make_recipe
from badit.runs.folder import RunFolder
from badit.runs.predictions import write_predictions
from badit.runs.scores import read_scores
from badit.support.console import is_main_process, say
from badit.support.errors import BaditError, explained, refuse_unknown
from badit.support.files import copy_folder, exclusive, write_json
from badit.training.fit import (
    changed_inputs,
    encoded,
    fit,
    load_run,
    make_plan,
    refuse_beyond_model,
    task_fingerprints,
)
from badit.training.trainer import answer_losses
from badit.tuner.prompt import IGNORED_LABEL, cache_of, drop_last


def train_and_score(
    recipe: Recipe, *, progress: bool = True, allow_changed_inputs: bool = False
) -> None:
    """Trains a recipe and scores the run, or resumes it; finished work is not repeated.

    With several processes all of them train, and only rank 0 scores. Errors as of :func:`badit.train`.
    """
    # Rank 0 locks the folder for all processes.
    lock = exclusive(Path(recipe.output)) if is_main_process() else nullcontext()
    show_progress = progress and is_main_process()
    with explained(recipe.output), lock:
        run = fit(recipe, progress=show_progress, allow_changed_inputs=allow_changed_inputs)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        if not is_main_process():
            return
        if run.scores_path.is_file():
            write_run_card(run)  # an interrupted run may have scores but no card
        else:
            evaluate(run, progress=progress, resume=True)


def evaluate(
    run: RunFolder,
    *,
    split: Split | None = None,
    batch_size: int | None = None,
    progress: bool = True,
    resume: bool = False,
) -> dict[str, Any]:
    """Scores a run on its tasks and writes the scores and predictions to its folder.

    The recipe's own split is written to ``scores.json`` and ``predictions/``, another split to ``scores-SPLIT.json``
    and ``predictions-SPLIT/``. On its own split, a sequence of tasks is scored after each task, and the scores include
    the matrix of these scores. On another split, only the final model is scored. With ``resume``, stages that
    already have scores are not scored again. Errors as of :meth:`badit.RunFolder.evaluate`.
    """
    if split is not None:
        refuse_unknown("split", split, get_args(Split))
    recipe = run.trusted_recipe()
    if batch_size is not None:
        recipe = make_recipe(recipe, {"evaluation": {"batch_size": batch_size}})
    split = split or recipe.evaluation.split
    plan = make_plan(recipe, split=split)
    is_own = split == recipe.evaluation.split
    if changed := changed_inputs(run, task_fingerprints(plan.tasks)):
        if split == "validation":  # drawn again from the changed data
            fix = "restore them, or train again with another output=FOLDER"
            raise BaditError(
                f"{run.path}: {', '.join(changed)} changed, so trained instances may be held out; {fix}"
            )
        say(f"badit: {', '.join(changed)} changed since the run was trained")
    in_sequence = is_own and recipe.data.order and plan.method.trains
    folders = [folder for folder, _ in plan.stages] if in_sequence else [run]
    suffix = "" if is_own else f"-{split}"
    by_stage: list[dict[str, Any]] = []
    with exclusive(run.path):
        for number, folder in enumerate(folders, start=1):
            tasks = (
                plan.tasks[:number]
                if in_sequence and not recipe.evaluation.unseen_tasks
                else plan.tasks
            )
            path = folder.path / f"scores{suffix}.json"
            if not resume or not path.is_file():
                scores, predictions = score_model(
                    *load_run(folder, recipe), recipe, tasks, split, progress=progress
                )
                write_predictions(folder.path / f"predictions{suffix}", predictions)
                write_json(path, scores)
            by_stage.append(read_scores(path))
        scores = by_stage[-1]
        if in_sequence:
            names = [task.name for task in plan.tasks]
            matrix = [
                [each["tasks"].get(name, {}).get("rouge_l") for name in names] for each in by_stage
            ]
            scores |= {"order": names, "matrix": matrix, "continual": both_forms(matrix)}
            copy_folder(folders[-1].predictions_path, run.predictions_path)
            write_json(run.scores_path, scores)
        if is_own:
            write_run_card(run)
    return scores


def score_model(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    tasks: Sequence[Task],
    split: Split,
    *,
    progress: bool,
    answer: Callable[[list[list[int]]], list[str]] | None = None,
) -> tuple[dict[str, Any], list[Prediction]]:
    """Answers every instance in a split of the tasks, with the recipe's prompts and settings, and scores the answers.

    All tasks are decoded together, so that batches hold prompts of similar length. ``answer``, if given, maps the token
    ids of prompts to answers. The model then generates nothing, and the NLL is not measured.

    Returns the scores in the format of :func:`badit.metrics.answers.mean_scores`, and the predictions, in the order of the
    tasks; BaditError if a prompt is empty.
    """
    pairs: list[tuple[Task, Instance]] = [
        (task, instance) for task in tasks for instance in getattr(task, split)
    ]
    if not pairs:
        raise BaditError(f"{', '.join(task.name for task in tasks)}: no {split} instances to score")
    examples = encoded(tokenizer, recipe, pairs, model)
    prompts = [example["input_ids"][: example["prompt_length"]] for example in examples]
    names = [example["task"] for example in examples]
    losses: list[float | None] = [None] * len(examples)

    @torch.no_grad()
    def prefill(batch: list[int], padded: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Computes the mean NLL of each reference in the pass over its prompt, and returns the prompts' cache."""
        references = [examples[i]["input_ids"][len(prompts[i]) :] for i in batch]
        collated = AnswerCollator(0)([{"input_ids": ids, "labels": ids} for ids in references])
        answers = send_to_device(collated, model.device)
        inputs: dict[str, Any] = {
            name: torch.cat([padded[name], answers[name]], dim=1) for name in padded
        }
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
        inputs["labels"] = F.pad(
            answers["labels"], (padded["input_ids"].shape[1], 0), value=IGNORED_LABEL
        )
        inputs["tasks"] = [names[i] for i in batch]
        losses_L, row_L, outputs = answer_losses(model, inputs, use_cache=True)
        sums_B = losses_L.new_zeros(len(batch)).index_add(0, row_L, losses_L)
        for i, loss in zip(
            batch, (sums_B / answers["attention_mask"].sum(dim=1)).tolist(), strict=True
        ):
            losses[i] = loss
        cache = cache_of(outputs)
        return cache if drop_last(cache, answers["labels"].shape[1] + 1) else {}

    if answer is None:
        sizes = recipe.evaluation.model_dump(include={"max_new_tokens", "batch_size"})
        without_answers = (
            {**example, "input_ids": ids} for example, ids in zip(examples, prompts, strict=True)
        )
        refuse_beyond_model(without_answers, model, more=sizes["max_new_tokens"])
        answer = partial(
            generate_answers,
            model,
            tokenizer,
            **sizes,
            progress=progress,
            tasks=names,
            prefill=prefill,
        )
    predictions = []
    for (task, instance), prompt, text, nll in zip(
        pairs, prompts, answer(prompts), losses, strict=True
    ):
        if nll is not None and not math.isfinite(nll):
            fix = "the weights are damaged, or model.dtype has too small a range: use bfloat16 or float32"
            raise BaditError(
                f"task {task.name}, instance {instance.id}: the NLL is not finite; {fix}"
            )
        shown = str(tokenizer.decode(prompt))
        predictions.append(Prediction(task.name, instance.id, text, instance.outputs, shown, nll))
    return mean_scores(instance_scores(predictions)), predictions


@torch.no_grad()
def prompt_losses(
    model: Any, batches: Iterable[Mapping[str, Any]]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns for each instance (P) the sum of its answer tokens' losses (NLL in nats), and their number."""
    sums, counts = [], []
    for batch in batches:
        losses_L, row_L, _ = answer_losses(model, send_to_device(batch, model.device))
        row_L, rows = row_L.cpu(), len(batch["input_ids"])
        sums.append(row_L.bincount(losses_L.cpu().double(), minlength=rows))
        counts.append(row_L.bincount(minlength=rows))
    return torch.cat(sums).numpy(), torch.cat(counts).numpy()


def validation_loss(run: RunFolder) -> None:
    """Measures the NLL of the answers per token on the validation split and writes it to ``validation.json``.

    Learning rates are chosen by this loss. It needs only forward passes and is far less noisy than generated answers.
    The file has ``loss``, the mean over tasks, and ``tasks``, the loss of each task, in nats.
    """
    recipe = run.trusted_recipe()
    plan = make_plan(recipe, split="validation")
    model, tokenizer = load_run(run, recipe)
    examples = encoded(
        tokenizer, recipe, [(task, each) for task in plan.tasks for each in task.validation], model
    )
    examples.sort(
        key=lambda example: len(example["input_ids"])
    )  # batches of similar length have little padding
    collate = AnswerCollator(tokenizer.pad_token_id, with_tasks=True)
    batches = batches_by_task(examples, collate, recipe.evaluation.batch_size)
    losses = {name: prompt_losses(model, of_task) for name, of_task in batches.items()}
    by_task = {
        name: float(sums_P.sum() / counts_P.sum()) for name, (sums_P, counts_P) in losses.items()
    }
    write_json(run.validation_path, {"loss": fmean(by_task.values()), "tasks": by_task})

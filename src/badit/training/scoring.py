"""What a trained run can do: be scored on its tasks, and answer a prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

from badit.card import write_run_card
from badit.data import AnswerCollator, Task, encode_prompt, on_device
from badit.errors import BaditError, explained
from badit.evaluation.evaluate import Prediction, evaluate_tasks, write_predictions
from badit.evaluation.results import read_scores
from badit.files import copy_folder, read_json, write_json
from badit.generation import generate_answers
from badit.methods import build_method
from badit.recipe import Recipe
from badit.runs import RunFolder, is_main_process
from badit.statistics import FORMS, continual_scores
from badit.train import Plan, Split, base_model, encoded, fit, make_plan, pad_id
from badit.trainer import answer_losses

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def train_and_score(recipe: Recipe, *, progress: bool = True) -> dict[str, Any]:
    """Runs a recipe to its end, or to its end from where it stopped, and returns its scores.

    Under accelerate or torchrun all processes train; the first goes on alone to score, and the others return {}.

    Raises:
        BaditError: bad input, or an output folder that holds another recipe's run.
    """
    with explained(Path(recipe.output)):
        run = fit(recipe, progress=progress)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        if not is_main_process():
            return {}
        if run.scores.is_file():
            write_run_card(run)  # an earlier process may have ended between the two
            return read_scores(run.scores)
        return evaluate(run.path, progress=progress, trust_remote_code=recipe.model.trust_remote_code)


def evaluate(
    path: str | Path, *, split: Split | None = None, progress: bool = True, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Scores a run on its tasks and keeps the scores and predictions in its folder.

    The recipe's own split goes to ``scores.json`` and ``predictions/``, another one to ``scores-SPLIT.json`` and
    ``predictions-SPLIT/``. A sequence of tasks is scored on its own split after each of them, and its scores have the
    matrix of all of those as well; on another split its last state alone is scored.

    A run whose base model brings Python code is refused without ``trust_remote_code``.

    Raises:
        BaditError: no such run, no adapter yet or a damaged one, or a split without instances.
    """
    run = RunFolder.existing(path)
    recipe = run.recipe(trust_remote_code=trust_remote_code)
    own_split = recipe.evaluation.split
    plan = make_plan(recipe, split=split or own_split)
    if split not in (None, own_split):
        return _score(run, recipe, plan.tasks, split, progress=progress, suffix=f"-{split}")
    if plan.sequential and plan.method.trains:
        scores = _score_sequence(run, plan, progress)
    else:
        scores = _score(run, recipe, plan.tasks, own_split, progress=progress)
    write_run_card(run)
    return scores


def _score(
    folder: RunFolder, recipe: Recipe, tasks: list[Task], split: Split, *, progress: bool, suffix: str = ""
) -> dict[str, Any]:
    scores, predictions = score_model(*load_run(folder, recipe), recipe, tasks, split, progress=progress)
    write_predictions(folder.path / f"predictions{suffix}", predictions)
    write_json(folder.path / f"scores{suffix}.json", scores)
    return scores


def score_model(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    tasks: list[Task],
    split: Split,
    *,
    progress: bool,
) -> tuple[dict[str, Any], list[Prediction]]:
    """Scores and predictions, as :func:`evaluate_tasks` has them, with a recipe's prompts and settings."""
    return evaluate_tasks(
        model,
        tokenizer,
        tasks,
        encode_prompt=lambda task, instance: encoded(tokenizer, recipe, task, instance, answer=False)["input_ids"],
        split=split,
        max_new_tokens=recipe.evaluation.max_new_tokens,
        batch_size=recipe.evaluation.batch_size,
        progress=progress,
    )


def _score_sequence(run: RunFolder, plan: Plan, progress: bool) -> dict[str, Any]:
    """Every stage's model on the tasks that it has learnt, and perhaps on those to come; what is scored stays so."""
    names = [task.name for task in plan.tasks]
    by_stage = []
    for number, stage in enumerate(plan.stages, start=1):
        tasks = plan.tasks if plan.recipe.evaluation.unseen_tasks else plan.tasks[:number]
        if not stage.folder.scores.is_file():
            _score(stage.folder, plan.recipe, tasks, plan.recipe.evaluation.split, progress=progress)
        by_stage.append(read_scores(stage.folder.scores))
    matrix = [[scores["tasks"].get(name, {}).get("rouge_l") for name in names] for scores in by_stage]
    numbers = [[math.nan if score is None else score for score in row] for row in matrix]
    continual = {form: continual_scores(numbers, form=form)._asdict() for form in FORMS}
    scores = {**by_stage[-1], "order": names, "matrix": matrix, "continual": continual}
    copy_folder(plan.stages[-1].folder.predictions, run.predictions)
    write_json(run.scores, scores)
    return scores


@torch.no_grad()
def validation_loss(path: str | Path, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """The answers' negative log-likelihood a token on held-out training instances, kept in ``validation.json``.

    It is what learning rates are chosen by: forward passes alone, and far less noisy than scores of generated answers.

    Returns:
        ``loss``, the mean over tasks, and ``tasks``, each task's own, in nats.

    Raises:
        BaditError: as :func:`evaluate`.
    """
    run = RunFolder.existing(path)
    kept = run.path / "validation.json"
    if kept.is_file():
        return read_json(kept)
    recipe = run.recipe(trust_remote_code=trust_remote_code)
    plan = make_plan(recipe, split="validation")
    model, tokenizer = load_run(run, recipe)
    collate = AnswerCollator(pad_id(tokenizer), with_tasks=True)
    examples = [encoded(tokenizer, recipe, task, instance) for task in plan.tasks for instance in task.validation]
    examples.sort(key=lambda example: len(example["input_ids"]))
    losses: dict[str, list[float]] = {task.name: [] for task in plan.tasks}
    for start in range(0, len(examples), recipe.evaluation.batch_size):
        batch = collate(examples[start : start + recipe.evaluation.batch_size])
        losses_L, row_L, _ = answer_losses(model, on_device(batch, model.device), model)
        for loss, row in zip(losses_L.tolist(), row_L.tolist(), strict=True):
            losses[batch["tasks"][row]].append(loss)
    by_task = {name: fmean(of_task) for name, of_task in losses.items()}
    result = {"loss": fmean(by_task.values()), "tasks": by_task}
    write_json(kept, result)
    return result


def load_run(
    run: RunFolder, recipe: Recipe | None = None
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """A run's base model with what it has learnt (if its method trains), for inference.

    Args:
        run: a run's folder, or a stage's of it together with the run's ``recipe``.

    Raises:
        BaditError: the run has no adapter yet, or it is damaged.
    """
    recipe = recipe or run.recipe()
    method = build_method(recipe.method)
    if not method.trains:
        return base_model(recipe)
    if not run.adapter.is_dir():
        raise BaditError(f"{run.path}: has no adapter yet; finish its training with: badit train {run.config}")
    model, tokenizer = base_model(recipe)
    return method.load(model, run.adapter), tokenizer


def answers(
    run: RunFolder,
    prompts: Sequence[str],
    *,
    task: str | None = None,
    max_new_tokens: int = 50,
    batch_size: int = 16,
    progress: bool = False,
    trust_remote_code: bool = False,
) -> list[str]:
    """A run's answers to prompts' texts, in the prompt format of its recipe.

    Args:
        task: the task that the prompts belong to, which only methods that tell tasks apart ask for.

    Raises:
        BaditError: an empty prompt, or a run that cannot be loaded.
    """
    if not all(prompt.strip() for prompt in prompts):
        raise BaditError("the prompt is empty")
    recipe = run.recipe(trust_remote_code=trust_remote_code)
    section = recipe.prompt
    model, tokenizer = load_run(run, recipe)
    encode = partial(
        encode_prompt, tokenizer, max_source_tokens=section.max_source_tokens, chat_template=section.chat_template
    )
    return generate_answers(
        model,
        tokenizer,
        [encode(prompt) for prompt in prompts],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        progress=progress,
        tasks=None if task is None else [task] * len(prompts),
    )

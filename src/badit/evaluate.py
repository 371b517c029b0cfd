"""What is done with a recipe and its run: train and score it, score it again, measure its loss, load it.

A run's scores are in ``scores.json`` and the answers that they are of in ``predictions/``, a file for each task.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, get_args

import torch
from pydantic import TypeAdapter
from torch.nn.utils.rnn import pad_sequence

from badit.card import write_run_card
from badit.data import AnswerCollator, Instance, Task, on_device
from badit.data.prompts import IGNORED_LABEL
from badit.environment import is_main_process
from badit.errors import BaditError, explained, refuse_unknown
from badit.files import copy_folder, exclusive, inside, read_json, read_jsonl, write_json, write_text
from badit.generation import evaluation_mode, generate_answers
from badit.methods import build_method
from badit.metrics import Prediction, group_by_task, instance_scores, mean_scores
from badit.recipe import Recipe
from badit.results import read_scores
from badit.run import Run
from badit.statistics import both_forms
from badit.train import (
    BASE_MODEL,
    Plan,
    Split,
    base_model,
    changed_inputs,
    encoded,
    fit,
    in_use,
    make_plan,
    model_fingerprint,
    pad_id,
    refuse_beyond_model,
)
from badit.trainer import answer_losses
from badit.tuner.prompt import cache_of, drop_last

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_PREDICTION = TypeAdapter(Prediction)


def train_and_score(recipe: Recipe, *, progress: bool = True, allow_changed_inputs: bool = False) -> dict[str, Any]:
    """Runs a recipe to its end, or to its end from where it stopped, and returns its scores.

    Under accelerate or torchrun all processes train; then the first scores alone, and the others return {}.

    Raises:
        BaditError: bad input, or an output folder that holds another recipe's run.
    """
    with explained(recipe.output), in_use(recipe):
        run = fit(recipe, progress=progress, allow_changed_inputs=allow_changed_inputs)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        if not is_main_process():
            return {}
        if run.scores_path.is_file():
            write_run_card(run)  # an earlier process may have ended between the two
            return read_scores(run.scores_path)
        trusted = recipe.model.trust_remote_code
        return evaluate(run.path, progress=progress, trust_remote_code=trusted, keep_stages=True)


def evaluate(
    path: str | Path,
    *,
    split: Split | None = None,
    progress: bool = True,
    trust_remote_code: bool = False,
    keep_stages: bool = False,
) -> dict[str, Any]:
    """Scores a run on its tasks and writes the scores and predictions in its folder.

    The recipe's own split goes to ``scores.json`` and ``predictions/``, another one to ``scores-SPLIT.json`` and
    ``predictions-SPLIT/``. A sequence of tasks is scored on its own split after each of them, and its scores have the
    matrix of all of those as well; on another split its last state alone is scored. ``keep_stages`` takes the scores of
    those that have been scored already.

    A run whose base model brings Python code is refused without ``trust_remote_code``.

    Raises:
        BaditError: no such run or split, no adapter yet or a damaged one, or a split without instances.
    """
    if split is not None:
        refuse_unknown("split", split, get_args(Split))
    run = Run(path)
    recipe = run.trusted_recipe(trust_remote_code)
    split = split or recipe.evaluation.split
    plan = make_plan(recipe, split=split)
    is_own = split == recipe.evaluation.split
    with exclusive(run.path):
        if is_own and plan.sequential and plan.method.trains:
            scores = _score_sequence(run, plan, progress, keep_stages)
        else:
            scores = _score(run, recipe, plan.tasks, split, progress)
        if is_own:
            write_run_card(run)
    return scores


def _score(run: Run, recipe: Recipe, tasks: list[Task], split: Split, progress: bool) -> dict[str, Any]:
    """Scores a run or a stage of one on a split and writes the files."""
    suffix = "" if split == recipe.evaluation.split else f"-{split}"
    scores, predictions = score_model(*load_run(run, recipe), recipe, tasks, split, progress=progress)
    write_predictions(run.path / f"predictions{suffix}", predictions)
    write_json(run.path / f"scores{suffix}.json", scores)
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
    """Answers every instance of the tasks' split, with a recipe's prompts and settings, and scores the answers.

    All tasks are decoded together, so that batches hold prompts of like length. ``answer`` takes prompts' token ids and
    answers in place of the model, which is then not used; the NLL is left out.

    Returns the scores as :func:`badit.metrics.mean_scores` has them, and the predictions, in the order of the tasks;
    BaditError for an empty prompt.
    """
    pairs: list[tuple[Task, Instance]] = [(task, instance) for task in tasks for instance in getattr(task, split)]
    examples = encoded(tokenizer, recipe, pairs, model)
    prompts = [example["input_ids"][: example["prompt_length"]] for example in examples]
    if answer is not None:
        found, losses = answer(prompts), [None] * len(pairs)
    else:
        without_answers = ({**example, "input_ids": ids} for example, ids in zip(examples, prompts, strict=True))
        refuse_beyond_model(without_answers, model, more=recipe.evaluation.max_new_tokens)
        losses = [math.nan] * len(pairs)
        found = generate_answers(
            model,
            tokenizer,
            prompts,
            max_new_tokens=recipe.evaluation.max_new_tokens,
            batch_size=recipe.evaluation.batch_size,
            progress=progress,
            tasks=[task.name for task, _ in pairs],
            prefill=partial(_prefill, model, examples, losses),
        )
    predictions = [
        Prediction(task.name, instance.id, text, tuple(instance.outputs), str(tokenizer.decode(prompt)), nll)
        for (task, instance), prompt, text, nll in zip(pairs, prompts, found, losses, strict=True)
    ]
    return mean_scores(instance_scores(group_by_task(predictions))), predictions


@torch.no_grad()
def _prefill(
    model: Any,
    examples: Sequence[Mapping[str, Any]],
    losses: list[float],
    batch: list[int],
    prompts_BT: torch.Tensor,
    attended_BT: torch.Tensor,
) -> dict[str, Any]:
    """One pass over a batch's prompts and references: writes the references' mean NLL, returns the prompts' cache."""
    references = [torch.tensor(examples[i]["input_ids"][examples[i]["prompt_length"] :]) for i in batch]
    answers_BA = pad_sequence(references, batch_first=True, padding_value=IGNORED_LABEL).to(model.device)
    is_answer_BA = answers_BA != IGNORED_LABEL
    mask = torch.cat([attended_BT, is_answer_BA.long()], dim=1)
    inputs = {
        "input_ids": torch.cat([prompts_BT, answers_BA.clamp(min=0)], dim=1),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0),
        "labels": torch.cat([torch.full_like(prompts_BT, IGNORED_LABEL), answers_BA], dim=1),
        "tasks": [examples[i]["task"] for i in batch],
    }
    losses_L, row_L, outputs = answer_losses(model, inputs, model, use_cache=True)
    sums_B = losses_L.new_zeros(len(batch)).index_add(0, row_L, losses_L)
    for i, loss in zip(batch, (sums_B / is_answer_BA.sum(dim=1)).tolist(), strict=True):
        losses[i] = loss
    cache = cache_of(outputs)
    return cache if drop_last(cache, answers_BA.shape[1] + 1) else {}


def _score_sequence(run: Run, plan: Plan, progress: bool, keep_stages: bool) -> dict[str, Any]:
    """Every stage's model on the tasks that it has learnt, and perhaps on those to come."""
    names = [task.name for task in plan.tasks]
    by_stage = []
    for number, stage in enumerate(plan.stages, start=1):
        tasks = plan.tasks if plan.recipe.evaluation.unseen_tasks else plan.tasks[:number]
        if not keep_stages or not stage.folder.scores_path.is_file():
            _score(stage.folder, plan.recipe, tasks, plan.recipe.evaluation.split, progress)
        by_stage.append(read_scores(stage.folder.scores_path))
    matrix = [[scores["tasks"].get(name, {}).get("rouge_l") for name in names] for scores in by_stage]
    scores = {**by_stage[-1], "order": names, "matrix": matrix, "continual": both_forms(matrix)}
    copy_folder(plan.stages[-1].folder.predictions_path, run.predictions_path)
    write_json(run.scores_path, scores)
    return scores


def write_predictions(folder: str | Path, predictions: Iterable[Prediction]) -> None:
    """Writes `<task>.jsonl` for each task, one prediction per line. Other files in the folder are left alone.

    BaditError if a task's name leads out of the folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for task, group in group_by_task(predictions).items():
        lines = (json.dumps(asdict(prediction), ensure_ascii=False) + "\n" for prediction in group)
        write_text(inside(folder, folder / f"{task}.jsonl"), "".join(lines))


def read_predictions(folder: str | Path) -> list[Prediction]:
    """All predictions in a folder that `write_predictions` wrote, by task name, then in their written order.

    BaditError for no such files, or a line that is not a prediction.
    """
    predictions = []
    for file in sorted(Path(folder).glob("[!.]*.jsonl")):
        for number, fields in enumerate(read_jsonl(file), start=1):
            with explained(f"{file}: line {number}", fix="evaluate again"):
                predictions.append(_PREDICTION.validate_python(fields))
    if not predictions:
        raise BaditError(f"predictions {folder}: no .jsonl files there; evaluate the run")
    return predictions


@torch.no_grad()
def answer_token_losses(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    examples: Sequence[Mapping[str, Any]],
) -> list[list[float]]:
    """The negative log-likelihood of every token of each encoded instance's first reference, in nats."""
    collate = AnswerCollator(pad_id(tokenizer), with_tasks=True)
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]["input_ids"]))
    losses: list[list[float]] = [[] for _ in examples]
    with evaluation_mode(model):
        for start in range(0, len(order), recipe.evaluation.batch_size):
            batch = order[start : start + recipe.evaluation.batch_size]
            inputs = on_device(collate([examples[i] for i in batch]), model.device)
            losses_L, row_L, _ = answer_losses(model, inputs, model)
            for loss, row in zip(losses_L.tolist(), row_L.tolist(), strict=True):
                losses[batch[row]].append(loss)
    return losses


def validation_loss(path: str | Path, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """The answers' negative log-likelihood per token on held-out training instances, kept in ``validation.json``.

    It is what learning rates are chosen by: forward passes alone, and far less noisy than scores of generated answers.

    Returns:
        ``loss``, the mean over tasks, and ``tasks``, each task's own, in nats.
    """
    run = Run(path)
    if run.validation_path.is_file():
        return read_json(run.validation_path)
    recipe = run.trusted_recipe(trust_remote_code)
    plan = make_plan(recipe, split="validation")
    model, tokenizer = load_run(run, recipe)
    examples = encoded(tokenizer, recipe, [(task, each) for task in plan.tasks for each in task.validation], model)
    losses: dict[str, list[float]] = defaultdict(list)
    for example, nll in zip(examples, answer_token_losses(model, tokenizer, recipe, examples), strict=True):
        losses[example["task"]] += nll
    by_task = {name: fmean(of_task) for name, of_task in losses.items()}
    result = {"loss": fmean(by_task.values()), "tasks": by_task}
    write_json(run.validation_path, result)
    return result


def load_run(run: Run, recipe: Recipe | None = None) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """A run's base model with what it has learnt (if its method trains), for inference.

    ``run`` may be a stage's folder together with the run's ``recipe``. BaditError for no adapter, or a damaged one.
    """
    recipe = recipe or run.trusted_recipe()
    method = build_method(recipe.method)
    if not method.trains:
        return base_model(recipe)
    whole = Run.at(recipe.output)
    if not run.adapter_path.is_dir():
        raise BaditError(f"{run.path}: has no adapter yet; finish its training with: badit train {whole.config_path}")
    model, tokenizer = base_model(recipe)
    if changed_inputs(whole.known_environment.get("inputs", {}), {BASE_MODEL: model_fingerprint(model)}):
        fix = "restore it, or train again with another output=FOLDER"
        raise BaditError(f"{run.path}: the base model {recipe.model.name} changed since the run was trained; {fix}")
    return method.load(model, run.adapter_path), tokenizer

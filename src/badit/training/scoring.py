"""What a trained run can do: be scored on its tasks, and answer a prompt."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError

from badit.data import encode_prompt
from badit.errors import BaditError
from badit.evaluation.evaluate import evaluate_tasks, write_predictions
from badit.evaluation.generation import generate_answers
from badit.runs import RunFolder, write_json
from badit.training.methods import build_method
from badit.training.plan import Split, base_model, encoded, make_plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def evaluate(path: str | Path, *, split: Split | None = None, progress: bool = True) -> dict[str, Any]:
    """Scores a run on its tasks and keeps the scores and predictions in its folder.

    The recipe's own split goes to ``scores.json`` and ``predictions/``, another one to ``scores-SPLIT.json`` and
    ``predictions-SPLIT/``.

    Raises:
        BaditError: no such run, no adapter yet or a damaged one, or a split without instances.
    """
    run = RunFolder.existing(path)
    recipe = run.recipe()
    own_split = recipe.evaluation.split
    plan = make_plan(recipe, split=split or own_split)
    model, tokenizer = load_run(run)
    scores, predictions = evaluate_tasks(
        model,
        tokenizer,
        plan.tasks,
        encode_prompt=lambda task, instance: encoded(tokenizer, recipe, task, instance, answer=False)["input_ids"],
        split=split or own_split,
        max_new_tokens=recipe.evaluation.max_new_tokens,
        batch_size=recipe.evaluation.batch_size,
        progress=progress,
    )
    suffix = "" if split in (None, own_split) else f"-{split}"
    write_predictions(run.path / f"predictions{suffix}", predictions)
    write_json(run.path / f"scores{suffix}.json", scores)
    return scores


def load_run(run: RunFolder) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """A run's base model with its trained adapter (if its method trains one), for inference.

    Raises:
        BaditError: the run has no adapter yet, or it is damaged.
    """
    recipe = run.recipe()
    if not build_method(recipe.method).trains:
        return base_model(recipe)
    if not run.adapter.is_dir():
        raise BaditError(f"{run.path}: has no adapter yet; finish its training with: badit train {run.config}")
    if not (run.adapter / SAFETENSORS_WEIGHTS_NAME).is_file():  # PEFT would go on to look for a pickled file
        raise BaditError(f"{run.adapter}: has no {SAFETENSORS_WEIGHTS_NAME}; remove the folder to train it anew")
    model, tokenizer = base_model(recipe)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            model = PeftModel.from_pretrained(model, str(run.adapter))
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, UserWarning) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BaditError(f"{run.adapter}: cannot be loaded ({first_line:.200})") from None
    return model.eval(), tokenizer


def answer(run: RunFolder, prompt: str, *, max_new_tokens: int = 50) -> str:
    """A run's answer to one prompt's text, in the prompt format of its recipe."""
    if not prompt.strip():
        raise BaditError("the prompt is empty")
    section = run.recipe().prompt
    model, tokenizer = load_run(run)
    ids = encode_prompt(
        tokenizer, prompt, max_source_tokens=section.max_source_tokens, chat_template=section.chat_template
    )
    return generate_answers(model, tokenizer, [ids], max_new_tokens=max_new_tokens, progress=False)[0]

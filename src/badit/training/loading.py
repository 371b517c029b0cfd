"""Loads a run's base model and its trained weights."""

import shlex
from typing import Any

from accelerate.utils import release_memory
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from badit.data.encoding import end_of_turn_id
from badit.models import Dtype, device, fast_dtype, load_base_model, warn_of_slow_dtype
from badit.recipe.schema import Recipe
from badit.runs.fingerprints import (
    BASE_MODEL,
    base_fingerprints,
    changed_inputs,
    tokenizer_fingerprint,
)
from badit.runs.folder import RunFolder
from badit.runs.resolved import ResolvedRun
from badit.support.console import say
from badit.support.errors import BaditError
from badit.training.methods import training_method


def load_run(
    run: ResolvedRun, stage: RunFolder | None = None
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Returns a run's model with its trained weights, for inference, and the tokenizer.

    ``stage`` is the folder of one stage of a sequence (default: the run's own folder, which has
    the weights after the last one). BaditError if the adapter is missing or damaged, or if the
    base model has changed since the training.
    """
    if not run.method.trains:
        return load_base(run.recipe)
    folder = stage or run.folder
    # Checked before the base model is loaded, which takes longer.
    if not folder.adapter_path.is_dir():
        words = ["badit", "train", str(run.folder.config_path), f"output={run.folder.path}"]
        fix = f"finish its training with: {shlex.join(words)}"
        raise BaditError(f"{folder.path}: has no adapter yet; {fix}")
    model, tokenizer = load_base(run.recipe)
    _refuse_changed_base(run, model, folder)
    template = run.recipe.prompt.chat_template
    for name in changed_inputs(run.folder, tokenizer_fingerprint(tokenizer, template)):
        say(f"badit: {name} changed since the run was trained, so it has other prompts")
    return training_method(run.method).load(model, folder.adapter_path), tokenizer


def _refuse_changed_base(run: ResolvedRun, model: PreTrainedModel, folder: RunFolder) -> None:
    # An adapter is valid only with the weights that it was trained on.
    changed = changed_inputs(run.folder, base_fingerprints(model))
    if not changed:
        return
    problem = f"the base model {run.recipe.model.name} has changed since the run was trained"
    if BASE_MODEL not in changed:
        problem += f" ({', '.join(changed)})"
    fix = "restore it, or train again with another output=FOLDER"
    raise BaditError(f"{folder.path}: {problem}; {fix}")


def load_base(
    recipe: Recipe, *, dtype: Dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a recipe's base model to this process's device, and its tokenizer.

    ``dtype`` overrides the recipe's.
    """
    dtype = dtype or model_dtype(recipe)
    release_memory()  # of adapted models of earlier stages, which have reference cycles
    options = recipe.model.model_dump(exclude={"dtype"})
    model, tokenizer = load_base_model(**options, dtype=dtype, device=device())
    warn_of_slow_dtype(dtype, device())
    _add_end_token(model, end_of_turn_id(tokenizer, recipe.prompt.chat_template))
    return model, tokenizer


def _add_end_token(model: PreTrainedModel, end_id: int) -> None:
    """Adds the token that ends answers in training to those that end a generated answer."""
    config = model.generation_config
    # None, an id or a list of ids.
    end_ids = config.eos_token_id
    if not isinstance(end_ids, list):
        end_ids = [] if end_ids is None else [end_ids]
    if end_id not in end_ids:
        config.eos_token_id = [*end_ids, end_id]
    if not config.do_sample:
        # transformers does not save a changed configuration with settings that have no effect.
        for name in ("temperature", "top_p", "top_k", "min_p", "typical_p"):
            setattr(config, name, None)


def model_dtype(recipe: Recipe) -> Dtype:
    """Returns the dtype of a recipe's base model on this process's device."""
    if recipe.model.dtype == "fast":
        return fast_dtype(device())
    return recipe.model.dtype

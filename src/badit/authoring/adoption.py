"""``badit adopt``: makes a run of an adapter that a script trained.

What needs no torch is checked here, first; :mod:`badit.authoring.adapters` does the rest.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from badit.models import BUILT_IN, built_in_path, resolve_model
from badit.recipe.loading import build_recipe, merged
from badit.recipe.schema import Recipe, source_of
from badit.runs.folder import ADAPTER_CONFIG, RunFolder, refuse_no_adapter
from badit.runs.unresolved import TO_SCORE_ADOPTED, read_tasks
from badit.support.console import loading_libraries
from badit.support.errors import BaditError, explained, nearest
from badit.support.files import exclusive, read_json, refuse_links

if TYPE_CHECKING:
    from badit.runs.resolved import ResolvedRun

WEIGHTS = "adapter_model.safetensors"  # PEFT's name, without importing PEFT
_SECTIONS = ("model", "data", "prompt", "evaluation")  # the others say how a run was trained
# Initialisations that change the base weights by random numbers or data, so loading cannot repeat
# them.
_CHANGE_BASE = ("corda", "lora_ga", "pissa_niter")
NAME_FOLDER = "name the base model's folder with model.name=FOLDER"


class Adopted(NamedTuple):
    """A run of an adapter from a script."""

    run: ResolvedRun
    prompts: list[str]  # lines that show a prompt of each task, and what to compare them with


def adopt(
    adapter: Path,
    output: str,
    data: str | None,
    values: Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    any_prompts: bool = False,
) -> Adopted:
    """Implements :func:`badit.adopt`; ``overrides`` are applied after ``values``."""
    # In the order of their duration: the data may be large, and the base model larger.
    config_path = adapter / ADAPTER_CONFIG
    _refuse_missing(adapter)
    _refuse_other_keys([*values, *overrides])
    saved = _plain_config(config_path)
    content = {
        "model": _base_model(saved),
        "data": {"source": None if data is None else source_of(data)},
        "output": output,
    }
    build_recipe(content, where=config_path)  # an error in it is not one of the given keys
    recipe = build_recipe(merged(content, values), overrides)
    if "name" not in recipe.model.model_fields_set:
        fix = "name it with model.name=MODEL"
        raise BaditError(f"{config_path}: base_model_name_or_path: is empty; {fix}")
    folder = RunFolder.at(recipe.output)
    if folder.path.exists() and not (folder.path.is_dir() and not any(folder.path.iterdir())):
        fix = "remove it, or choose another --output"
        raise BaditError(f"{folder.path}: is not an empty folder; {fix}")
    _refuse_missing_base(recipe)

    tasks = None if recipe.data.source is None else read_tasks(recipe)
    with loading_libraries():
        from badit.authoring.adapters import method_of, write_run
        from badit.runs.resolved import ResolvedRun
        from badit.training.saved_adapters import tensor_shapes

    tensor_shapes(adapter / WEIGHTS)  # refuses a damaged file
    method = method_of(config_path, saved)
    recipe = recipe.model_copy(update={"method": dict(method.section)})
    run = ResolvedRun(folder, recipe, method)
    if tasks is not None:
        run.tasks = tasks
    with exclusive(folder.path), explained(folder.path):
        prompts = write_run(run, adapter, saved, any_prompts=any_prompts)
    return Adopted(run, prompts)


def next_commands(run: ResolvedRun) -> list[str]:
    """Returns lines with the commands that use the adopted run first."""
    from badit.evaluation.prompts import answer_command

    lines = [f"Answer an input: {answer_command(run)}"]
    if run.recipe.data.source is None:
        return lines
    try:
        run.refuse_unscorable(run.recipe.evaluation.split)
    except BaditError:
        return [*lines, f"To score it: {TO_SCORE_ADOPTED}"]
    return [f"Score it: {shlex.join(['badit', 'evaluate', str(run.folder.path)])}", *lines]


def _refuse_missing_base(recipe: Recipe) -> None:
    """Raises BaditError if the base model is neither a folder nor can be on the hub."""
    if recipe.model.name == BUILT_IN:  # which would be downloaded here
        return
    try:
        resolve_model(recipe.model.name)
    except BaditError as error:
        raise BaditError(f"{error}; {NAME_FOLDER}") from None


def _refuse_missing(adapter: Path) -> None:
    """Raises BaditError unless the folder has an adapter's configuration and its weights."""
    refuse_no_adapter(adapter)
    refuse_links(adapter)
    if not (adapter / WEIGHTS).is_file():
        fix = "save the adapter with safe_serialization=True; pickled weights are not read"
        raise BaditError(f"{adapter}: has no {WEIGHTS}; {fix}")


def _plain_config(path: Path) -> dict[str, Any]:
    """Returns an adapter's configuration, as badit saves it: of a causal language model."""
    saved = read_json(path)
    task_type = saved.get("task_type")
    if task_type not in (None, "CAUSAL_LM"):
        problem = f"is {task_type!r:.60}; badit runs only causal language models (CAUSAL_LM)"
        raise BaditError(f"{path}: task_type: {problem}; load this adapter with PEFT")
    initial = saved.get("init_lora_weights")
    if str(initial).startswith(_CHANGE_BASE):
        problem = f"{initial!r:.60} changed the base weights, which the adapter does not have"
        fix = (
            "save it as a plain LoRA: save_pretrained with path_initial_model_for_weight_conversion"
        )
        raise BaditError(f"{path}: init_lora_weights: {problem}; {fix}")
    # Without a task type, PEFT saves a module to import here.
    plain = {**saved, "task_type": "CAUSAL_LM", "auto_mapping": None}
    # The saved weights replace those that were initialised from data.
    return {**plain, "init_lora_weights": True} if initial == "eva" else plain


def _base_model(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a recipe's section model of the base model that an adapter names."""
    name = saved.get("base_model_name_or_path")
    if not name:
        return {}
    path = os.path.abspath(os.path.expanduser(str(name)))
    # A script's built-in model has the folder in the cache as its name.
    if Path(path) == built_in_path():
        name = BUILT_IN
    elif name != BUILT_IN and os.path.isdir(path):
        # The run is also used from other folders than the script.
        name = path
    return {"name": name, "revision": saved.get("revision")}


def _refuse_other_keys(keys: Sequence[str]) -> None:
    for key in keys:
        section = key.partition("=")[0].partition(".")[0]
        if section not in _SECTIONS:
            problem = f"only keys of {', '.join(_SECTIONS)} can be set; the adapter has the others"
            raise BaditError(f"{key!r:.80}: {problem}{nearest(section, _SECTIONS)}")

"""``badit adopt``: makes a run of an adapter that a script trained."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from badit.models import BUILT_IN, built_in_path
from badit.recipe.loading import build_recipe, merged
from badit.recipe.method import BOOKKEEPING, KINDS, SURGERY, ResolvedMethod, resolve_method
from badit.recipe.saved import dump_recipe
from badit.recipe.schema import source_of
from badit.runs.fingerprints import base_fingerprints, task_fingerprints, tokenizer_fingerprint
from badit.runs.folder import RunFolder, refuse_no_adapter
from badit.runs.resolved import ResolvedRun
from badit.runs.unresolved import read_tasks
from badit.support.environment import environment
from badit.support.errors import BaditError, explained, first_line
from badit.support.files import (
    exclusive,
    read_json,
    refuse_links,
    remove,
    replace_folder,
    write_json,
    write_text,
)
from badit.training.loading import load_base, model_dtype
from badit.training.methods import training_method
from badit.tuner.config import ExpertConfig

_SECTIONS = ("model", "data", "prompt", "evaluation")  # the others say how a run was trained
# Fields of adapter_config.json that are not options of a method.
_NOT_OPTIONS = BOOKKEEPING | {"peft_type", "auto_mapping"}
# Initialisations that change the base weights by random numbers or data, so loading cannot repeat
# them.
_CHANGE_BASE = ("corda", "lora_ga", "pissa_niter")


def adopt(
    adapter: Path,
    output: str,
    data: str | None,
    values: Mapping[str, Any],
    overrides: Sequence[str] = (),
) -> RunFolder:
    """Implements :func:`badit.adopt`; ``overrides`` are applied after ``values``."""
    config_path = adapter / CONFIG_NAME
    _refuse_missing(adapter)
    saved = _plain_config(config_path)
    method = _method_of(config_path, saved)
    content = {
        "model": {"name": _base_model(saved), "revision": saved.get("revision")},
        "data": {"source": None if data is None else source_of(data)},
        "method": dict(method.section),
        "output": output,
    }
    _refuse_other_keys([*values, *overrides])
    recipe = build_recipe(merged(content, values), overrides, where=config_path)
    folder = RunFolder.at(recipe.output)
    if folder.path.exists() and any(folder.path.iterdir()):
        raise BaditError(f"{folder.path}: is not empty; remove it, or choose another --output")

    run = ResolvedRun(folder, recipe, method)
    if recipe.data.source is not None:
        run.tasks = read_tasks(recipe)
    with exclusive(folder.path), explained(folder.path):
        _write(run, adapter, saved)
    return folder


def _write(run: ResolvedRun, adapter: Path, saved: Mapping[str, Any]) -> None:
    """Writes the run's folder, if its base model can be loaded with the adapter."""
    folder = run.folder
    partial = folder.adapter_path.with_name("adapter.partial")
    partial.mkdir()
    try:
        write_json(
            partial / CONFIG_NAME, {**saved, "base_model_name_or_path": run.recipe.model.name}
        )
        shutil.copyfile(adapter / SAFETENSORS_WEIGHTS_NAME, partial / SAFETENSORS_WEIGHTS_NAME)
        model, tokenizer = load_base(run.recipe)
        # Before the adapter, which may change the base weights.
        inputs = base_fingerprints(model)
        inputs |= tokenizer_fingerprint(tokenizer, run.recipe.prompt.chat_template)
        _refuse_unsuitable(run, model, partial, adapter)
        if run.recipe.data.source is not None:
            inputs |= task_fingerprints(run.tasks)
        record = {**environment(), "dtype": model_dtype(run.recipe)}
        record |= {"adopted": str(adapter.resolve()), "inputs": inputs}
        write_json(folder.environment_path, record)
        replace_folder(partial, folder.adapter_path)
    finally:
        remove(partial)
    # The last file: it makes the folder a run.
    write_text(folder.config_path, dump_recipe(run.recipe))


def _refuse_unsuitable(run: ResolvedRun, model: Any, copied: Path, adapter: Path) -> None:
    """Raises BaditError, which names the ``adapter``, if its copy does not fit the base model."""
    try:
        training_method(run.method).load(model, copied)
    except BaditError as error:
        raise BaditError(str(error).replace(str(copied), str(adapter))) from None


def _refuse_missing(adapter: Path) -> None:
    """Raises BaditError unless the folder has an adapter's configuration and its weights."""
    refuse_no_adapter(adapter)
    refuse_links(adapter)
    if not (adapter / SAFETENSORS_WEIGHTS_NAME).is_file():
        fix = "save the adapter with safe_serialization=True; pickled weights are not read"
        raise BaditError(f"{adapter}: has no {SAFETENSORS_WEIGHTS_NAME}; {fix}")


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


def _method_of(path: Path, saved: Mapping[str, Any]) -> ResolvedMethod:
    """Returns the method that trains such an adapter, with the adapter's options."""
    peft_type = saved.get("peft_type")
    methods = {
        name: resolve_method({"name": name})
        for name, kind in KINDS.items()
        if kind.trains == "adapter" and name not in SURGERY
    }
    of_type = [name for name in methods if methods[name].config.peft_type.value == peft_type]
    if not of_type:
        types = sorted({method.config.peft_type.value for method in methods.values()})
        problem = f"is {peft_type!r:.60}; badit has methods of {', '.join(types)}"
        raise BaditError(f"{path}: peft_type: {problem}; load this adapter with PEFT")

    def is_fixed_by(name: str) -> bool:
        return all(saved.get(key) == value for key, value in KINDS[name].fixed.items())

    # LoRA itself fixes nothing, so its variants come first.
    name = max(filter(is_fixed_by, of_type), key=lambda name: len(KINDS[name].fixed))
    kind = KINDS[name]
    defaults = {}
    # The defaults of a recipe may differ from those of an adapter with experts.
    if not issubclass(kind.config_class, ExpertConfig):
        defaults = json.loads(json.dumps(kind.config_class().to_dict(), default=sorted))
    options = {}
    for key, value in saved.items():
        is_default = key in defaults and value == defaults[key]
        if key not in _NOT_OPTIONS | kind.fixed.keys() and not is_default:
            options[key] = value
    try:
        kind.config_class.check_kwargs(**saved)  # refuses other formats
        return resolve_method({"name": name, **options})
    except BaditError as error:
        raise BaditError(f"{path}: {error}") from None
    except Exception as error:  # the values can have any type
        raise BaditError(f"{path}: {first_line(error)}") from None


def _base_model(saved: Mapping[str, Any]) -> Any:
    name = saved.get("base_model_name_or_path")
    if not name:
        fix = "name it with model.name=MODEL"
        raise BaditError(f"{CONFIG_NAME}: base_model_name_or_path: is empty; {fix}")
    # A script's built-in model has the folder in the cache as its name.
    return BUILT_IN if Path(str(name)) == built_in_path() else name


def _refuse_other_keys(keys: Sequence[str]) -> None:
    for key in keys:
        if key.partition("=")[0].partition(".")[0] not in _SECTIONS:
            problem = f"only keys of {', '.join(_SECTIONS)} can be set; the adapter has the others"
            raise BaditError(f"{key!r:.80}: {problem}")

"""``badit adopt``: makes a run of an adapter that a script trained."""

import json
import os
import shlex
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from badit.data.encoding import encode_prompts
from badit.data.prompts import build_prompt
from badit.data.tasks import SPLITS
from badit.evaluation.prompts import answer_command
from badit.models import BUILT_IN, HUB_ID, built_in_path, load_tokenizer, resolve_model
from badit.recipe.loading import build_recipe, merged
from badit.recipe.method import BOOKKEEPING, KINDS, SURGERY, ResolvedMethod, resolve_method
from badit.recipe.saved import dump_recipe
from badit.recipe.schema import Recipe, source_of
from badit.runs.fingerprints import base_fingerprints, task_fingerprints, tokenizer_fingerprint
from badit.runs.folder import RunFolder, refuse_no_adapter
from badit.runs.resolved import ResolvedRun, read_tasks
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
from badit.support.text import counted
from badit.training.loading import load_base, model_dtype
from badit.training.methods import training_method
from badit.training.saved_adapters import tensor_shapes
from badit.tuner.config import ExpertConfig

_SECTIONS = ("model", "data", "prompt", "evaluation")  # the others say how a run was trained
# Fields of adapter_config.json that are not options of a method.
_NOT_OPTIONS = BOOKKEEPING | {"peft_type", "auto_mapping"}
# Initialisations that change the base weights by random numbers or data, so loading cannot repeat
# them.
_CHANGE_BASE = ("corda", "lora_ga", "pissa_niter")
_NAME_FOLDER = "name the base model's folder with model.name=FOLDER"
_SHOWN_TASKS = 5
_SHOWN_START = 150  # characters of a prompt that are shown, if it is longer than both together
_SHOWN_END = 100


def adopt(
    adapter: Path,
    output: str,
    data: str | None,
    values: Mapping[str, Any],
    overrides: Sequence[str] = (),
) -> ResolvedRun:
    """Implements :func:`badit.adopt`; ``overrides`` are applied after ``values``."""
    # In the order of their duration: the data may be large, and the base model larger.
    config_path = adapter / CONFIG_NAME
    _refuse_missing(adapter)
    _refuse_other_keys([*values, *overrides])
    saved = _plain_config(config_path)
    method = _method_of(config_path, saved)
    content = {
        "model": {"name": _base_model(saved), "revision": saved.get("revision")},
        "data": {"source": None if data is None else source_of(data)},
        "method": dict(method.section),
        "output": output,
    }
    recipe = build_recipe(merged(content, values), overrides, where=config_path)
    folder = RunFolder.at(recipe.output)
    if folder.path.exists() and not (folder.path.is_dir() and not any(folder.path.iterdir())):
        fix = "remove it, or choose another --output"
        raise BaditError(f"{folder.path}: is not an empty folder; {fix}")
    _refuse_missing_base(recipe)

    run = ResolvedRun(folder, recipe, method)
    if recipe.data.source is not None:
        run.tasks = read_tasks(recipe)
    with exclusive(folder.path), explained(folder.path):
        _write(run, adapter, saved)
    return run


def built_prompts(run: ResolvedRun) -> list[str]:
    """Returns lines with a prompt of each task as badit builds it, and what it must equal."""
    model = run.recipe.model
    tokenizer = load_tokenizer(
        model.name, trust_remote_code=model.trust_remote_code, revision=model.revision
    )
    section = run.recipe.prompt
    prompts = []
    for task in run.tasks[:_SHOWN_TASKS]:
        instance = next(instance for split in SPLITS for instance in getattr(task, split))
        prompts.append(build_prompt(task, instance, section.encoding))
    options = section.model_dump(include={"max_source_tokens", "chat_template"})
    lines = ["Prompts as badit builds them, one of each task:"]
    for task, ids in zip(run.tasks, encode_prompts(tokenizer, prompts, **options), strict=False):
        # The notation of Python shows white space at the ends and special characters.
        lines.append(f"  {task.name}: {_shortened(str(tokenizer.decode(ids)))!r}")
    if len(run.tasks) > _SHOWN_TASKS:
        lines.append(f"  and {counted(len(run.tasks) - _SHOWN_TASKS, 'more task')}")
    config = run.method.config
    reason = "the adapter has learnt no others"
    if isinstance(config, ExpertConfig) and not config.has_fixed_gates:
        reason = "other prompts select other gates"
    keys = "prompt.chat_template, prompt.encoding, prompt.max_source_tokens or data.instruction"
    lines.append(
        f"These must be the prompts of the script's training, because {reason}. If they are not, "
        f"remove {run.folder.path} and adopt again with another {keys}."
    )
    return lines


def next_commands(run: ResolvedRun) -> list[str]:
    """Returns lines with the commands that use the adopted run first."""
    lines = [f"Answer an input: {answer_command(run)}"]
    if run.recipe.data.source is None:
        return lines
    with suppress(BaditError):  # the data may have no instances to score
        run.refuse_unscorable(run.recipe.evaluation.split)
        lines.insert(0, f"Score it: {shlex.join(['badit', 'evaluate', str(run.folder.path)])}")
    return lines


def _shortened(text: str) -> str:
    if len(text) <= _SHOWN_START + _SHOWN_END:
        return text
    return f"{text[:_SHOWN_START]} … {text[-_SHOWN_END:]}"


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
        model, tokenizer = _loaded_base(run.recipe)
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


def _loaded_base(recipe: Recipe) -> tuple[Any, Any]:
    """Loads the base model; an error says that a hub id may be meant as a folder."""
    try:
        return load_base(recipe)
    except BaditError as error:
        name = recipe.model.name
        # Of a relative path of two parts, only the attempt shows that it is no hub id.
        if HUB_ID.fullmatch(name) and not Path(name).is_dir():
            raise BaditError(f"{error}; if it is a folder, {_NAME_FOLDER}") from None
        raise


def _refuse_unsuitable(run: ResolvedRun, model: Any, copied: Path, adapter: Path) -> None:
    """Raises BaditError, which names the ``adapter``, if its copy does not fit the base model."""
    try:
        training_method(run.method).load(model, copied)
    except BaditError as error:
        raise BaditError(str(error).replace(str(copied), str(adapter))) from None


def _refuse_missing_base(recipe: Recipe) -> None:
    """Raises BaditError if the base model is neither a folder nor can be on the hub."""
    if recipe.model.name == BUILT_IN:  # which would be downloaded here
        return
    try:
        resolve_model(recipe.model.name)
    except BaditError as error:
        raise BaditError(f"{error}; {_NAME_FOLDER}") from None


def _refuse_missing(adapter: Path) -> None:
    """Raises BaditError unless the folder has an adapter's configuration and readable weights."""
    refuse_no_adapter(adapter)
    refuse_links(adapter)
    if not (adapter / SAFETENSORS_WEIGHTS_NAME).is_file():
        fix = "save the adapter with safe_serialization=True; pickled weights are not read"
        raise BaditError(f"{adapter}: has no {SAFETENSORS_WEIGHTS_NAME}; {fix}")
    tensor_shapes(adapter / SAFETENSORS_WEIGHTS_NAME)  # refuses a damaged file


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
    path = os.path.abspath(os.path.expanduser(str(name)))
    # A script's built-in model has the folder in the cache as its name.
    if Path(path) == built_in_path():
        return BUILT_IN
    # The run is also used from other folders than the script.
    return path if name != BUILT_IN and os.path.isdir(path) else name


def _refuse_other_keys(keys: Sequence[str]) -> None:
    for key in keys:
        if key.partition("=")[0].partition(".")[0] not in _SECTIONS:
            problem = f"only keys of {', '.join(_SECTIONS)} can be set; the adapter has the others"
            raise BaditError(f"{key!r:.80}: {problem}")

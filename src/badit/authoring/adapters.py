"""Writes the run of an adopted adapter; see :mod:`badit.authoring.adoption`."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from badit.authoring.adoption import NAME_FOLDER, WEIGHTS
from badit.authoring.prompt_forms import choose_form, shown_prompts
from badit.models import HUB_ID
from badit.recipe.method import BOOKKEEPING, KINDS, SURGERY, ResolvedMethod, resolve_method
from badit.recipe.saved import dump_recipe
from badit.recipe.schema import Recipe
from badit.runs.fingerprints import base_fingerprints, task_fingerprints, tokenizer_fingerprint
from badit.runs.folder import ADAPTER_CONFIG
from badit.runs.resolved import ResolvedRun
from badit.support.environment import environment
from badit.support.errors import BaditError, first_line
from badit.support.files import remove, replace_folder, write_json, write_text
from badit.training.loading import load_base, model_dtype
from badit.training.methods import training_method
from badit.tuner.config import ExpertConfig

# Fields of adapter_config.json that are not options of a method.
_NOT_OPTIONS = BOOKKEEPING | {"peft_type", "auto_mapping"}


def method_of(path: Path, saved: Mapping[str, Any]) -> ResolvedMethod:
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


def write_run(
    run: ResolvedRun, adapter: Path, saved: Mapping[str, Any], *, any_prompts: bool
) -> list[str]:
    """Writes the run's folder, if its base model can be loaded with the adapter.

    Returns:
        Lines that show a prompt of each task, and what to compare them with.
    """
    prompts: list[str] = []
    folder = run.folder
    partial = folder.adapter_path.with_name("adapter.partial")
    partial.mkdir()
    try:
        write_json(
            partial / ADAPTER_CONFIG, {**saved, "base_model_name_or_path": run.recipe.model.name}
        )
        shutil.copyfile(adapter / WEIGHTS, partial / WEIGHTS)
        model, tokenizer = _loaded_base(run.recipe)
        # Before the adapter, which may change the base weights.
        inputs = base_fingerprints(model)
        adapted = _loaded_adapter(run, model, partial, adapter)
        if run.recipe.data.source is not None:
            inputs |= task_fingerprints(run.tasks)
            are_like = choose_form(run, adapted, tokenizer, any_prompts=any_prompts)
            prompts = shown_prompts(run, tokenizer)
            if not are_like:
                prompts.append(_what_to_compare(run))
        inputs |= tokenizer_fingerprint(tokenizer, run.recipe.prompt.chat_template)
        record = {**environment(), "dtype": model_dtype(run.recipe)}
        record |= {"adopted": str(adapter.resolve()), "inputs": inputs}
        write_json(folder.environment_path, record)
        replace_folder(partial, folder.adapter_path)
    finally:
        remove(partial)
    # The last file: it makes the folder a run.
    write_text(folder.config_path, dump_recipe(run.recipe))
    return prompts


def _what_to_compare(run: ResolvedRun) -> str:
    reason = "the adapter has learnt no others"
    # PEFT's own adapters have no gates.
    if not getattr(run.method.config, "has_fixed_gates", True):
        reason = "other prompts select other gates"
    return (
        f"These must be the prompts of the script's training, because {reason}. If they are not, "
        f"remove {run.folder.path} and adopt again with the script's own rows (prompt and "
        "completion) as data, or with another data.instruction or prompt.encoding."
    )


def _loaded_base(recipe: Recipe) -> tuple[Any, Any]:
    """Loads the base model; an error says that a hub id may be meant as a folder."""
    try:
        return load_base(recipe)
    except BaditError as error:
        name = recipe.model.name
        # Of a relative path of two parts, only the attempt shows that it is no hub id.
        if HUB_ID.fullmatch(name) and not Path(name).is_dir():
            raise BaditError(f"{error}; if it is a folder, {NAME_FOLDER}") from None
        raise


def _loaded_adapter(run: ResolvedRun, model: Any, copied: Path, adapter: Path) -> Any:
    """Returns the model with the copy of an adapter.

    Raises:
        BaditError: it does not fit; the error names the ``adapter``, not its copy.
    """
    try:
        return training_method(run.method).load(model, copied)
    except BaditError as error:
        raise BaditError(str(error).replace(str(copied), str(adapter))) from None

"""Writes the run of an adopted adapter; see :mod:`badit.authoring.adoption`."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from badit.authoring.adoption import NAME_FOLDER, WEIGHTS
from badit.data import AnswerCollator, batches_by_task
from badit.data.tasks import SPLITS
from badit.models import HUB_ID
from badit.recipe.method import BOOKKEEPING, KINDS, SURGERY, ResolvedMethod, resolve_method
from badit.recipe.saved import dump_recipe
from badit.recipe.schema import Recipe
from badit.runs.fingerprints import base_fingerprints, task_fingerprints, tokenizer_fingerprint
from badit.runs.folder import ADAPTER_CONFIG
from badit.runs.resolved import ResolvedRun
from badit.support.console import say
from badit.support.environment import environment
from badit.support.errors import BaditError, first_line
from badit.support.files import remove, replace_folder, write_json, write_text
from badit.training.encoding import encoded
from badit.training.loading import load_base, model_dtype
from badit.training.methods import training_method
from badit.tuner import BaditModel, hooks_of
from badit.tuner.config import ExpertConfig

_COMPARED = 32  # prompts of each task
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


def write_run(run: ResolvedRun, adapter: Path, saved: Mapping[str, Any]) -> None:
    """Writes the run's folder, if its base model can be loaded with the adapter."""
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
        inputs |= tokenizer_fingerprint(tokenizer, run.recipe.prompt.chat_template)
        adapted = _loaded_adapter(run, model, partial, adapter)
        if run.recipe.data.source is not None:
            inputs |= task_fingerprints(run.tasks)
            _compare_prompts(run, adapted, tokenizer)
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


def _compare_prompts(run: ResolvedRun, model: Any, tokenizer: Any) -> None:
    """Says whether the prompts are like those of the training, as the adapter's clusters show."""
    hooks: Any = hooks_of(model)
    if not isinstance(hooks, BaditModel):
        return
    pairs = [
        (task, instance)
        for task in run.tasks
        for instance in next(filter(None, (getattr(task, split) for split in SPLITS)))[:_COMPARED]
    ]
    examples = encoded(tokenizer, run.recipe, pairs, model)
    batches = batches_by_task(examples, AnswerCollator(tokenizer.pad_token_id), _COMPARED)
    shares = hooks.unlike_prompts({task: list(of_task) for task, of_task in batches.items()})
    if shares is None:
        return
    unlike = [f"{task} ({100 * share:.0f} %)" for task, share in shares.items() if share > 0.5]
    if not unlike:
        say("badit: the prompts are like those of the training")
        return
    listed = ", ".join(unlike[:5]) + (f" and {len(unlike) - 5} more" if unlike[5:] else "")
    say(
        f"badit: warning: the prompts of {listed} are unlike those of the training, so their gates "
        "will be wrong; adopt again with the script's form of prompts"
    )

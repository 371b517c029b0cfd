"""A saved adapter, checked before PEFT sees it: it may come from elsewhere, be damaged, or belong to another run.

Its settings must be those of the run's recipe. So nothing in an adapter's folder chooses what is built or imported
(PEFT imports modules that some settings name), how much memory that takes, or that a pickled file is read.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open

from badit.errors import BaditError, explained
from badit.files import read_json
from badit.tuner.config import FORMAT_FIELD, RETIRED_FIELDS, is_int, refuse_newer_format

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: What a run fills in by itself, or PEFT for its own bookkeeping.
BOOKKEEPING = {"task_type", "base_model_name_or_path", "revision", "inference_mode", "peft_version", "tasks",
               "past_branches", FORMAT_FIELD}  # fmt: skip
_MAY_DIFFER = BOOKKEEPING | {"target_modules", "fan_in_fan_out"}  # from the recipe's
Shapes = dict[str, tuple[int, ...]]


def load_adapter(model: PreTrainedModel, folder: Path, config: PeftConfig, *, trainable: bool) -> PeftModel:
    """The base model with the adapter that a run with the method's ``config`` has saved in ``folder``.

    Raises:
        BaditError: it is missing, damaged, incomplete or another one.
    """
    shapes = tensor_shapes(folder / SAFETENSORS_WEIGHTS_NAME)  # without it PEFT would look for a pickled file
    _check_settings(folder / CONFIG_NAME, config, shapes)
    with explained(folder, action="loaded", any_error=True), warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
        loaded = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    if not all(tensor.isfinite().all() for tensor in loaded.values()):
        fix = "train again with a lower training.learning_rate"
        raise BaditError(f"{folder}: holds NaN or infinite values: its training has diverged; {fix}")
    if unknown := sorted(shapes.keys() - loaded.keys()):
        other = f"belongs to another base model or method, with a tensor {unknown[0]!r:.120}"
        raise BaditError(f"{folder}: {other}; name the base model that it was trained on")
    return adapted


def tensor_shapes(path: Path) -> Shapes:
    """The names and shapes of a safetensors file's tensors, from its header; BaditError if missing or damaged."""
    if not path.is_file():
        fix = "pickled weights are not read; remove the folder to train again"
        raise BaditError(f"{path.parent}: has no {path.name}; {fix}")
    with explained(path, action="loaded", any_error=True), safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (not a dict)


def _check_settings(path: Path, config: PeftConfig, shapes: Shapes) -> None:
    """Raises BaditError unless the saved configuration is the recipe's, but for sound bookkeeping."""
    saved = read_json(path)
    try:
        refuse_newer_format(saved.get(FORMAT_FIELD, 1))
    except BaditError as error:
        raise BaditError(f"{path}: {error}") from None
    # As JSON has them; sets as sorted lists.
    defaults, wanted = (json.loads(json.dumps(each.to_dict(), default=sorted)) for each in (type(config)(), config))
    if unknown := sorted(saved.keys() - defaults.keys() - _MAY_DIFFER - RETIRED_FIELDS):
        fix = "upgrade it, or remove the line"
        raise BaditError(f"{path}: {unknown[0]!r:.60}: is no setting that this PEFT knows; {fix}")
    for key, expected in wanted.items():
        found = saved.get(key, defaults[key])
        if isinstance(getattr(config, key), set) and isinstance(found, list):  # which PEFT saves in any order
            found = sorted(found, key=json.dumps)
        if key not in _MAY_DIFFER and found != expected:
            differs = f"is {found!r:.60}, but the run's recipe says {expected!r:.60}"
            raise BaditError(f"{path}: {key}: {differs}; this is another run's adapter")
    # An expression is matched against every module's name, and some take forever: only the recipe's own is taken.
    own_expression = getattr(config, "target_modules", None)
    for key, allowed in (("target_modules", (None, own_expression)), ("tasks", (None,))):
        names = saved.get(key)
        if names not in allowed and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise BaditError(f"{path}: {key}: must be a list of names, not {names!r:.60}")
    past = saved.get("past_branches", 0)
    largest = max((size for shape in shapes.values() for size in shape), default=0)
    if not is_int(past) or not 0 <= past <= largest:
        raise BaditError(f"{path}: past_branches: the weights have no {past!r:.60} branches")

"""From a recipe's ``method`` section to a model that is ready to train.

    method: {name: badit, num_experts: 8, r: 4, regroup: {every: 20}}     # regroup: null trains without DOG
    method: {name: lora, r: 32}                                           # or another of badit.baselines.RIVALS
    method: {name: base}                                                  # the base model as it is, to compare with

The options of a method are the fields of its PEFT configuration, so there is no second list of them to keep.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import TrainerCallback

from badit.baselines import RIVALS
from badit.baselines.lora import refuse_unsuitable
from badit.errors import BaditError, nearest
from badit.peft import BaditConfig
from badit.peft.base_model import TARGET_MODULES
from badit.runs import RunFolder
from badit.training.regroup import RegroupCallback
from badit.training.regroup_state import STATE_FILE

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

# PEFT's own bookkeeping, which is not for a recipe to set.
_INTERNAL = {"peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
             "inference_mode", "runtime_config"}  # fmt: skip


@dataclasses.dataclass
class Method:
    """A method of a recipe: its PEFT configuration, its callbacks, and what its checkpoints hold besides HF's files."""

    name: str
    config: PeftConfig | None
    regroup: dict[str, Any] | None = None

    @property
    def trains(self) -> bool:
        return self.config is not None

    def apply(self, model: PreTrainedModel) -> PeftModel:
        """The base model with fresh, trainable adapters. PEFT's own methods adapt what BADIT would by default."""
        assert self.config is not None
        if isinstance(self.config, LoraConfig):
            refuse_unsuitable(self.config, model)
        if self.config.target_modules is None:  # pyright: ignore[reportAttributeAccessIssue]
            default = TARGET_MODULES.get(model.config.model_type)
            if default is None:
                raise BaditError(f"method.target_modules: name the modules to adapt in a {model.config.model_type}")
            self.config.target_modules = set(default)  # pyright: ignore[reportAttributeAccessIssue]
        return get_peft_model(model, self.config)  # pyright: ignore[reportReturnType] (never a mixed model)

    def callbacks(self, run: RunFolder) -> list[TrainerCallback]:
        if self.regroup is None:
            return []
        return [RegroupCallback(**self.regroup, log_path=run.regroupings)]

    @property
    def checkpoint_files(self) -> tuple[str, ...]:
        return () if self.regroup is None else (STATE_FILE,)


def build_method(section: Mapping[str, Any]) -> Method:
    """Validates a ``method`` section.

    Raises:
        BaditError: an unknown method or option, or a value that the method refuses.
    """
    options = dict(section)
    name = options.pop("name", "badit")
    if not isinstance(name, str) or name not in _METHODS:
        known = ", ".join(_METHODS)
        raise BaditError(f"method.name: unknown method {name!r:.60}{nearest(name, _METHODS)}; known: {known}")
    return _METHODS[name](options)


def _badit(options: dict[str, Any]) -> Method:
    regroup = options.pop("regroup", {})
    if regroup is not None:
        if not isinstance(regroup, dict):
            raise BaditError("method.regroup: must be a mapping such as {every: 20}, or null to train without DOG")
        own = {"probe", "log_path", "checkpoint"}
        _refuse_unknown("method.regroup", regroup, set(inspect.signature(RegroupCallback).parameters) - own)
        _built(lambda: RegroupCallback(**regroup))
    return Method("badit", _config(BaditConfig, options), regroup)


def _rival(name: str, options: dict[str, Any]) -> Method:
    rival = RIVALS[name]
    for key in options.keys() & rival.settled.keys():
        raise BaditError(f"method.{key}: is what the name {name} stands for ({rival.settled[key]}); leave it out")
    return Method(name, _config(rival.config_cls, options, rival.settled))


def _base(options: dict[str, Any]) -> Method:
    _refuse_unknown("method", options, set())
    return Method("base", None)


_METHODS: dict[str, Callable[[dict[str, Any]], Method]] = {
    "badit": _badit,
    **{name: partial(_rival, name) for name in RIVALS},
    "base": _base,
}


def _config(config_cls: type[Any], options: dict[str, Any], settled: Mapping[str, Any] | None = None) -> PeftConfig:
    known = {field.name for field in dataclasses.fields(config_cls)} - _INTERNAL - (settled or {}).keys()
    _refuse_unknown("method", options, known)
    return _built(lambda: config_cls(task_type="CAUSAL_LM", **options, **(settled or {})))


def _refuse_unknown(where: str, options: Mapping[str, Any], known: set[str]) -> None:
    for key in options:
        if key not in known:
            raise BaditError(f"{where}.{key}: unknown key{nearest(key, known)}")


def _built(build: Callable[[], Any]) -> Any:
    try:
        return build()
    except (ValueError, TypeError) as error:  # BaditError among them
        raise BaditError(f"method: {error}") from None

"""From a recipe's ``method`` section to a method.

    method: {name: badit, num_experts: 8, r: 4, regroup: {every: 20}}     # regroup: null trains without DOG
    method: {name: lora, r: 32}                                           # or another of badit.baselines.RIVALS
    method: {name: pcgrad, r: 32}                                         # LoRA with gradient surgery; or cagrad
    method: {name: task-neurons, share: 0.1}                              # a tenth of the FFN neurons for each task
    method: {name: full}                                                  # every weight of the base model
    method: {name: base}                                                  # the base model as it is, to compare with

The options of a method are the fields of its (PEFT) configuration, so there is no second list of them to keep.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from peft import LoraConfig, PeftConfig

from badit.baselines import RIVALS
from badit.errors import BaditError, nearest
from badit.regroup import RegroupCallback
from badit.surgery import Surgery
from badit.training.method import AdapterMethod, Method, NeuronMethod, NeuronOptions, WeightsMethod
from badit.tuner import BaditConfig
from badit.tuner.base_config import FORMAT_FIELD

# PEFT's own bookkeeping and what a run fills in, which are not for a recipe to set.
_INTERNAL = {"peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
             "inference_mode", "runtime_config", "tasks", "past_branches", FORMAT_FIELD}  # fmt: skip


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
    return AdapterMethod("badit", _config(BaditConfig, options), regroup=regroup)


def _rival(name: str, options: dict[str, Any]) -> Method:
    rival = RIVALS[name]
    for key in options.keys() & rival.settled.keys():
        raise BaditError(f"method.{key}: is what the name {name} stands for ({rival.settled[key]}); leave it out")
    return AdapterMethod(name, _config(rival.config_cls, options, rival.settled))


def _surgery(name: Surgery, options: dict[str, Any]) -> Method:
    return AdapterMethod(name, _config(LoraConfig, options), surgery=name)


def _neurons(options: dict[str, Any]) -> Method:
    _refuse_unknown("method", options, {field.name for field in dataclasses.fields(NeuronOptions)})
    return NeuronMethod("task-neurons", _built(lambda: NeuronOptions(**options)))


def _without_options(name: str, kind: type[Method], options: dict[str, Any]) -> Method:
    _refuse_unknown("method", options, set())
    return kind(name)


_METHODS: dict[str, Callable[[dict[str, Any]], Method]] = {
    "badit": _badit,
    **{name: partial(_rival, name) for name in RIVALS},
    "pcgrad": partial(_surgery, "pcgrad"),
    "cagrad": partial(_surgery, "cagrad"),
    "task-neurons": _neurons,
    "full": partial(_without_options, "full", WeightsMethod),
    "base": partial(_without_options, "base", Method),
}


def _config(config_cls: type[Any], options: dict[str, Any], settled: Mapping[str, Any] | None = None) -> PeftConfig:
    fields = {field.name for field in dataclasses.fields(config_cls) if field.init}
    known = fields - _INTERNAL - (settled or {}).keys()
    _refuse_unknown("method", options, known)
    return _built(lambda: config_cls(task_type="CAUSAL_LM", **options, **(settled or {})))


def _refuse_unknown(where: str, options: Mapping[str, Any], known: set[str]) -> None:
    for key in options:
        if key not in known:
            raise BaditError(f"{where}.{key}: unknown key{nearest(key, known)}")


def _built(build: Callable[[], Any]) -> Any:
    try:
        return build()
    except (ValueError, TypeError, OverflowError) as error:  # BaditError among them
        raise BaditError(f"method: {error}") from None

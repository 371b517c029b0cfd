"""The baselines that add adapters, each by the name that a recipe gives it.

    method: {name: loramoe, num_experts: 8, r: 4}

A baseline is a PEFT configuration, whose fields are its options. Importing this package imports all of its modules,
which register theirs here and with PEFT, so that ``PeftModel.from_pretrained`` knows them.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from peft import PeftConfig

from badit.tuner.model import ExpertModel, register

Config = TypeVar("Config", bound=PeftConfig)


class Baseline(NamedTuple):
    """A method's configuration, whose fields are its options, and those of them that the name settles."""

    config_cls: type[Any]
    settled: Mapping[str, Any] = {}


BASELINES: dict[str, Baseline] = {}


def baseline(name: str, model_cls: type[ExpertModel]) -> Callable[[type[Config]], type[Config]]:
    """Registers a configuration class under a recipe's ``name``, and with PEFT under its ``method``."""

    def enter(config_cls: type[Config]) -> type[Config]:
        register(config_cls, model_cls)
        BASELINES[name] = Baseline(config_cls)
        return config_cls

    return enter


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

"""The baselines that add adapters, each by the name that a recipe gives it.

    method: {name: loramoe, num_experts: 8, r: 4}

A baseline is a PEFT configuration, whose fields are its options. Every module of this package is imported with it and
enters its own: importing the package also tells PEFT, so that ``PeftModel.from_pretrained`` knows them.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from peft import PeftConfig

from badit.tuner.model import ExpertModel, register

Config = TypeVar("Config", bound=PeftConfig)


def _suits_all(config: Any, model: Any) -> None:
    pass


@dataclass(frozen=True)
class Baseline:
    """A method to compare with.

    Attributes:
        config_cls: its PEFT configuration.
        settled: fields of the configuration that the name settles.
        check: raises BaditError for a configuration and a base model that do not go together.
    """

    config_cls: type[PeftConfig]
    settled: Mapping[str, Any] = field(default_factory=dict)
    check: Callable[[Any, Any], None] = _suits_all


BASELINES: dict[str, Baseline] = {}


def baseline(name: str, model_cls: type[ExpertModel]) -> Callable[[type[Config]], type[Config]]:
    """Enters a configuration class under a recipe's ``name``, and registers it with PEFT under its ``method``."""

    def enter(config_cls: type[Config]) -> type[Config]:
        register(config_cls, model_cls)
        BASELINES[name] = Baseline(config_cls)
        return config_cls

    return enter


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

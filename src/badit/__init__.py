"""badit: multi-task instruction tuning by basic-ability decomposition.

    from peft import get_peft_model
    from badit import BaditConfig, RegroupCallback

    model = get_peft_model(model, BaditConfig(num_experts=8, r=4))
    trainer = Trainer(model, ..., callbacks=[RegroupCallback(every=20)])

What the command line does is here as well (:mod:`badit.api`): train, evaluate, generate, compare, analyze, export …
Names are imported on first use, so that ``import badit`` takes no time.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from badit.api import Run, analyze, compare, evaluate, generate, plan, train, write_report
    from badit.cli.table import render as table
    from badit.data import load_tasks
    from badit.errors import BaditError
    from badit.evaluation.results import load_results, summarise
    from badit.export import export, score_export
    from badit.models import load_base_model
    from badit.optimizer import OrthogonalUpdates, build_optimizer, lora_plus_groups
    from badit.push import push_to_hub
    from badit.recipe import load_recipe
    from badit.regroup import RegroupCallback, Regrouper
    from badit.tuner import BaditConfig, BaditModel

__version__ = "0.1.0"

# Where a name is: in a module under the same name, or as module:name.
_HOMES = {
    "BaditConfig": "badit.tuner",
    "BaditError": "badit.errors",
    "BaditModel": "badit.tuner",
    "OrthogonalUpdates": "badit.optimizer",
    "RegroupCallback": "badit.regroup",
    "Regrouper": "badit.regroup",
    "Run": "badit.api",
    "analyze": "badit.api",
    "build_optimizer": "badit.optimizer",
    "compare": "badit.api",
    "evaluate": "badit.api",
    "export": "badit.export",
    "generate": "badit.api",
    "load_base_model": "badit.models",
    "load_recipe": "badit.recipe",
    "load_results": "badit.evaluation.results",
    "load_tasks": "badit.data",
    "push_to_hub": "badit.push",
    "lora_plus_groups": "badit.optimizer",
    "plan": "badit.api",
    "score_export": "badit.export",
    "summarise": "badit.evaluation.results",
    "table": "badit.cli.table:render",
    "train": "badit.api",
    "write_report": "badit.api",
}

__all__ = [
    "BaditConfig",
    "BaditError",
    "BaditModel",
    "OrthogonalUpdates",
    "RegroupCallback",
    "Regrouper",
    "Run",
    "__version__",
    "analyze",
    "build_optimizer",
    "compare",
    "evaluate",
    "export",
    "generate",
    "load_base_model",
    "load_recipe",
    "load_results",
    "load_tasks",
    "lora_plus_groups",
    "plan",
    "push_to_hub",
    "score_export",
    "summarise",
    "table",
    "train",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'badit' has no attribute {name!r}")
    module, _, own_name = _HOMES[name].partition(":")
    return getattr(import_module(module), own_name or name)


class _Package(ModuleType):
    """Keeps names such as ``badit.train`` for functions, which importing the module of the same name would take."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

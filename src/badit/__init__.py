"""badit: multi-task instruction tuning by basic-ability decomposition.

    from peft import get_peft_model
    from badit import BaditConfig, RegroupCallback

    model = get_peft_model(model, BaditConfig(num_experts=8, r=4))
    trainer = Trainer(model, ..., callbacks=[RegroupCallback(every=20)])

What the command line does is here as well: train, compare, analyze, and the methods of :class:`badit.Run`.
Names are imported on first use, so that ``import badit`` takes no time.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from badit.data import load_tasks
    from badit.errors import BaditError
    from badit.models import load_base_model
    from badit.optimizer import OrthogonalUpdates, build_optimizer, lora_plus_groups
    from badit.recipe import load_recipe
    from badit.regroup import RegroupCallback, Regrouper
    from badit.render import render as table
    from badit.results import load_results, summarise
    from badit.run import Run, analyze, compare, plan, train, write_report
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
    "Run": "badit.run",
    "analyze": "badit.run",
    "build_optimizer": "badit.optimizer",
    "compare": "badit.run",
    "load_base_model": "badit.models",
    "load_recipe": "badit.recipe",
    "load_results": "badit.results",
    "load_tasks": "badit.data",
    "lora_plus_groups": "badit.optimizer",
    "plan": "badit.run",
    "summarise": "badit.results",
    "table": "badit.render:render",
    "train": "badit.run",
    "write_report": "badit.run",
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
    "load_base_model",
    "load_recipe",
    "load_results",
    "load_tasks",
    "lora_plus_groups",
    "plan",
    "summarise",
    "table",
    "train",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'badit' has no attribute {name!r}")
    from badit.environment import quiet_notices

    quiet_notices()
    module, _, own_name = _HOMES[name].partition(":")
    return getattr(import_module(module), own_name or name)


class _Package(ModuleType):
    """Keeps a public function from being hidden by the submodule of the same name, which is set here once loaded."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return sorted(__all__)

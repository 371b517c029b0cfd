"""badit: multi-task instruction tuning by basic-ability decomposition.

    from peft import get_peft_model
    from badit import BaditConfig, RegroupCallback

    model = get_peft_model(model, BaditConfig(num_experts=8, r=4))
    trainer = Trainer(model, ..., callbacks=[RegroupCallback(every=20)])

Names are imported on first use, so that ``import badit`` takes no time.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from badit.comparison.compare import compare
    from badit.data import load_tasks
    from badit.errors import BaditError
    from badit.models import load_base_model
    from badit.peft import BaditConfig, BaditModel
    from badit.recipe import load_recipe
    from badit.serving.export import export
    from badit.serving.push import push_to_hub
    from badit.training.regroup import RegroupCallback
    from badit.training.regrouper import Regrouper
    from badit.training.run import train
    from badit.training.scoring import evaluate

__version__ = "0.1.0"

_HOMES = {
    "BaditConfig": "badit.peft",
    "BaditError": "badit.errors",
    "BaditModel": "badit.peft",
    "RegroupCallback": "badit.training.regroup",
    "Regrouper": "badit.training.regrouper",
    "compare": "badit.comparison.compare",
    "evaluate": "badit.training.scoring",
    "export": "badit.serving.export",
    "load_base_model": "badit.models",
    "load_recipe": "badit.recipe",
    "load_tasks": "badit.data",
    "push_to_hub": "badit.serving.push",
    "train": "badit.training.run",
}

__all__ = [
    "BaditConfig",
    "BaditError",
    "BaditModel",
    "RegroupCallback",
    "Regrouper",
    "__version__",
    "compare",
    "evaluate",
    "export",
    "load_base_model",
    "load_recipe",
    "load_tasks",
    "push_to_hub",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'badit' has no attribute {name!r}")

"""badit: multi-task instruction tuning by basic-ability decomposition.

    from peft import get_peft_model
    from badit import BaditConfig, prepare

    model = get_peft_model(model, BaditConfig(num_experts=8, r=4))
    trainer = Trainer(model, TrainingArguments(learning_rate=2e-3), ...)
    prepare(trainer)
    trainer.train()

The commands are also available from Python: ``train``, ``compare``, ``analyze``, and the methods of
:class:`badit.Run`. Names are imported on first use, so ``import badit`` is fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

# For type checkers and editors, which do not call __getattr__.
if TYPE_CHECKING:
    from badit.api import Run, adopt, analyze, plan, table, train
    from badit.comparison.compare import compare
    from badit.comparison.results import load_results, summarise
    from badit.data import load_tasks
    from badit.models import load_base_model
    from badit.recipe.loading import load_recipe
    from badit.report import write_report
    from badit.support.errors import BaditError
    from badit.training.optimizers import OrthogonalUpdates, lora_plus_groups
    from badit.training.preparation import prepare
    from badit.training.regrouping import RegroupCallback, Regrouper
    from badit.tuner import BaditConfig, BaditModel, hooks_of

__version__ = "0.1.0"

# The public names of each module.
_NAMES = {
    "api": ["Run", "adopt", "analyze", "plan", "table", "train"],
    "comparison.compare": ["compare"],
    "comparison.results": ["load_results", "summarise"],
    "data": ["load_tasks"],
    "models": ["load_base_model"],
    "recipe.loading": ["load_recipe"],
    "report": ["write_report"],
    "support.errors": ["BaditError"],
    "training.optimizers": ["OrthogonalUpdates", "lora_plus_groups"],
    "training.preparation": ["prepare"],
    "training.regrouping": ["RegroupCallback", "Regrouper"],
    "tuner": ["BaditConfig", "BaditModel", "hooks_of"],
}
_HOMES = {name: f"badit.{module}" for module, names in _NAMES.items() for name in names}

__all__ = [
    "BaditConfig",
    "BaditError",
    "BaditModel",
    "OrthogonalUpdates",
    "RegroupCallback",
    "Regrouper",
    "Run",
    "__version__",
    "adopt",
    "analyze",
    "compare",
    "hooks_of",
    "load_base_model",
    "load_recipe",
    "load_results",
    "load_tasks",
    "lora_plus_groups",
    "plan",
    "prepare",
    "summarise",
    "table",
    "train",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'badit' has no attribute {name!r}")
    from badit.support.console import quiet_notices

    # Before the import, during which libraries print their notices.
    quiet_notices()
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__

"""BADIT as a PEFT tuner, for ``get_peft_model`` and ``PeftModel.from_pretrained``.

Importing this package registers the method with PEFT.
"""

from badit.tuner.badit_layer import BaditLinear
from badit.tuner.config import BaditConfig, ExpertConfig
from badit.tuner.layer import ExpertLinear
from badit.tuner.model import BaditModel, Hooks, hooks_of, register

register(BaditConfig, BaditModel)

__all__ = [
    "BaditConfig",
    "BaditLinear",
    "BaditModel",
    "ExpertConfig",
    "ExpertLinear",
    "Hooks",
    "hooks_of",
]

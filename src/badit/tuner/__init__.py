"""BADIT as a PEFT tuner: ``BaditConfig`` works with plain ``get_peft_model`` and ``PeftModel.from_pretrained``.

Importing this package registers the method with PEFT.
"""

from badit.tuner.config import BaditConfig
from badit.tuner.layer import BaditLayer, BaditLinear
from badit.tuner.model import BaditModel, Hooks, hooks_of
from badit.tuner.registration import register

register(BaditConfig, BaditModel)

__all__ = ["BaditConfig", "BaditLayer", "BaditLinear", "BaditModel", "Hooks", "hooks_of"]

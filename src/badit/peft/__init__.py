"""BADIT as a PEFT tuner: ``BaditConfig`` works with plain ``get_peft_model`` and ``PeftModel.from_pretrained``.

Importing this package registers the method with PEFT.
"""

from badit.peft.config import BaditConfig
from badit.peft.layer import BaditLayer, BaditLinear
from badit.peft.model import BaditModel
from badit.peft.registration import register

register(BaditConfig, BaditModel)

__all__ = ["BaditConfig", "BaditLayer", "BaditLinear", "BaditModel"]

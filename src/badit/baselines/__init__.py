"""The rivals in mixed multi-task training, each by the name that a recipe gives it.

    method: {name: loramoe, num_experts: 8, r: 4}

A rival is a PEFT configuration: its fields are the options, but for those that the name has settled. Importing this
package registers the mixtures with PEFT, so that ``PeftModel.from_pretrained`` knows them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig, PeftConfig

from badit.baselines.goat import GoatConfig
from badit.baselines.hydralora import HydraLoraConfig
from badit.baselines.lora import LORA_FAMILY
from badit.baselines.loramoe import LoraMoeConfig
from badit.baselines.model import MixtureModel
from badit.peft.registration import register

for _config_cls in (LoraMoeConfig, HydraLoraConfig, GoatConfig):
    register(_config_cls, MixtureModel)


@dataclass(frozen=True)
class Rival:
    """A method to compare with: its configuration class, and the fields that its name settles."""

    config_cls: type[PeftConfig]
    settled: Mapping[str, Any] = field(default_factory=dict)


RIVALS: dict[str, Rival] = {
    **{name: Rival(LoraConfig, settled) for name, settled in LORA_FAMILY.items()},
    "loramoe": Rival(LoraMoeConfig),
    "hydralora": Rival(HydraLoraConfig),
    "goat": Rival(GoatConfig),
}

__all__ = ["RIVALS", "GoatConfig", "HydraLoraConfig", "LoraMoeConfig", "MixtureModel", "Rival"]

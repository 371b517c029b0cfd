"""The rivals that add adapters, each by the name that a recipe gives it.

    method: {name: loramoe, num_experts: 8, r: 4}

A rival is a PEFT configuration: its fields are the options, but for those that the name has settled. Importing this
package registers the mixtures with PEFT, so that ``PeftModel.from_pretrained`` knows them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig, PeftConfig

from badit.baselines.branches import BranchModel
from badit.baselines.gain_lora import GainLoraConfig
from badit.baselines.goat import GoatConfig
from badit.baselines.hydralora import HydraLoraConfig
from badit.baselines.lora import LORA_FAMILY
from badit.baselines.loramoe import LoraMoeConfig
from badit.baselines.model import MixtureModel
from badit.baselines.mtl_lora import MtlLoraConfig, MtlLoraModel
from badit.baselines.o_lora import OLoraConfig
from badit.baselines.sapt import SaptConfig
from badit.tuner.registration import register

for _config_cls in (LoraMoeConfig, HydraLoraConfig, GoatConfig):
    register(_config_cls, MixtureModel)
for _config_cls in (OLoraConfig, GainLoraConfig, SaptConfig):
    register(_config_cls, BranchModel)
register(MtlLoraConfig, MtlLoraModel)


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
    "mtl-lora": Rival(MtlLoraConfig),
    "o-lora": Rival(OLoraConfig),
    "gainlora": Rival(GainLoraConfig),
    "sapt": Rival(SaptConfig),
}

__all__ = [
    "RIVALS",
    "BranchModel",
    "GainLoraConfig",
    "GoatConfig",
    "HydraLoraConfig",
    "LoraMoeConfig",
    "MixtureModel",
    "MtlLoraConfig",
    "MtlLoraModel",
    "OLoraConfig",
    "Rival",
    "SaptConfig",
]

"""The tuner of the mixtures, for ``get_peft_model`` and ``PeftModel.from_pretrained``."""

from __future__ import annotations

import torch
from torch import nn

from badit.baselines.config import MixtureConfig
from badit.baselines.layer import MixtureLayer, MixtureLinear
from badit.tuner.model import ExpertModel


class MixtureModel(ExpertModel):
    """A base model with a mixture of LoRA experts in its target modules.

    Train it with :class:`badit.trainer.AnswerTrainer`, or add :meth:`extra_loss` to the loss yourself.
    """

    tuner_layer_cls = MixtureLayer

    def _new_layer(self, target: nn.Module, name: str, adapter_name: str, config: MixtureConfig) -> MixtureLinear:
        return MixtureLinear(target, name, adapter_name, config)

    def extra_loss(self, attention_mask: torch.Tensor) -> torch.Tensor | None:
        """The weighted balance loss, a mean over the layers; None where the rival has none or its weight is 0."""
        layers = [module for module in self.model.modules() if isinstance(module, MixtureLayer)]
        losses = [loss.to(attention_mask.device) for layer in layers for loss in layer.balance_losses(attention_mask)]
        return torch.stack(losses).mean() if losses else None

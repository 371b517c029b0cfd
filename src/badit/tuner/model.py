"""The tuner: puts BADIT layers into a base model, for ``get_peft_model`` and ``PeftModel.from_pretrained``."""

from __future__ import annotations

from torch import nn

from badit.errors import BaditError
from badit.tuner.base_model import ExpertModel
from badit.tuner.config import BaditConfig
from badit.tuner.layer import BaditLayer, BaditLinear
from badit.tuner.prompt import RoutingContext


class BaditModel(ExpertModel):
    """A base model with BADIT experts in its target modules."""

    tuner_layer_cls = BaditLayer

    peft_config: dict[str, BaditConfig]

    def _refuse_unsuitable(self, config: BaditConfig) -> None:
        if len(self.peft_config) > 1 and any(c.base_weight == "folded" for c in self.peft_config.values()):
            raise BaditError(
                "a folded adapter changes the base weight and so must be the only one: "
                "use base_weight='delta' for every adapter"
            )
        if (
            config.routing == "prompt"
            and getattr(getattr(self.model, "config", None), "is_encoder_decoder", False) is True
        ):
            raise BaditError("routing='prompt' is for decoder-only models; use routing='token' on an encoder-decoder")

    def _new_layer(self, target: nn.Module, name: str, adapter_name: str, config: BaditConfig) -> BaditLinear:
        if config.base_weight == "folded" and _is_shared(self.model, target.weight):
            raise BaditError(
                f"{name} shares its weight with another module, which folding would change too: "
                "use base_weight='delta', or leave it out of target_modules"
            )
        return BaditLinear(target, name, RoutingContext.of(self.model), adapter_name, config)

    def unload(self) -> nn.Module:
        """The base model, every weight as it was before the adapters."""
        for module in self.model.modules():
            if isinstance(module, BaditLayer):
                module.unfold()
        RoutingContext.of(self.model).detach(self.model)
        return super().unload()


def _is_shared(model: nn.Module, weight: object) -> bool:
    """Whether several modules use one weight, as an embedding and a tied head do."""
    return sum(parameter is weight for _, parameter in model.named_parameters(remove_duplicate=False)) > 1

"""The tuner: puts BADIT layers into a base model, for ``get_peft_model`` and ``PeftModel.from_pretrained``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers.pytorch_utils import Conv1D

from badit.errors import BaditError
from badit.peft.config import BaditConfig
from badit.peft.layer import BaditLayer, BaditLinear
from badit.peft.routing_context import RoutingContext

# The paper adapts the MLP's gate projection; models without one get their MLP's first projection.
_GATE_PROJECTION = (
    "llama", "mistral", "ministral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "gemma3_text", "olmo2", "olmo3",
    "smollm3", "granite", "cohere", "cohere2", "stablelm",
)  # fmt: skip
TARGET_MODULES = {
    **{model_type: ["gate_proj"] for model_type in _GATE_PROJECTION},
    "phi3": ["gate_up_proj"],
    "phi": ["fc1"],
    "opt": ["fc1"],
    "gpt2": ["c_fc"],
    "gpt_neo": ["c_fc"],
    "gpt_neox": ["dense_h_to_4h"],
    "bloom": ["dense_h_to_4h"],
    "falcon": ["dense_h_to_4h"],
}


class BaditModel(BaseTuner):
    """A base model with BADIT experts in its target modules."""

    prefix = "badit_"
    tuner_layer_cls = BaditLayer
    target_module_mapping = TARGET_MODULES

    peft_config: dict[str, BaditConfig]  # pyright: ignore[reportIncompatibleVariableOverride] (ours alone)

    def _check_new_adapter_config(self, config: BaditConfig) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        try:
            super()._check_new_adapter_config(config)
            self._refuse_unsuitable(config)
        except ValueError:
            # PEFT has entered the configuration already; a refused one must not stay behind.
            for name in [name for name, known in self.peft_config.items() if known is config]:
                del self.peft_config[name]
            raise

    def _refuse_unsuitable(self, config: BaditConfig) -> None:
        if len(self.peft_config) > 1 and any(c.base_weight == "folded" for c in self.peft_config.values()):
            raise BaditError(
                "a folded adapter changes the base weight and so must be the only one: "
                "use base_weight='delta' for every adapter"
            )
        if config.routing == "prompt" and getattr(getattr(self.model, "config", None), "is_encoder_decoder", False):
            raise BaditError("routing='prompt' is for decoder-only models; use routing='token' on an encoder-decoder")

    def _create_and_replace(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        peft_config: BaditConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, BaditLayer):
            target.update_layer(adapter_name, peft_config)
            return
        if not isinstance(target, (nn.Linear, Conv1D)):
            raise BaditError(
                f"{current_key} is a {type(target).__name__}; BADIT adapts nn.Linear and transformers' Conv1D: "
                "change target_modules"
            )
        if not target.weight.is_floating_point():
            raise BaditError(f"{current_key} has a weight of type {target.weight.dtype}, which cannot be decomposed")
        layer = BaditLinear(target, current_key, RoutingContext.of(self.model), adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's forward pass, by the call that runs its hooks; PEFT before 0.21 goes round them."""
        return self.model(*args, **kwargs)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT's door for rows of one batch with different adapters; without this it would drop the request."""
        if kwargs.get("adapter_names") is not None:
            raise BaditError("adapter_names: BADIT cannot mix adapters within a batch; use set_adapter between batches")
        yield

    def unload(self) -> nn.Module:
        """The base model, every weight as it was before the adapters."""
        for module in self.model.modules():
            if isinstance(module, BaditLayer):
                module.unfold()
        RoutingContext.of(self.model).detach(self.model)
        return super().unload()

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: see :meth:`BaditLayer.merge`."""
        self._refuse_merge()

    def merge_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: see :meth:`BaditLayer.merge`."""
        self._refuse_merge()

    def _refuse_merge(self) -> NoReturn:
        layer = next(module for module in self.model.modules() if isinstance(module, BaditLayer))
        layer.merge()
        raise AssertionError("BaditLayer.merge always raises")

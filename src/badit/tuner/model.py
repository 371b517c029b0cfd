"""The tuners: they put layers of experts into a base model, say what they cannot do, and what they ask of training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NoReturn

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from badit.errors import BaditError
from badit.tuner.base_config import ExpertConfig
from badit.tuner.base_layer import ExpertLayer
from badit.tuner.config import BaditConfig
from badit.tuner.layer import BaditLayer, BaditLinear
from badit.tuner.prompt import RoutingContext
from badit.tuner.quantised import is_quantised, keep_in_place, refuse_unsuitable_layer

# A stage's training batches by task.
TaskBatches = Mapping[str, Sequence[Mapping[str, torch.Tensor]]]

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


class Hooks:
    """What a method asks of whoever trains, evaluates or exports its model. By default it asks nothing.

    Methods override these on their tuner; :func:`hooks_of` finds it. Batches are given by the task's name, each a dict
    of ``input_ids``, ``attention_mask`` and ``labels`` (batch, positions).
    """

    #: Every row's task must be named, by :meth:`rows_of`.
    needs_tasks = False
    #: The model's forward takes ``prompt_mask=`` (batch, positions), which says where the prompt is.
    routes_prompts = False
    #: The model cannot be divided over processes by FSDP or DeepSpeed.
    needs_whole_weights = False

    def start_task(self, batches: TaskBatches) -> None:
        """Is called before training, with the batches that it is about to see."""

    def end_task(self, batches: TaskBatches) -> None:
        """Is called after training, before the adapter is saved, with the batches that it has seen."""

    def next_task(self) -> None:
        """Is called when a saved adapter is about to be trained on the next task of a sequence."""

    def before_update(self) -> None:
        """Is called right before every step of the optimiser."""

    def after_update(self) -> None:
        """Is called right after every step of the optimiser."""

    def extra_loss(self, attention_mask: torch.Tensor) -> torch.Tensor | None:
        """What the method adds to the cross-entropy of the training pass that has just run: a scalar, or nothing.

        The mask (batch, positions) leaves padding out.
        """
        return None

    def rows_of(self, tasks: Sequence[str] | None) -> AbstractContextManager[None]:
        """Within, the rows that the model is given, in forward passes and in ``generate``, are of these tasks.

        A backward pass need not be within. ``tasks`` may be None where the method does not need them.
        """
        return nullcontext()


def hooks_of(model: nn.Module) -> Hooks:
    """The hooks of a PEFT model's tuner, perhaps wrapped for data parallelism; of any other model, none."""
    tuner = getattr(getattr(model, "module", model), "base_model", None)
    return tuner if isinstance(tuner, Hooks) else Hooks()


class ExpertModel(Hooks, BaseTuner):
    """A base model with LoRA experts in its target modules."""

    prefix = "badit_"
    tuner_layer_cls = ExpertLayer
    target_module_mapping = TARGET_MODULES

    peft_config: dict[str, Any]  # pyright: ignore[reportIncompatibleVariableOverride] (ours alone)

    def _check_new_adapter_config(self, config: ExpertConfig) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        try:
            super()._check_new_adapter_config(config)
            self._refuse_unsuitable(config)
        except ValueError:
            # PEFT has entered the configuration already; a refused one must not stay behind.
            for name in [name for name, known in self.peft_config.items() if known is config]:
                del self.peft_config[name]
            raise

    def _pre_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        super()._pre_injection_hook(model, config, adapter_name)
        keep_in_place(model)

    def _refuse_unsuitable(self, config: Any) -> None:
        """Raises for a configuration that does not go with this model or its other adapters."""

    def _create_and_replace(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        peft_config: ExpertConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, ExpertLayer):
            target.update_layer(adapter_name, peft_config)
            return
        refuse_unsuitable_layer(target, current_key, peft_config.method)
        if is_quantised(target) and peft_config.changes_base_weight:
            raise BaditError(f"{current_key} is quantised and cannot be changed: take base_weight='delta'")
        layer = self._new_layer(target, current_key, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _new_layer(self, target: nn.Module, name: str, adapter_name: str, config: Any) -> nn.Module:
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's forward pass, by the call that runs its hooks; PEFT before 0.21 goes round them."""
        return self.model(*args, **kwargs)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT's door for rows of one batch with different adapters; without this it would drop the request."""
        if kwargs.get("adapter_names") is not None:
            method = self.peft_config[self.active_adapters[0]].method
            raise BaditError(f"adapter_names: {method} cannot mix adapters within a batch; set_adapter between batches")
        yield

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: see the layer's ``merge``."""
        self._refuse_merge()

    def merge_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: see the layer's ``merge``."""
        self._refuse_merge()

    def _refuse_merge(self) -> NoReturn:
        layer = next(module for module in self.model.modules() if isinstance(module, ExpertLayer))
        layer.merge()
        raise AssertionError("merge always raises")


class BaditModel(ExpertModel):
    """A base model with BADIT experts in its target modules."""

    tuner_layer_cls = BaditLayer

    routes_prompts = True

    peft_config: dict[str, BaditConfig]

    @property
    def needs_whole_weights(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Where the residual is written into the base weight."""
        return any(config.base_weight == "folded" for config in self.peft_config.values())

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

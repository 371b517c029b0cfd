"""The PEFT tuners, which add expert layers to a base model, and the hooks that training, evaluation and export call."""

import inspect
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import register_peft_method
from torch import nn

from badit.support.errors import BaditError
from badit.tuner.config import BaditConfig, ExpertConfig, peft_type
from badit.tuner.distributed import is_divided_by_zero3
from badit.tuner.layer import BaditLinear, ExpertLinear
from badit.tuner.prompt import IGNORED_LABEL, RoutingContext
from badit.tuner.targets import (
    chosen_targets,
    join_experts,
    keep_in_place,
    refuse_unsuitable_layer,
    split_experts,
)

# Batches by task.
TaskBatches = Mapping[str, Any]
_PACKING = (
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
)  # keyword arguments of packed rows


class Hooks:
    """Hooks that the training, evaluation and export of a method's model call. By default they do nothing.

    Methods override them on their tuner; :func:`hooks_of` returns it. ``batches`` has each task's batches by the task's
    name; a batch is a dict of ``input_ids``, ``attention_mask`` and ``labels`` (batch, positions).
    """

    #: Whether the model's forward takes ``prompt_mask=`` (batch, positions), which marks the prompt's positions.
    routes_prompts = False

    def start_task(self, batches: TaskBatches) -> None:
        """Called before training, with the batches of the training."""

    def end_task(self, batches: TaskBatches) -> None:
        """Called after training, before the adapter is saved, with the batches of the training."""

    def next_task(self) -> None:
        """Called before a saved adapter is trained on the next task of a sequence."""

    def before_update(self) -> None:
        """Called immediately before every optimizer step."""

    def after_update(self) -> None:
        """Called immediately after every optimizer step."""

    def extra_loss(self, attention_mask: torch.Tensor) -> torch.Tensor | None:
        """Returns a scalar to add to the last pass's loss, or None; the mask (batch, positions) excludes padding."""
        return None

    def rows_of(self, tasks: Sequence[str] | None) -> AbstractContextManager[None]:
        """Returns a context that sets the task of each row in forward passes and ``generate``; None: no tasks."""
        return nullcontext()


def hooks_of(model: nn.Module) -> Hooks:
    """Returns the hooks of a PEFT model's tuner, also inside a data-parallel wrapper; for other models the defaults."""
    tuner = getattr(getattr(model, "module", model), "base_model", None)
    return tuner if isinstance(tuner, Hooks) else Hooks()


class ExpertModel(Hooks, BaseTuner):
    """A base model with LoRA experts in its target modules."""

    prefix = "badit_"
    tuner_layer_cls = ExpertLinear

    peft_config: dict[str, Any]  # pyright: ignore[reportIncompatibleVariableOverride] (only this package's)

    def expert_layers(self) -> list[Any]:
        """Returns the adapted layers in the model's order."""
        return [module for module in self.model.modules() if isinstance(module, ExpertLinear)]

    def _check_new_adapter_config(self, config: ExpertConfig) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        try:
            super()._check_new_adapter_config(config)
            self._refuse_unsuitable(config)
        except ValueError:
            # PEFT has already stored the configuration; remove it if it is refused.
            del self.peft_config[
                next(name for name, known in reversed(self.peft_config.items()) if known is config)
            ]
            raise

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        """Sets the default targets and checks the given ones against the model's fused weights."""
        keep_in_place(self.model)
        peft_config.target_modules = targets = chosen_targets(self.model, peft_config)
        if targets is None:
            kind = model_config["model_type"]
            raise BaditError(
                f"Please specify `target_modules`: name the modules to adapt in a {kind}"
            )

        def is_in(names: Iterable[str], target: str) -> bool:
            return any(f".{name}".endswith(f".{target}") for name in names)

        fused = [name for name, p in self.model.named_parameters() if p.ndim == 3]
        modules = [name.removesuffix(".base_layer") for name, _ in self.model.named_modules()]
        for target in getattr(peft_config, "target_parameters", None) or ():
            if not is_in(fused, target):
                raise BaditError(
                    f"target_parameters: the model has no fused weight {target!r}; see named_parameters()"
                )
        for target in targets if isinstance(targets, set) else ():
            if is_in(fused, target) and not is_in(modules, target):
                raise BaditError(
                    f"target_modules: {target} is a fused weight: name it in target_parameters"
                )
        return peft_config

    def _refuse_unsuitable(self, config: Any) -> None:
        """Raises BaditError if a configuration does not fit the model or its other adapters."""

    def _is_encoder_decoder(self) -> bool:
        return getattr(getattr(self.model, "config", None), "is_encoder_decoder", False) is True

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
        if parameter_name is not None:
            name = f"{current_key.rpartition('.')[0]}.{parameter_name}"
            matrices = split_experts(target, parameter_name, name, RoutingContext.of(self.model))
            for index, matrix in enumerate(matrices):
                self._create_and_replace(
                    peft_config, adapter_name, matrix, str(index), matrices, f"{name}.{index}"
                )
            return
        if isinstance(target, BaseTunerLayer) and type(target) is not self.tuner_layer_cls:
            raise BaditError(
                f"{current_key}: has another method's adapter; call unload() on the model with it first"
            )
        if isinstance(target, ExpertLinear):
            for name in (*target.adapter_layer_names, *target.other_param_names):
                if adapter_name in (replaced := getattr(target, name)):
                    del replaced[adapter_name]
            target.update_layer(adapter_name, peft_config)
            return
        refuse_unsuitable_layer(target, current_key, peft_config.method)
        layer_cls: Any = self.tuner_layer_cls
        layer = layer_cls(
            target, current_key, RoutingContext.of(self.model), adapter_name, peft_config
        )
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def unload(self) -> nn.Module:
        """Removes the adapters and their hooks and returns the base model."""
        RoutingContext.of(self.model).detach(self.model)
        join_experts(self.model)
        return super().unload()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the base model's forward pass with its hooks, which PEFT before 0.21 skips."""
        return self.model(*args, **kwargs)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Raises BaditError for ``adapter_names``: otherwise PEFT would ignore that rows have different adapters."""
        if kwargs.get("adapter_names") is not None:
            method = self.peft_config[self.active_adapters[0]].method
            raise BaditError(
                f"adapter_names: {method} cannot mix adapters within a batch; set_adapter between batches"
            )
        yield

    def _check_merge_allowed(self) -> None:
        self.expert_layers()[0].merge()  # always raises, before PEFT has changed anything


class BaditModel(ExpertModel):
    """A base model with BADIT experts in its target modules."""

    tuner_layer_cls = BaditLinear
    routes_prompts = True

    @torch.no_grad()
    def start_task(self, batches: TaskBatches) -> None:
        """Finds the clusters of prompts of new adapters with gates='clusters', in a pass over some training prompts.

        It reads 32 prompts per cluster, the same number of every task (at least one). All processes call it, before the
        model is wrapped or sharded; the clusters are those of rank 0. BaditError if a layer gets no prompts.
        """
        if not isinstance(batches, Mapping):
            raise BaditError(
                "start_task: needs the batches of each task, such as {'all': dataloader}"
            )
        routing = RoutingContext.of(self.model)
        if not (new := routing.without_clusters()):
            return
        if is_divided_by_zero3(self.model):
            raise BaditError(
                "start_task: DeepSpeed has divided the weights; load the model before you set up ZeRO-3"
            )
        of_each = (
            32
            * max(layer.badit_config[name].num_clusters for layer, name in new)
            // max(1, len(batches))
        )
        means = routing.prompt_means = defaultdict(list)
        modes = {module: module.training for module in self.modules()}
        self.eval()
        try:
            with torch.compiler.set_stance("force_eager"):
                for batches_of_task in batches.values():
                    left = max(1, of_each)
                    for batch in batches_of_task:
                        left -= self._read_prompts(batch, left)
                        if left <= 0:
                            break
        finally:
            routing.prompt_means = None
            for module, mode in modes.items():
                module.training = mode
        if missed := [layer.name for layer, name in new if f"{layer.name}.{name}" not in means]:
            raise BaditError(
                f"start_task: no batch reaches {missed[0]}; pass other batches, or use gates='mean_one'"
            )
        for layer, name in new:
            layer.cluster(name, torch.cat(means.pop(f"{layer.name}.{name}")))

    def _read_prompts(self, batch: Any, rows: int) -> int:
        """Runs the base model on the first rows of a batch as in training, and returns the number of their prompts."""
        parts = batch.items() if isinstance(batch, Mapping) else ()
        device = next(self.model.parameters()).device
        tensors = {name: each.to(device) for name, each in parts if isinstance(each, torch.Tensor)}
        if getattr(tensors.get("input_ids"), "ndim", 0) != 2:
            raise BaditError(
                "start_task: a batch must be a dict of tensors, as in training; or use gates='mean_one'"
            )
        if all(len(each) == len(batch["input_ids"]) for each in tensors.values() if each.ndim > 1):
            tensors = {
                name: each[:rows] if each.ndim > 1 else each for name, each in tensors.items()
            }
        if "labels" not in tensors and "completion_mask" in tensors:  # as in TRL's preference data
            tensors["labels"] = tensors["input_ids"].where(
                tensors["completion_mask"].bool(), IGNORED_LABEL
            )
        mask_BT, segments = RoutingContext.of(self.model).describe(self.model, tensors).prompt
        options = {
            **batch,
            **tensors,
            "labels": None,
            "use_cache": False,
            "logits_to_keep": 1,
        }  # saves memory
        known = {*inspect.signature(self.model.forward).parameters, *_PACKING}
        self.model(
            **{name: options[name] for name in options if name in known}, prompt_mask=mask_BT
        )
        return len(tensors["input_ids"]) if segments is None else segments.number

    def _refuse_unsuitable(self, config: BaditConfig) -> None:
        if config.routing == "prompt" and self._is_encoder_decoder():
            raise BaditError(
                "routing: 'prompt' is for decoder-only models; use routing='token' for an encoder-decoder"
            )


def register(config_cls: Any, model_cls: Any) -> None:
    """Registers a method with PEFT as ``config_cls.method``, once; BaditError if another package has taken the name."""
    name = config_cls.method.lower()
    registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type(config_cls.method))
    if registered is None:
        register_peft_method(
            name=name, config_cls=config_cls, model_cls=model_cls, prefix=model_cls.prefix
        )
    elif registered is not config_cls:
        known = f"a PEFT method named {name!r} is already registered by {registered.__module__}"
        raise BaditError(f"{known}; uninstall that package or this one")

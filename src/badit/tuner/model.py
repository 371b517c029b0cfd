"""The PEFT tuners, which add expert layers to a base model, and the hooks of their methods.

Training, evaluation and export call the hooks.
"""

import inspect
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import register_peft_method
from torch import Tensor, nn

from badit.method.extension import Likeness
from badit.support.console import waiting
from badit.support.errors import BaditError, check
from badit.tuner.abilities import find_abilities, find_layer_codes
from badit.tuner.additions import (
    GRADIENT_ROWS,
    Survey,
    changed_tasks,
    extended_config,
    likeness_by_task,
    record_merged,
    refuse_new_expert,
    refuse_new_tasks,
    refuse_other_batches,
    refuse_unextendable,
    set_clusters,
    start_extension,
    store_clusters,
    survey,
)
from badit.tuner.answers import answer_logits, predicts_next_token
from badit.tuner.badit_layer import BaditLinear, Place
from badit.tuner.config import BaditConfig, Count, ExpertConfig, Extension, peft_type
from badit.tuner.context import RoutingContext
from badit.tuner.distributed import any_of_all, is_divided_by_zero3, rank_and_size
from badit.tuner.examples import Example, examples_in, examples_of_ranks
from badit.tuner.extension import nearest_extensions
from badit.tuner.keys import Keys, frozen_embedding, mean_embeddings
from badit.tuner.layer import ExpertLinear
from badit.tuner.prompt import IGNORED_LABEL, Segments
from badit.tuner.targets import (
    chosen_targets,
    join_experts,
    keep_in_place,
    refuse_misplaced_targets,
    refuse_unsuitable_layer,
    split_experts,
)

# Batches by task.
TaskBatches = Mapping[str, Any]
# More prompts hardly move the centroids (benchmarks/cluster_prompts.py), and each needs a pass.
READ_PER_CLUSTER = 16
# For keys of prompts, which need no pass.
EMBEDDED_PER_CLUSTER = 32
_PROMPT_FIX = (
    "set the labels of prompts to -100 (rows of prompt and completion, such as "
    "badit.data.answer_rows(messages); in TRL also assistant_only_loss=True), or use "
    "routing='token'"
)
# A batch as given, its first rows, and the mask and segments of their prompts.
_PromptBatch = tuple[Mapping[str, Any], dict[str, Tensor], Tensor, Segments | None]
# Keyword arguments of packed rows, which are not in the signature of a model's forward.
_PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


class Hooks:
    """Hooks that the training, evaluation and export of a method's model call.

    By default they do nothing. Methods override them on their tuner; :func:`hooks_of` returns it.
    ``batches`` has each task's batches by the task's name; a batch is a dict of ``input_ids``,
    ``attention_mask`` and ``labels`` (batch, positions).
    """

    #: Whether the model's forward takes ``prompt_mask=`` (batch, positions), which is the prompt.
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

    def extra_loss(self, attention_mask: Tensor) -> Tensor | None:
        """Returns a scalar to add to the last pass's loss, or None.

        The mask (batch, positions) excludes padding.
        """
        return None

    def rows_of(self, tasks: Sequence[str] | None) -> AbstractContextManager[None]:
        """Returns a context that sets the task of each row in forward passes and ``generate``.

        None: no tasks.
        """
        return nullcontext()


# The hooks that only badit's trainer and training call.
_DURING_TRAINING = ("rows_of", "before_update", "after_update", "extra_loss", "end_task")


def calls_during_training(hooks: type) -> list[str]:
    """Returns the hooks of a class that other trainers than badit's do not call."""
    if not issubclass(hooks, Hooks):
        return []
    return [name for name in _DURING_TRAINING if getattr(hooks, name) is not getattr(Hooks, name)]


def hooks_of(model: nn.Module) -> Hooks:
    """Returns the hooks of a PEFT model's tuner; for other models the default ones.

    The model may be inside a data-parallel wrapper.
    """
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

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Adds an adapter; called by PEFT.

        TRL adds "ref", the reference of a preference loss, with the configuration of "default", but
        copies only some of its tensors. So it is added as a saved adapter is, without values, and
        gets copies of all of them.
        """
        RoutingContext.of(model).begin_adapter(model, adapter_name)
        if adapter_name != "ref" or not self._has_reference():
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            return
        super().inject_adapter(model, adapter_name, low_cpu_mem_usage=True)
        self._copy_to_reference()

    def _has_reference(self) -> bool:
        reference = self.peft_config.get("ref")
        return reference is not None and reference is self.peft_config.get("default")

    def _copy_to_reference(self) -> None:
        copies = {}
        for name, tensor in (*self.named_parameters(), *self.named_buffers()):
            copied = re.sub(rf"({self.prefix}\w+)\.default\b", r"\1.ref", name)
            if copied != name:
                copies[copied] = tensor.detach().clone()
        # assign, because the tensors of a new reference are on the meta device.
        self.load_state_dict(copies, strict=False, assign=True)

    def _check_new_adapter_config(self, config: ExpertConfig) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        try:
            super()._check_new_adapter_config(config)
            self._refuse_unsuitable(config)
        except ValueError:
            # PEFT has already stored the configuration, as the last one.
            names = [name for name, stored in self.peft_config.items() if stored is config]
            del self.peft_config[names[-1]]
            raise

    def _refuse_unsuitable(self, config: Any) -> None:
        """Raises BaditError if a configuration does not fit the model or its other adapters."""

    def _is_encoder_decoder(self) -> bool:
        return getattr(getattr(self.model, "config", None), "is_encoder_decoder", False) is True

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        """Sets the default targets, and checks the targets against the model's fused weights."""
        # Now, because the first forward pass on a CPU would reorder 4-bit weights.
        keep_in_place(self.model)
        peft_config.target_modules = chosen_targets(self.model, peft_config)
        if peft_config.target_modules is None:
            raise BaditError(
                "Please specify `target_modules`: name the modules to adapt in a "
                f"{model_config['model_type']}"
            )
        refuse_misplaced_targets(self.model, peft_config)
        return peft_config

    # PEFT passes these arguments.
    def _create_and_replace(  # noqa: PLR0913 # pyright: ignore[reportIncompatibleMethodOverride]
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
            # A fused weight: each of its matrices gets a layer of its own, in the list of matrices.
            matrices = split_experts(target, parameter_name, name, RoutingContext.of(self.model))
            for index, matrix in enumerate(matrices):
                self._create_and_replace(
                    peft_config, adapter_name, matrix, str(index), matrices, f"{name}.{index}"
                )
            return
        if isinstance(target, BaseTunerLayer) and type(target) is not self.tuner_layer_cls:
            raise BaditError(
                f"{current_key}: has another method's adapter; call unload() on the model with it "
                "first"
            )
        # A further adapter, or a new one in place of one with this name.
        if isinstance(target, ExpertLinear):
            _remove_tensors(target, adapter_name)
            target.update_layer(adapter_name, peft_config)
            return
        refuse_unsuitable_layer(target, current_key, peft_config.method)
        layer_cls: Any = self.tuner_layer_cls
        routing = RoutingContext.of(self.model)
        layer = layer_cls(target, current_key, routing, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            # As in PEFT's LoRA: an additional adapter is trained only once it is active.
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
        """Raises BaditError for ``adapter_names``, an adapter per row, which PEFT would ignore."""
        if kwargs.get("adapter_names") is not None:
            method = self.peft_config[self.active_adapters[0]].method
            raise BaditError(
                f"adapter_names: {method} cannot mix adapters within a batch; set_adapter between "
                "batches"
            )
        yield

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Always raises BaditError: gates differ between adapters."""
        raise BaditError(
            "add_weighted_adapter: adapters with gates have no weighted sum; activate several at "
            "once with base_model.set_adapter([NAME, NAME]), or export each as a plain LoRA (badit "
            "adopt, badit export) and combine those"
        )

    def _check_merge_allowed(self) -> None:
        self.expert_layers()[0].merge()  # always raises, before PEFT has changed anything


def _remove_tensors(layer: ExpertLinear, adapter_name: str) -> None:
    """Removes an earlier adapter of this name, which may have had more tensors."""
    for name in (*layer.adapter_layer_names, *layer.other_param_names):
        by_adapter = getattr(layer, name)
        if adapter_name in by_adapter:
            del by_adapter[adapter_name]


class BaditModel(ExpertModel):
    """A base model with BADIT experts in its target modules."""

    tuner_layer_cls = BaditLinear
    routes_prompts = True

    # Not in __init__: PEFT's constructor already adds the first adapter, after this hook.
    def _pre_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        super()._pre_injection_hook(model, config, adapter_name)
        # By adapter, the start of the gates of an extension; None: chosen by the loss.
        self._starts: dict[str, float | None] = {}

    def _refuse_unsuitable(self, config: BaditConfig) -> None:
        if config.routing == "prompt" and self._is_encoder_decoder():
            raise BaditError(
                "routing: 'prompt' is for decoder-only models; use routing='token' for an "
                "encoder-decoder"
            )
        if config.key == "embedding":
            frozen_embedding(self.model)

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        RoutingContext.of(self.model).embedding_features = self._embedding_features()
        return super()._prepare_adapter_config(peft_config, model_config)

    def _embedding_features(self) -> int:
        """Returns the size of the input embeddings; 0 if the model has no table of them."""
        try:
            return frozen_embedding(self.model).embedding_dim
        except BaditError:
            return 0

    @torch.no_grad()
    def start_task(self, batches: TaskBatches) -> None:
        """Finds the clusters of prompts of new adapters with gates='clusters'.

        It runs a pass over 16 prompts per cluster, the same number of every task (at least one).
        All processes call it, before the model is wrapped or sharded; the clusters are those of
        rank 0, and with key='embedding' those of the prompts of all ranks. BaditError if a layer
        gets no prompts, if no row has a prompt because the labels begin at the first token, or if
        different prompts get the same gates in every layer.
        """
        if not isinstance(batches, Mapping):
            raise BaditError(
                "start_task: needs the batches of each task, such as {'all': dataloader}"
            )
        RoutingContext.of(self.model).freeze_others(self.model)
        batches = {task: _Replayed(of_task) for task, of_task in batches.items()}
        # Once, because the statistics of a large vocabulary take seconds.
        keys = cache(partial(Keys, self.model))
        self._start_extensions(batches, keys)
        self._find_clusters_of_adapters(batches, keys)
        self._store_clusters(batches, keys)

    def _find_clusters_of_adapters(self, batches: TaskBatches, keys: Callable[[], Keys]) -> None:
        unclustered = RoutingContext.of(self.model).without_clusters()
        if not unclustered:
            return
        has_layer_keys = any(layer.badit_config[name].key == "layer" for layer, name in unclustered)
        if has_layer_keys and is_divided_by_zero3(self.model):
            raise BaditError(
                "start_task: DeepSpeed has divided the weights; load the model before you set up "
                "ZeRO-3"
            )
        adapters = {name for _, name in unclustered}
        clusters = max(layer.badit_config[name].num_clusters for layer, name in unclustered)
        tasks = max(1, len(batches))
        embedded_per_task = max(1, EMBEDDED_PER_CLUSTER * clusters // tasks)
        self._find_abilities(unclustered, batches, embedded_per_task, keys)
        unclustered = RoutingContext.of(self.model).without_clusters()
        if unclustered:
            read_per_task = max(1, READ_PER_CLUSTER * clusters // tasks)
            self._find_clusters(unclustered, batches, read_per_task)
        # Not for another adapter: the reference would get the present values of a trained one.
        if self._has_reference() and "default" in adapters:
            self._copy_to_reference()

    def _store_clusters(self, batches: TaskBatches, keys: Callable[[], Keys]) -> None:
        """Stores the clusters of new adapters that later tasks need (:meth:`add_tasks`)."""
        routing = RoutingContext.of(self.model)
        holders = [
            (name, holder)
            for name, holder in routing.extension_holders.items()
            if name in holder.badit_extensions and holder.badit_extensions[name].features
        ]
        missing = [
            (name, holder)
            for name, holder in holders
            if name in holder.running_adapters and not holder.badit_extensions[name].has_clusters(0)
        ]
        if not missing or is_divided_by_zero3(self.model):
            return
        for name, holder in missing:
            prompts = EMBEDDED_PER_CLUSTER * holder.badit_config[name].num_clusters
            per_task = max(1, prompts // max(1, len(batches)))
            # The batches may draw from the random state of the training.
            with torch.random.fork_rng([]):
                examples = self._examples_by_task(batches, per_task)
            store_clusters(holder, name, keys(), examples)

    def _examples_by_task(self, batches: TaskBatches, per_task: int) -> dict[str, list[Example]]:
        """Returns the first examples of each task; none if the batches have no token ids.

        Adapters with a router are trained without their clusters too.
        """
        try:
            return {
                task: self._examples({task: of_task}, per_task) for task, of_task in batches.items()
            }
        except BaditError:
            return {}

    # Tasks that are added later

    def add_tasks(
        self,
        tasks: Sequence[str],
        *,
        rank: int = 32,
        clusters: int = 2,
        reused: int = 0,
        start: float | None = None,
        mixing: float | None = None,
    ) -> None:
        """Adds an expert and clusters for new tasks to the active adapter, and freezes the rest.

        Call it on a trained adapter. Then call :meth:`start_task` with the batches of the new
        tasks, and train. Prompts of earlier tasks have the same results as before, as long as no
        new centroid is nearer to them.

        Args:
            tasks: names of the new tasks, which are trained together.
            rank: rank of their expert.
            clusters: number of centroids of each task.
            reused: number of earlier experts that the tasks may use, with trained gates.
            start: start of these gates, relative to those that the prompts had before; None:
                that of 0, ½ and 1 with the lowest loss.
            mixing: temperature T with which all prompts mix the experts of their two nearest
                tasks, with the shares softmax(cosine / T); 0: only the nearest task; None: as
                before. Tasks that were trained together count as one. Training passes do not mix.

        Raises:
            BaditError: a name is in use, the adapter has no clusters for later tasks, its routing
            is by token, a layer has fewer features than the rank, or its gates scale the factors
            and not their change, so that experts cannot be mixed.
        """
        adapter = self._only_active_adapter()
        config = self.peft_config[adapter]
        layers = self._layers_of(adapter)
        self._refuse_unextendable(adapter)
        refuse_new_tasks(tasks, clusters)
        self.refuse_new_expert(rank, mixing)
        routing = RoutingContext.of(self.model)
        if adapter in routing.without_started_extension():
            raise BaditError(
                f"add_tasks: {', '.join(config.extensions[-1].tasks)} was added, but its clusters "
                "have not been found; call start_task with its batches first"
            )
        if is_divided_by_zero3(self.model):
            raise BaditError("add_tasks: DeepSpeed has divided the weights; use DDP")
        extension = Extension(
            list(tasks), rank, clusters * len(tasks), min(reused, config.num_gates)
        )
        config = extended_config(config, extension, mixing)
        for layer in layers:
            layer.extend(adapter, config)
        self.peft_config[adapter] = config
        routing.extension_in_training[adapter] = len(config.extensions)
        self._starts[adapter] = start
        self.set_adapter(adapter)
        routing.freeze_others(self.model)

    def _only_active_adapter(self) -> str:
        """Returns the active adapter, which is the one that later tasks are added to."""
        names = self.active_adapters
        if len(names) != 1:
            raise BaditError(
                f"later tasks need one active adapter, but {len(names)} are active; call "
                "set_adapter(NAME) first"
            )
        return names[0]

    def refuse_new_expert(self, rank: int, mixing: float | None) -> None:
        """Raises the errors of :meth:`add_tasks` for its options."""
        adapter = self._only_active_adapter()
        refuse_new_expert(self.peft_config[adapter], self._layers_of(adapter), rank, mixing)

    def train_extensions(self, numbers: Collection[int]) -> None:
        """Trains existing extensions of the active adapter (0: its own experts) on more prompts.

        Every prompt is trained where its nearest centroid is.
        """
        adapter = self._only_active_adapter()
        for layer in self._layers_of(adapter):
            layer.trained_extensions[adapter] = frozenset(numbers)
        routing = RoutingContext.of(self.model)
        routing.extension_in_training.pop(adapter, None)
        self.set_adapter(adapter)
        routing.freeze_others(self.model)

    def survey(self, batches: TaskBatches, *, threshold: float, clusters: int = 2) -> Survey:
        """Compares the prompts of new tasks with the clusters of the active adapter."""
        check("clusters", clusters, Count)
        adapter = self._only_active_adapter()
        self._refuse_unextendable(adapter)
        holder = RoutingContext.of(self.model).extension_holders[adapter]
        examples = self._prompts_of_tasks(batches, clusters)
        return survey(holder, adapter, Keys(self.model), examples, threshold, clusters)

    @property
    def has_clusters(self) -> bool:
        """Whether the active adapter has stored the clusters of its training's prompts."""
        adapter = self._only_active_adapter()
        holder = RoutingContext.of(self.model).extension_holders.get(adapter)
        return holder is not None and holder.badit_extensions[adapter].has_clusters(0)

    def likeness(self, batches: TaskBatches) -> dict[str, Likeness]:
        """Compares the prompts of tasks with the stored clusters of the training's prompts."""
        adapter = self._only_active_adapter()
        holder = RoutingContext.of(self.model).extension_holders[adapter]
        examples = self._prompts_of_tasks(batches, clusters=1)
        return likeness_by_task(holder, adapter, Keys(self.model), examples)

    def merge_tasks(self, batches: TaskBatches) -> None:
        """Trains the active adapter's existing experts of the prompts of new tasks further.

        All ranks have the same batches.
        """
        adapter = self._only_active_adapter()
        means = self._means_of_prompts(batches)
        # Of all prompts: a batch whose prompts all belong to frozen experts would have no gradient.
        numbers = self._extensions_of(means)
        config = self.peft_config[adapter]
        if 0 in numbers and config.gates != "clusters" and rank_and_size()[1] > 1:
            # Ranks whose rows all belong to extensions do not take part in the router's moments.
            raise BaditError(
                "extend.merge: with a router, tasks of the joint training are trained in one "
                "process only; launch it without several processes"
            )
        self.train_extensions(numbers)
        holder = RoutingContext.of(self.model).extension_holders[adapter]
        for task, means_SE in means.items():
            config = record_merged(holder, adapter, task, means_SE)
            for layer in self._layers_of(adapter):
                layer.badit_config[adapter] = config
            self.peft_config[adapter] = config

    def nearest_extensions(self, batches: TaskBatches) -> set[int]:
        """Returns the extensions (0: the adapter's own experts) of all prompts of batches."""
        return self._extensions_of(self._means_of_prompts(batches))

    def _extensions_of(self, means: Mapping[str, Tensor]) -> set[int]:
        """Returns the extensions of prompts with the mean embeddings (S, E) by task."""
        adapter = self._only_active_adapter()
        holder = RoutingContext.of(self.model).extension_holders[adapter]
        return set(nearest_extensions(holder, adapter, torch.cat([*means.values()])).tolist())

    def _means_of_prompts(self, batches: TaskBatches) -> dict[str, Tensor]:
        """Returns the mean embeddings (S, E) of all prompts of each task."""
        _refuse_no_tasks(batches)
        embedding = frozen_embedding(self.model)
        means = {}
        for task, task_batches in batches.items():
            of_task = [
                mean_embeddings(embedding, [*examples_in(tensors, mask_BT, segments)])
                for _, tensors, mask_BT, segments in self._first_prompts(task_batches, sys.maxsize)
            ]
            if not of_task:
                raise BaditError(f"task {task}: has no batches")
            means[task] = torch.cat(of_task)
        return means

    def changed_tasks(self, numbers: Collection[int]) -> list[str]:
        """Returns the tasks whose answers :meth:`train_extensions` would change."""
        adapter = self._only_active_adapter()
        return changed_tasks(self._layers_of(adapter), adapter, numbers)

    def _layers_of(self, adapter: str) -> list[BaditLinear]:
        return [layer for layer in self.expert_layers() if adapter in layer.badit_A]

    def _refuse_unextendable(self, adapter: str) -> None:
        """Raises BaditError if no task can be added to an adapter of this model."""
        refuse_unextendable(adapter, self._layers_of(adapter))
        if not predicts_next_token(self.model):
            raise BaditError(
                "tasks can be added to language models only: this model does not predict tokens"
            )

    def _prompts_of_tasks(self, batches: TaskBatches, clusters: int) -> dict[str, list[Example]]:
        _refuse_no_tasks(batches)
        examples = {}
        for task, of_task in batches.items():
            examples[task] = self._examples({task: of_task}, EMBEDDED_PER_CLUSTER * clusters)
            if not any(example.has_prompt for example in examples[task]):
                raise BaditError(f"task {task}: has no prompts, so it cannot have a cluster")
        return examples

    def _start_extensions(self, batches: TaskBatches, keys: Callable[[], Keys]) -> None:
        """Finds the clusters, directions and gates of new extensions."""
        routing = RoutingContext.of(self.model)
        for adapter in routing.without_started_extension():
            layers = self._layers_of(adapter)
            extension = self.peft_config[adapter].extensions[-1]
            refuse_other_batches(extension, batches)
            each = extension.clusters // len(extension.tasks)
            examples = self._prompts_of_tasks(batches, each)
            with self._evaluating():
                losses = partial(self._losses, batches)
                start_extension(layers, adapter, losses, self._starts.get(adapter))
                set_clusters(routing.extension_holders[adapter], adapter, keys(), examples)

    def _losses(self, batches: TaskBatches, with_gradients: bool) -> Iterator[Tensor]:
        """Yields the loss of the first training rows of each task, the same at every call.

        The sum over answer tokens, which does not depend on the division into batches.
        """
        rows = max(1, GRADIENT_ROWS // len(batches))
        for task_batches in batches.values():
            for batch, tensors, mask_BT, _ in self._first_prompts(task_batches, rows):
                if "labels" not in tensors:
                    raise BaditError("start_task: the batches of a new task need labels")
                inputs = self._inputs_of(batch, tensors, mask_BT)
                with torch.set_grad_enabled(with_gradients):
                    answer = answer_logits(self.model, inputs, tensors["labels"])
                    loss = F.cross_entropy(
                        answer.logits_LV.float(), answer.target_L, reduction="sum"
                    )
                yield loss

    def _find_abilities(
        self,
        unclustered: Sequence[Place],
        batches: TaskBatches,
        prompts: int,
        keys: Callable[[], Keys],
    ) -> None:
        """Finds the clusters, codes and groups of adapters with a key for the whole model."""
        layers = _by_adapter(unclustered, lambda config: config.key == "embedding")
        if not layers:
            return
        examples = self._examples(batches, prompts)
        _refuse_empty(examples)
        _refuse_without_prompts(examples)
        with self._evaluating():
            for name, of_adapter in layers.items():
                find_abilities(self.model, name, of_adapter, examples, keys())

    def _examples(self, batches: TaskBatches, per_task: int) -> list[Example]:
        """Returns the first examples of each task, the same on all ranks."""
        examples = []
        for task_batches in waiting([*batches.values()], "Reading prompts", "task"):
            of_task = [
                list(examples_in(tensors, mask_BT, segments))
                for _, tensors, mask_BT, segments in self._first_prompts(task_batches, per_task)
            ]
            examples += examples_of_ranks(of_task)[:per_task]
        return examples

    def _first_prompts(self, task_batches: Any, count: int) -> Iterator[_PromptBatch]:
        """Yields the batches with the first prompts of a task, cut to them, and their masks."""
        routing = RoutingContext.of(self.model)
        for batch in task_batches:
            tensors = self._first_rows(batch, count)
            mask_BT: Any  # not None: the shape of the batch is known
            mask_BT, segments = routing.describe(self.model, tensors).prompt
            yield batch, tensors, mask_BT, segments
            count -= len(mask_BT) if segments is None else segments.number
            if count <= 0:
                return

    def _find_clusters(
        self, unclustered: Sequence[Place], batches: TaskBatches, prompts_per_task: int
    ) -> None:
        """Finds the clusters of layers that have their own."""
        clusters = max(layer.badit_config[name].num_clusters for layer, name in unclustered)
        sample = self._sample(batches, prompts_per_task)
        _refuse_empty(sample.examples)
        # All layers are checked before the first one is changed, and on all ranks: a rank that
        # stopped alone would leave the others waiting.
        missing = [
            layer.name for layer, name in unclustered if f"{layer.name}.{name}" not in sample.means
        ]
        if any_of_all(bool(missing)):
            first = missing[0] if missing else "a layer of another process"
            raise BaditError(
                f"start_task: no batch reaches {first}; pass other batches, or use gates='mean_one'"
            )
        if clusters > 1:
            _refuse_without_prompts(sample.examples)
        distinct = [
            layer.cluster(name, torch.cat(sample.means.pop(f"{layer.name}.{name}")))
            for layer, name in waiting(unclustered, "Finding clusters of prompts", "layer")
        ]
        prompts = {tuple(example.prompt_ids.tolist()) for example in sample.examples}
        prompts_differ = any_of_all(len(prompts) > 1)
        if clusters > 1 and prompts_differ and not any_of_all(max(distinct) > 1):
            raise BaditError(
                f"start_task: {len(prompts)} different prompts are the same in every layer, "
                f"so they would get the same gates; check the model's weights, or {_PROMPT_FIX}"
            )
        self._find_layer_codes(unclustered, sample.examples)
        # Last, so that training is refused after an error.
        for layer, name in unclustered:
            layer.badit_batches[name].fill_(1)

    def _find_layer_codes(self, clustered: Sequence[Place], examples: list[Example]) -> None:
        """Finds the codes and groups of adapters with clusters of layers, unless random."""
        layers = _by_adapter(clustered, lambda config: config.codes != "random")
        if not layers:
            return
        examples = examples_of_ranks([[example] for example in examples])
        with self._evaluating():
            for name, of_adapter in layers.items():
                find_layer_codes(self.model, name, of_adapter, examples)

    def _sample(self, batches: TaskBatches, prompts_per_task: int) -> "_Sample":
        """Returns the first prompts of each task, as every layer reads them."""
        routing = RoutingContext.of(self.model)
        examples = []
        with self._evaluating(), routing.collecting_means() as means:
            for task_batches in waiting([*batches.values()], "Reading prompts", "task"):
                for prompts in self._first_prompts(task_batches, prompts_per_task):
                    batch, tensors, mask_BT, segments = prompts
                    # The logits of one position only, to save memory.
                    inputs = self._inputs_of({**batch, "logits_to_keep": 1}, tensors, mask_BT)
                    self.model(**inputs)
                    examples += examples_in(tensors, mask_BT, segments)
        return _Sample(means, examples)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Runs the model in evaluation mode and without compiling it."""
        # For each module, because train() would change those that the caller has put in eval mode.
        was_training = {module: module.training for module in self.modules()}
        # Without dropout, which would make the clusters random.
        self.eval()
        try:
            with torch.compiler.set_stance("force_eager"):
                yield
        finally:
            for module, training in was_training.items():
                module.training = training

    def _inputs_of(
        self, batch: Mapping[str, Any], tensors: Mapping[str, Tensor], mask_BT: Tensor
    ) -> dict[str, Any]:
        """Returns the base model's inputs for the first rows of a batch, as in training."""
        options = {**batch, **tensors, "use_cache": False}
        # Batches may have more columns, such as the tasks of badit's collator.
        accepted = {*inspect.signature(self.model.forward).parameters, *_PACKING}
        # The model gets no labels: neither to compute a loss nor to find the prompt by.
        accepted.discard("labels")
        inputs = {name: value for name, value in options.items() if name in accepted}
        return {**inputs, "prompt_mask": mask_BT}

    def _first_rows(self, batch: Any, rows: int) -> dict[str, Tensor]:
        """Returns a batch's tensors on the model's device, cut to the first rows."""
        device = next(self.model.parameters()).device
        items = batch.items() if isinstance(batch, Mapping) else ()
        tensors = {name: value.to(device) for name, value in items if isinstance(value, Tensor)}
        if getattr(tensors.get("input_ids"), "ndim", 0) != 2:
            raise BaditError(
                "start_task: a batch must be a dict of tensors, as in training; or use "
                "gates='mean_one'"
            )
        # Tensors of one dimension, such as cu_seq_lens_q of packed rows, have no rows.
        by_row = [name for name, tensor in tensors.items() if tensor.ndim > 1]
        if len({len(tensors[name]) for name in by_row}) == 1:
            tensors |= {name: tensors[name][:rows] for name in by_row}
        if "labels" not in tensors and "completion_mask" in tensors:  # as in TRL's preference data
            is_answer = tensors["completion_mask"].bool()
            tensors["labels"] = tensors["input_ids"].where(is_answer, IGNORED_LABEL)
        return tensors


def _by_adapter(
    places: Sequence[Place], is_meant: Callable[[BaditConfig], bool]
) -> dict[str, list[BaditLinear]]:
    """Returns the layers of each adapter whose configuration is meant."""
    layers = defaultdict(list)
    for layer, name in places:
        if is_meant(layer.badit_config[name]):
            layers[name].append(layer)
    return layers


class _Replayed:
    """Batches that every iteration reads alike, also those of an iterator or a shuffling loader."""

    def __init__(self, batches: Any) -> None:
        self._batches = batches
        self._remaining: Iterator[Any] | None = None
        self._read: list[Any] = []

    def __iter__(self) -> Iterator[Any]:
        yield from self._read
        if self._remaining is None:  # now, because a loader may draw from the random state
            self._remaining = iter(self._batches)
        for batch in self._remaining:
            self._read.append(batch)
            yield batch


class _Sample(NamedTuple):
    """Training prompts that the base model has read."""

    means: dict[str, list[Tensor]]  # by layer and adapter, x̄ (B, I) of each batch
    examples: list[Example]


def _refuse_no_tasks(batches: TaskBatches) -> None:
    if not batches:
        raise BaditError(
            "batches: there are none; pass those of each task, such as {TASK: batches}"
        )


def _refuse_empty(examples: Sequence[Example]) -> None:
    if not any_of_all(bool(examples)):
        raise BaditError(
            "start_task: there are no batches; an iterator that was read before has none left"
        )


def _refuse_without_prompts(examples: Sequence[Example]) -> None:
    if not any_of_all(any(example.has_prompt for example in examples)):
        raise BaditError(
            "start_task: the labels begin at the first token of every row, so no row has a "
            f"prompt; {_PROMPT_FIX}"
        )


def register(config_cls: Any, model_cls: Any) -> None:
    """Registers a method with PEFT as ``config_cls.method``, once.

    BaditError if another package has taken the name.
    """
    name = config_cls.method.lower()
    # PEFT refuses to register a name twice.
    registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type(config_cls.method))
    if registered is None:
        register_peft_method(
            name=name, config_cls=config_cls, model_cls=model_cls, prefix=model_cls.prefix
        )
    elif registered is not config_cls:
        raise BaditError(
            f"a PEFT method named {name!r} is already registered by {registered.__module__}; "
            "uninstall that package or this one"
        )

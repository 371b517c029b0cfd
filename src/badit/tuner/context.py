"""The routing context: it tells the adapted layers which positions of a pass are the prompt.

A layer receives hidden states, not the batch. Hooks on the base model therefore read the batch
before each forward pass (:mod:`badit.tuner.prompt` has the rules), and keep what the layers ask
for.

``generate`` may process the whole sequence again for every token, or add candidate tokens of the
answer. It is therefore wrapped, to record where the prompt ends.
"""

import inspect
import threading
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from badit.method.abilities import scores_of
from badit.method.routing import prompt_mean, segment_means
from badit.support.errors import BaditError
from badit.tuner.answers import predicts_next_token
from badit.tuner.prompt import (
    HELD,
    IGNORED_LABEL,
    Segments,
    attended_positions,
    before_first_label,
    cache_in,
    cached_length,
    packed_segments,
)

# What is read from a batch to find its prompt: small tensors, neither the embeddings nor the cache.
_OF_PROMPT = ("prompt_mask", "attention_mask", "labels", "position_ids", "cu_seq_lens_q")


@dataclass
class ForwardPass:
    """What the adapted layers need to know about one forward pass."""

    # Computes `prompt` when it is first read; nothing if the batch is not known.
    find_prompt: Callable[[], tuple[Tensor | None, Segments | None]] = lambda: (None, None)
    shape: torch.Size | None = None  # of the batch, (B, T)
    # By layer (or adapter), the gates stored on the pass's cache; None if this pass computes them.
    held: dict[str, Tensor] | None = None
    # By layer (or adapter), the gates that this pass computes, to be stored on its cache.
    fresh: dict[str, Tensor] = field(default_factory=dict)
    # The layers that this pass calls several times, whose gates are not stored.
    repeated: set[str] = field(default_factory=set)
    fills_cache: bool = True  # decoding may follow, so layers store their gates in `fresh`
    # What layers store for the next pass of a generation with the same cache; None: nothing.
    stored: dict[str, Any] | None = None
    # By adapter, the index (B) of each row's task.
    row_tasks: Mapping[str, Tensor] = field(default_factory=dict)
    # Whether gradients are enabled at the start; gradient checkpointing may run layers without
    # them.
    begun_with_gradients: bool = field(default_factory=torch.is_grad_enabled)
    # By layer, the moments that standardised its prompts, for recomputation by checkpointing.
    moments: dict[str, Tensor] = field(default_factory=dict)
    # The mean token embedding (S, E) of every prompt, if an adapter has a key; and, by adapter, the
    # clusters (S) of these prompts.
    mean_embeddings_SE: Tensor | None = None
    embedding: Any = None  # the frozen module that they are outputs of
    clusters: dict[str, Tensor] = field(default_factory=dict)
    # By adapter with later tasks, the division of the rows by extension.
    parts: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def prompt(self) -> tuple[Tensor | None, Segments | None]:
        """The prompt mask (B, T) and the segments of packed rows.

        Without a mask, a layer's whole input is prompt.
        """
        return self.find_prompt()

    @property
    def prompt_mask_BT(self) -> Tensor | None:
        """The prompt mask for methods with one set of gates per row; BaditError for packed rows."""
        mask_BT, segments = self.prompt
        if segments is not None:
            raise BaditError(
                "a packed batch holds several prompts in one row, but this method reads one; set "
                "packing=False and padding_free=False"
            )
        return mask_BT


@dataclass
class Generation:
    """A running ``generate``; without values, none is running."""

    thread: int | None = None
    prompt_length: int | None = None
    # The gates on the cache, and what layers store as long as the cache has these gates.
    held: dict[str, Tensor] | None = None
    stored: dict[str, Any] | None = None


class RoutingContext:
    """The hooks on one base model and its current forward pass, shared by its adapted layers."""

    def __init__(self) -> None:
        self._running: ForwardPass | None = None
        # Whose layers gradient checkpointing recomputes in the backward pass, after its end.
        self._last_training_pass: ForwardPass | None = None
        self._generation = Generation()
        self._looked_at_labels = False
        self._warned: set[str] = set()
        # Layers that may need the prompt mask, which must be computed before a compiled layer runs.
        self.mask_readers: list[Any] = []
        # Layers and adapters that may have no clusters of prompts.
        self.unclustered: list[tuple[Any, str]] = []
        # By adapter, the layer that has the adapter's key.
        self.key_holders: dict[str, Any] = {}
        self.embedding_features = 0  # 0 if the embeddings are not known
        # Adapters whose layers ask for the mean embeddings of prompts.
        self.keyed: set[str] = set()
        # By adapter, the layer that has the clusters of later tasks, and the extension of all
        # prompts in training passes.
        self.extension_holders: dict[str, Any] = {}
        self.extension_in_training: dict[str, int] = {}
        # Adapters whose last extension may have no clusters yet.
        self.unstarted: set[str] = set()
        # Whether PEFT may have made parameters outside of extensions trainable.
        self.may_train_others = False
        # The moments of the vocabulary's embeddings, once prompts of several tasks are mixed.
        self.key_moments: tuple[Tensor, Tensor] | None = None
        self.row_tasks: Mapping[str, Tensor] = {}  # of the next forward passes
        # While they are collected: by layer, x̄ (B, I) of each batch.
        self.prompt_means: dict[str, list[Tensor]] | None = None
        self.hooks: list[Any] = []
        self._embedding_hooks: list[Any] = []  # of the running pass
        self._generate: Callable[..., Any] | None = None  # the model's own attribute, if it had one

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """Returns the model's context; the first call creates it and adds its hooks."""
        context = model.__dict__.get("_badit_routing")
        if context is None:
            context = cls()
            model.__dict__["_badit_routing"] = context
            context._attach(model)
        return context

    def _attach(self, model: Any) -> None:
        self.hooks = [
            model.register_forward_pre_hook(self._enter, with_kwargs=True),
            model.register_forward_hook(self._leave, with_kwargs=True, always_call=True),
        ]
        decoder = getattr(model, "get_decoder", lambda: None)()
        if decoder is not None and decoder is not model:
            self.hooks.append(decoder.register_forward_pre_hook(self._refuse_alone))
        if hasattr(model, "generate"):
            self._generate = model.__dict__.get("generate")
            # Not a closure: a deep or pickled copy of the model binds it to the copy.
            model.__dict__["generate"] = partial(self.generate, model)

    def holds_key(self, layer: Any, adapter: str) -> bool:
        """Returns whether a layer has the key of an adapter: the first layer with this adapter."""
        return _holds(self.key_holders, layer, adapter, "badit_key")

    def holds_extensions(self, layer: Any, adapter: str) -> bool:
        """Returns whether a layer has the clusters of later tasks: the first with this adapter."""
        return _holds(self.extension_holders, layer, adapter, "badit_extensions")

    def begin_adapter(self, model: nn.Module, adapter: str) -> None:
        """Forgets what an earlier adapter of this name, or one that failed, has left behind.

        A layer whose creation failed or was interrupted is no module of the model.
        """
        modules = set(model.modules())
        self.mask_readers = [layer for layer in self.mask_readers if layer in modules]
        self.unclustered = [place for place in self.unclustered if place[0] in modules]
        for holders in (self.key_holders, self.extension_holders):
            if holders.get(adapter) not in modules:
                holders.pop(adapter, None)
        self.extension_in_training.pop(adapter, None)
        self.unstarted.discard(adapter)

    def detach(self, model: nn.Module) -> None:
        """Removes the hooks from a model whose adapters are unloaded."""
        for hook in self.hooks:
            hook.remove()
        model.__dict__.pop("_badit_routing", None)
        model.__dict__.pop("generate", None)
        if self._generate is not None:
            model.__dict__["generate"] = self._generate

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out of copies of the model what belongs to running passes."""
        no_passes: dict[str, Any] = {"_running": None, "_last_training_pass": None}
        no_passes |= {"_generation": Generation(), "_embedding_hooks": []}
        return vars(self) | no_passes

    # What layers ask for

    def forward_pass(self) -> ForwardPass:
        """Returns the calling layer's forward pass.

        It is an empty one if the layer was called outside of the base model.
        """
        forward_pass = self._last_training_pass if self.runs_again() else self._running
        return forward_pass or ForwardPass(row_tasks=self.row_tasks)

    def clusters(self, adapter: str) -> Tensor:
        """Returns the cluster (S) of every prompt of the calling layer's forward pass."""
        forward_pass = self.forward_pass()
        if adapter not in forward_pass.clusters:
            means_SE = forward_pass.mean_embeddings_SE
            if means_SE is None:
                raise BaditError(
                    "key='embedding': the prompt's embeddings are not known; call the whole model "
                    "with input_ids"
                )
            holder = self.key_holders[adapter]
            scores_SC = scores_of(
                means_SE, holder.badit_key[adapter], holder.badit_key_offset[adapter]
            )
            forward_pass.clusters[adapter] = scores_SC.argmax(dim=1)
        return forward_pass.clusters[adapter]

    def runs_again(self) -> bool:
        """Returns whether gradient checkpointing is recomputing the calling layer."""
        return self._running is None and inside_backward()

    @contextmanager
    def collecting_means(self) -> Iterator[dict[str, list[Tensor]]]:
        """Collects the means x̄ (B, I) of the prompts of each pass, by layer and adapter."""
        self.prompt_means = defaultdict(list)
        try:
            yield self.prompt_means
        finally:
            self.prompt_means = None

    def without_clusters(self) -> list[tuple[Any, str]]:
        """Returns the running layers and adapters without clusters of prompts.

        It looks at each only until it has clusters, because looking waits for the device.
        """
        remaining, missing = [], []
        for layer, adapter in dict.fromkeys(self.unclustered):
            if adapter not in layer.badit_codes:  # the adapter was deleted
                continue
            is_running = adapter in layer.running_adapters
            if is_running and layer.is_clustered(adapter):
                continue
            remaining.append((layer, adapter))
            if is_running:
                missing.append((layer, adapter))
        self.unclustered = remaining
        return missing

    def without_started_extension(self) -> list[str]:
        """Returns the running adapters whose last extension has no clusters of prompts yet.

        It looks at each only until it has clusters, because looking waits for the device.
        """
        missing = []
        for adapter in sorted(self.unstarted):
            holder = self.extension_holders.get(adapter)
            if holder is None or adapter not in holder.badit_extensions:  # the adapter was deleted
                self.unstarted.discard(adapter)
                continue
            number = len(holder.badit_config[adapter].extensions)
            if holder.badit_extensions[adapter].needs_clusters(number):
                if adapter in holder.running_adapters:
                    missing.append(adapter)
            else:
                self.unstarted.discard(adapter)
        return missing

    def freeze_others(self, model: nn.Module) -> None:
        """Freezes what the training of an extension must not change: biases, modules_to_save.

        PEFT makes them trainable with the adapter, whenever it is loaded or activated.
        """
        if not self.may_train_others:
            return
        self.may_train_others = False
        trains_only_extensions = any(
            adapter in holder.running_adapters and holder.trains_only_extensions(adapter)
            for adapter, holder in self.extension_holders.items()
        )
        if not trains_only_extensions:
            return
        for name, parameter in model.named_parameters():
            if ".badit_" not in name:  # the layers have frozen their own
                parameter.requires_grad_(False)

    def is_extended_in_training(self) -> bool:
        """Returns whether a running adapter with extensions has trainable parameters."""
        return any(
            parameter.requires_grad
            for adapter, holder in self.extension_holders.items()
            if adapter in holder.running_adapters and holder.badit_config[adapter].extensions
            for parameter in (
                holder.badit_A[adapter],
                *holder.badit_extensions[adapter].parameters(),
            )
        )

    # The hooks

    def _enter(
        self, model: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        if getattr(model, "_is_replica", False):
            raise BaditError(
                "nn.DataParallel: its threads would share one routing context; start with "
                "accelerate launch, or set CUDA_VISIBLE_DEVICES to one GPU"
            )
        batch = kwargs
        if args:
            names = inspect.signature(model.forward).parameters
            batch = {**dict(zip(names, args, strict=False)), **kwargs}
        self._running = self.describe(model, batch)
        kwargs.pop("prompt_mask", None)
        self._running.row_tasks = self.row_tasks
        if torch.is_grad_enabled():
            self._last_training_pass = self._running
            self._refuse_training_without_clusters()
            self.freeze_others(model)
        if self._running.held is None and self._reads_prompt():
            _ = self._running.prompt  # a cached property: computed here
            if self.keyed:
                # Only for this pass: PEFT may replace the module by a trained copy, with its hooks.
                embedding: Any = model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
                hook = embedding.register_forward_hook(self._read_embeddings)
                self._embedding_hooks.append(hook)
        return args, kwargs

    @torch.no_grad()
    def _read_embeddings(self, embedding: Any, args: tuple, output: Tensor) -> None:
        running = self._running
        if running is None or running.shape != output.shape[:2]:
            return
        # PEFT trains a copy of the embedding, if it does; the key reads the frozen one.
        frozen = getattr(embedding, "original_module", None)
        embedded_BTE = output if frozen is None else frozen(*args)
        running.embedding = embedding if frozen is None else frozen
        running.mean_embeddings_SE = _mean_embeddings(embedded_BTE, *running.prompt)

    def _leave(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        running, self._running = self._running, None
        while self._embedding_hooks:
            self._embedding_hooks.pop().remove()
        if running is None:
            return
        if torch.is_grad_enabled():
            self._recall_in_backward(running, output)
            self._refuse_without_gradient(model, output)
        cache = cache_in(kwargs)
        if cache is None:
            cache = _cache_of_output(output)
        fresh = {key: kept for key, kept in running.fresh.items() if key not in running.repeated}
        if fresh and cache is not None and not isinstance(cache, tuple):
            setattr(cache, HELD, fresh)
        elif running.held is None and hasattr(cache, HELD):  # filled again, without the adapter
            delattr(cache, HELD)

    def _recall_in_backward(self, running: ForwardPass, output: Any) -> None:
        """Makes a pass the last one when a backward pass enters its outputs.

        Several forward passes may precede one backward pass, which enters the latest first.
        """

        def recall(gradient: Tensor) -> None:
            self._last_training_pass = running

        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(recall)

    def _refuse_training_without_clusters(self) -> None:
        if self.unclustered and any(layer.training for layer, _ in self.without_clusters()):
            raise BaditError(
                "gates='clusters': the prompts have no clusters yet; before trainer.train(), call "
                "badit.prepare(trainer), or in your own loop hooks_of(model).start_task({'all': "
                "batches}) with the PeftModel; or use gates='mean_one'"
            )
        for adapter in self.without_started_extension():
            holder = self.extension_holders[adapter]
            if holder.training:
                tasks = ", ".join(holder.badit_config[adapter].extensions[-1].tasks)
                raise BaditError(
                    f"{tasks}: was added, but its prompts have no clusters yet; before the "
                    "training, call badit.prepare(trainer), or in your own loop "
                    "hooks_of(model).start_task({TASK: batches}) with the PeftModel"
                )

    def _refuse_without_gradient(self, model: nn.Module, output: Any) -> None:
        """Refuses a training batch whose prompts all belong to frozen experts."""
        if not model.training or not self.is_extended_in_training():
            return
        tensors = [tensor for tensor in tree_leaves(output) if isinstance(tensor, Tensor)]
        if tensors and not any(tensor.requires_grad for tensor in tensors):
            raise BaditError(
                "all prompts of the batch belong to tasks whose experts are frozen; to train them "
                "further, call hooks_of(model).merge_tasks({TASK: batches}) with the PeftModel, or "
                "set extend.merge"
            )

    def _refuse_alone(self, decoder: nn.Module, args: tuple) -> None:
        """Refuses a call of only the decoder, whose gates would depend on padding and answers."""
        if self._running is None and not inside_backward() and self._reads_prompt():
            raise BaditError(
                "the model's decoder was called by itself, so the prompt is not known; call the "
                "whole model, or use routing='token'"
            )

    def _reads_prompt(self) -> bool:
        return any(layer.reads_prompt() for layer in self.mask_readers)

    def generate(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls the model's own ``generate``; meanwhile, positions after its input are answer."""
        config = kwargs.get("generation_config") or model.generation_config
        guidance = kwargs.get("guidance_scale", getattr(config, "guidance_scale", None))
        if guidance not in (None, 1) and self._reads_prompt():
            raise BaditError(
                "guidance_scale: generates from an unconditional prompt too, which has no gates; "
                "leave it out, or use routing='token'"
            )
        outer = self._generation
        thread = threading.get_ident()
        if outer.thread not in (None, thread):
            raise BaditError(
                "generate: another thread uses this model, and the gates are kept per model; use a "
                "lock"
            )
        self._generation = Generation(thread, _input_length(args, kwargs), stored={})
        generate = self._generate or partial(type(model).generate, model)
        try:
            return generate(*args, **kwargs)
        finally:
            self._generation = outer

    # The prompt of a batch

    def describe(self, model: nn.Module, batch: Mapping[str, Any]) -> ForwardPass:
        """Returns what the layers need to know about a forward pass of a batch.

        ``batch`` has the model's keyword arguments.
        """
        tokens: Any = batch.get("input_ids")
        if tokens is None:
            tokens = batch.get("inputs_embeds")
        shape = None
        if isinstance(tokens, Tensor) and tokens.ndim >= 2:
            shape = tokens.shape[:2]
        cache = cache_in(batch)
        if batch.get("prompt_mask") is not None:
            tokens = batch["prompt_mask"]
            shape = tokens.shape
        elif type(cache).__name__ == "PagedAttentionCache" and self._reads_prompt():
            raise BaditError(
                "generate_batch: does not store a prompt's gates; call generate, or use "
                "routing='token'"
            )
        elif cached_length(cache):
            return self._describe_decoding(cache, shape)
        if shape is None:
            return ForwardPass()
        of_prompt = {name: batch.get(name) for name in _OF_PROMPT}
        return ForwardPass(
            partial(self._find_prompt, model, of_prompt, shape, tokens.device),
            shape,
            fills_cache=cache is not None or batch.get("use_cache") is not False,
        )

    def _describe_decoding(self, cache: Any, shape: torch.Size | None) -> ForwardPass:
        held = getattr(cache, HELD, {})
        generation = self._generation
        # During ``generate``, several positions are a part of its input, or candidate tokens.
        prompt_length = generation.prompt_length
        is_new_text = prompt_length is None or cached_length(cache) < prompt_length - 1
        if held and shape is not None and shape[1] > 1 and is_new_text:
            self._warn_once(
                "text is added to a filled cache, which keeps the gates of its first prompt",
                "for gates of the whole text, call cache.reset() and pass all of it",
            )
        if generation.stored is not None and generation.held is not held:
            generation.held = held
            generation.stored = {}
        return ForwardPass(shape=shape, held=held, stored=generation.stored)

    def _find_prompt(
        self, model: Any, batch: Mapping[str, Any], shape: torch.Size, device: torch.device
    ) -> tuple[Tensor, Segments | None]:
        segments = packed_segments(batch, shape, device)
        if batch["prompt_mask"] is not None:
            return batch["prompt_mask"].bool(), segments
        labels_BT = batch["labels"]
        if not predicts_next_token(model):
            labels_BT = None  # such as a classifier: the whole row is the prompt
        elif labels_BT is None and model.training and torch.is_grad_enabled():
            self._warn_once(
                "a language model is trained without labels, so the gates depend on all tokens",
                "pass the model labels (-100 on the prompt) or prompt_mask= (batch, positions)",
            )
        mask_BT = attended_positions(batch["attention_mask"], shape, device)
        if isinstance(labels_BT, Tensor) and labels_BT.shape == mask_BT.shape:
            prompt_BT = before_first_label(labels_BT, mask_BT, segments)
            if not self._looked_at_labels:  # once, because it waits for the device
                self._looked_at_labels = True
                self._warn_of_labels(labels_BT, prompt_BT, segments)
            return prompt_BT, segments
        prompt_length = self._generation.prompt_length
        if prompt_length is None:
            return mask_BT, segments
        length = mask_BT.shape[1]
        if length < prompt_length:
            raise BaditError(
                "the prompt comes in pieces, so that the gates would depend on the first one only "
                "(or generate lost its cache, as in transformers before 5.24 in training mode with "
                "gradient checkpointing: call model.eval() first); generate without "
                "prefill_chunk_size, or use routing='token'"
            )
        return mask_BT & (torch.arange(length, device=device) < prompt_length), None

    def _warn_of_labels(
        self, labels_BT: Tensor, prompt_BT: Tensor, segments: Segments | None
    ) -> None:
        """Warns if the labels do not separate the prompt from the answer."""
        segments = segments or Segments.rows(labels_BT)
        of_P = segments.of_BT.flatten()
        labelled_P = (labels_BT != IGNORED_LABEL).flatten()
        starts_P = labelled_P.clone()
        starts_P[1:] &= ~labelled_P[:-1] | (of_P[1:] != of_P[:-1])
        prompts_S = of_P[prompt_BT.flatten()].bincount(minlength=segments.number)
        answers_S = of_P[starts_P].bincount(minlength=segments.number)
        if int(prompts_S.masked_fill(answers_S == 0, 2).min()) <= 1:
            self._warn_once(
                "labels begin at the first token, so the gates depend on that token only",
                "set labels to -100 on the prompt (TRL: completion_only_loss or "
                "assistant_only_loss)",
            )
        elif int(answers_S.max()) > 1:
            self._warn_once(
                "a row has several answers, and all of them have the gates of the text before the "
                "first",
                "give each answer its own row (badit.data.answer_rows)",
            )

    def _warn_once(self, problem: str, fix: str) -> None:
        """Warns of a problem of the training or the generation, once per base model."""
        if problem not in self._warned:
            self._warned.add(problem)
            warnings.warn(f"{problem}; {fix}, or use routing='token'", stacklevel=2)


def _mean_embeddings(
    embedded_BTE: Tensor, mask_BT: Tensor | None, segments: Segments | None
) -> Tensor:
    """Returns the mean (S, E) of the embeddings of each row's or segment's prompt, in float32."""
    embedded_BTE = embedded_BTE.detach().float()
    if mask_BT is None:  # the whole input is the prompt
        return embedded_BTE.mean(dim=1)
    mask_BT = mask_BT.to(embedded_BTE.device)
    if segments is None:
        return prompt_mean(embedded_BTE, mask_BT)
    return segment_means(
        embedded_BTE, mask_BT, segments.of_BT.to(embedded_BTE.device), segments.number
    )


def inside_backward() -> bool:
    """Returns whether a backward pass is running, as when checkpointing recomputes a layer."""
    return torch._C._current_graph_task_id() != -1


def _cache_of_output(output: Any) -> Any:
    """Returns the cache in a model's output, or None; with use_cache=True the model creates one."""
    if isinstance(output, Mapping):
        return cache_in(output)
    if isinstance(output, tuple):  # return_dict=False
        return next((item for item in output if hasattr(item, "get_seq_length")), None)
    return None


def _input_length(args: tuple, kwargs: Mapping[str, Any]) -> int | None:
    """Returns the number of positions of the input of ``generate``."""
    inputs = (kwargs.get("inputs_embeds"), *args[:1], kwargs.get("input_ids"), kwargs.get("inputs"))
    lengths = [tensor.shape[1] for tensor in inputs if isinstance(tensor, Tensor)]
    return next(iter(lengths), None)


def _holds(holders: dict[str, Any], layer: Any, adapter: str, tensors: str) -> bool:
    """Returns whether a layer holds an adapter's tensors; the first layer that asks does."""
    holder = holders.get(adapter)
    if holder is None or adapter not in getattr(holder, tensors):
        holders[adapter] = layer
    return holders[adapter] is layer

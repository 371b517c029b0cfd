"""The routing context: it tells the adapted layers which positions of the current forward pass are the prompt.

A layer receives hidden states, not the batch. Hooks on the base model therefore read the batch's ``labels``,
``attention_mask`` and cache before each forward pass.

* Labels (training, scoring): the prompt is the part before the first label, also in a chat with several answers. With
  one row per answer (:func:`badit.data.answer_rows`), the prompts of training and generation are the same.
* No labels, no cache or an empty one (plain forward, prefill): every attended position is prompt.
* A filled cache (decoding): the gates were computed when it was filled. They are stored *on the cache object*, so
  generations can be interleaved, and a copied prompt cache keeps its gates.
* ``prompt_mask=`` passed to the model's forward: this mask takes precedence.
* Packed rows (position ids that restart at 0, or ``cu_seq_lens_q``): each segment is a prompt with its answer.

``generate`` may process the whole sequence again for every token, or add candidate tokens of the answer. It is
therefore wrapped, to record where the prompt ends.
"""

import inspect
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple, Self

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from badit.support.errors import BaditError

IGNORED_LABEL = -100
_HELD = "badit_gates"
_CACHE_NAMES = (
    "cache",
    "past_key_values",
    "cache_params",
)  # of releases of transformers 5; an output may have two


class Segments(NamedTuple):
    """The segments of packed rows, each a prompt with its answer: ``of_BT`` has their numbers, from 0 in the batch."""

    of_BT: torch.Tensor
    number: int


@dataclass
class ForwardPass:
    """What the adapted layers need to know about one forward pass."""

    # Computes `prompt` when it is first read; nothing if the batch is not known.
    find_prompt: Callable[[], tuple[torch.Tensor | None, Segments | None]] = lambda: (None, None)
    # By layer (or adapter), the gates stored on the pass's cache; None if this pass computes them from the prompt.
    held: dict[str, torch.Tensor] | None = None
    shape: torch.Size | None = None  # of the batch, (B, T)
    fills_cache: bool = True  # decoding may follow, so layers store their gates in `fresh`
    stored: dict[str, Any] | None = (
        None  # what layers store for the next pass of a generation with the same cache
    )
    row_tasks: Mapping[str, torch.Tensor] = field(
        default_factory=dict
    )  # by adapter, the index (B) of each row's task
    # Whether gradients are enabled at the start; gradient checkpointing may run the layers without them.
    begun_with_gradients: bool = field(default_factory=torch.is_grad_enabled)
    # By layer, the moments that standardised its prompts, for recomputation by gradient checkpointing.
    moments: dict[str, torch.Tensor] = field(default_factory=dict)
    fresh: dict[str, torch.Tensor] = field(default_factory=dict)

    @cached_property
    def prompt(self) -> tuple[torch.Tensor | None, Segments | None]:
        """The prompt mask (B, T) and the segments of packed rows. Without a mask, a layer's whole input is prompt."""
        return self.find_prompt()

    @property
    def prompt_mask_BT(self) -> torch.Tensor | None:
        """The prompt mask for methods with one set of gates per row; BaditError for packed rows."""
        mask_BT, segments = self.prompt
        if segments is not None:
            fix = "set packing=False and padding_free=False"
            raise BaditError(
                f"a packed batch holds several prompts in one row, but this method reads one; {fix}"
            )
        return mask_BT


class RoutingContext:
    """The hooks on one base model and its current forward pass, shared by all of its adapted layers."""

    def __init__(self) -> None:
        self._running: ForwardPass | None = None
        # The pass whose layers gradient checkpointing recomputes in the backward pass, after the end of the pass.
        self._last_training_pass: ForwardPass | None = None
        self._generation_prompt_length: int | None = None
        self._thread: int | None = None  # in which ``generate`` runs
        # During ``generate``: the gates on the cache, and what layers store as long as the cache has these gates.
        self._stored: tuple[dict[str, torch.Tensor], dict[str, Any]] | None = None
        self._looked_at_labels = False
        self._warned: set[str] = set()
        # Each returns whether its layer needs the prompt mask, which must be computed before a compiled layer runs.
        self.mask_readers: list[Callable[[], bool]] = []
        self.unclustered: list[
            tuple[Any, str]
        ] = []  # layers and adapters that may have no clusters of prompts
        self.hooks: list[Any] = []
        self._generate: Callable[..., Any] | None = None  # the model's own attribute, if it had one
        self.row_tasks: Mapping[str, torch.Tensor] = {}  # of the next forward passes
        self.prompt_means: dict[str, list[torch.Tensor]] | None = (
            None  # while they are collected: by layer, x̄ (B, I)
        )

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """Returns the model's context; the first call creates it and adds its hooks."""
        context = model.__dict__.get("_badit_routing")
        if context is None:
            context = model.__dict__["_badit_routing"] = cls()
            context.hooks = [
                model.register_forward_pre_hook(context._enter, with_kwargs=True),
                model.register_forward_hook(context._leave, with_kwargs=True, always_call=True),
            ]
            decoder = getattr(model, "get_decoder", lambda: None)()
            if decoder is not None and decoder is not model:
                context.hooks.append(decoder.register_forward_pre_hook(context._refuse_alone))
            if hasattr(model, "generate"):
                context._generate = model.__dict__.get("generate")
                # Not a closure: a deep or pickled copy of the model binds it to the copy.
                model.__dict__["generate"] = partial(context.generate, model)
        return context

    def __getstate__(self) -> dict[str, Any]:
        own = (
            "_running",
            "_last_training_pass",
            "_stored",
            "_thread",
        )  # not of copies of the model
        return vars(self) | dict.fromkeys(own)

    def detach(self, model: nn.Module) -> None:
        """Removes the hooks from a model whose adapters are unloaded."""
        for hook in self.hooks:
            hook.remove()
        model.__dict__.pop("_badit_routing", None)
        model.__dict__.pop("generate", None)
        if self._generate is not None:
            model.__dict__["generate"] = self._generate

    def generate(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls the model's own ``generate``; meanwhile, positions after the end of the input are answer."""
        config = kwargs.get("generation_config") or model.generation_config
        scale = kwargs.get("guidance_scale", getattr(config, "guidance_scale", None))
        if scale not in (None, 1) and self._reads_prompt():
            fix = "leave it out, or use routing='token'"
            raise BaditError(
                f"guidance_scale: generates from an unconditional prompt too, which has no gates; {fix}"
            )
        own = self._generate or partial(type(model).generate, model)
        given = (
            kwargs.get("inputs_embeds"),
            *args[:1],
            kwargs.get("input_ids"),
            kwargs.get("inputs"),
        )
        lengths = [value.shape[1] for value in given if isinstance(value, torch.Tensor)]
        outer, thread = (
            (self._generation_prompt_length, self._stored, self._thread),
            threading.get_ident(),
        )
        if self._thread not in (None, thread):
            raise BaditError(
                "generate: another thread uses this model, and the gates are kept per model; use a lock"
            )
        self._generation_prompt_length, self._stored, self._thread = (
            next(iter(lengths), None),
            ({}, {}),
            thread,
        )
        try:
            return own(*args, **kwargs)
        finally:
            self._generation_prompt_length, self._stored, self._thread = outer

    def forward_pass(self) -> ForwardPass:
        """Returns the calling layer's forward pass; an empty one if the layer was called outside of the base model."""
        known = self._last_training_pass if self.runs_again() else self._running
        return ForwardPass(row_tasks=self.row_tasks) if known is None else known

    def runs_again(self) -> bool:
        """Returns whether gradient checkpointing is recomputing the calling layer in the backward pass."""
        return self._running is None and inside_backward()

    def _reads_prompt(self) -> bool:
        return any(reads() for reads in self.mask_readers)

    def warn_once(self, problem: str, fix: str) -> None:
        """Warns of a problem of the training or the generation, once per base model."""
        if problem not in self._warned:
            self._warned.add(problem)
            warnings.warn(f"{problem}; {fix}, or use routing='token'", stacklevel=2)

    def _refuse_alone(self, decoder: nn.Module, args: tuple) -> None:
        """Raises BaditError if the decoder is called by itself, since its gates would depend on padding and answers."""
        if self._running is None and not inside_backward() and self._reads_prompt():
            fix = "call the whole model, or use routing='token'"
            raise BaditError(
                f"the model's decoder was called by itself, so the prompt is not known; {fix}"
            )

    def _enter(
        self, model: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        if getattr(model, "_is_replica", False):
            fix = "start with accelerate launch, or set CUDA_VISIBLE_DEVICES to one GPU"
            raise BaditError(f"nn.DataParallel: its threads would share one routing context; {fix}")
        names = inspect.signature(model.forward).parameters if args else ()
        self._running = self.describe(model, {**dict(zip(names, args, strict=False)), **kwargs})
        kwargs.pop("prompt_mask", None)
        self._running.row_tasks = self.row_tasks
        if torch.is_grad_enabled():
            self._last_training_pass = self._running
            if self.unclustered and any(layer.training for layer, _ in self.without_clusters()):
                fix = "before training, call hooks_of(model).start_task({'all': batches}) with the PeftModel"
                raise BaditError(
                    f"gates='clusters': the prompts have no clusters yet; {fix}, or use gates='mean_one'"
                )
        if self._running.held is None and self._reads_prompt():
            _ = self._running.prompt  # a cached property: computed here
        return args, kwargs

    def without_clusters(self) -> list[tuple[Any, str]]:
        """Returns the running layers and adapters without clusters; looks at each once, as it waits for the device."""
        present = [
            one for one in dict.fromkeys(self.unclustered) if one[1] in one[0].badit_codes
        ]  # else deleted
        running = [one for one in present if one[1] in one[0].running_adapters]
        # On the meta device there are only shapes, so no clusters are missing.
        clustered = {
            one for one in running if (count := one[0].badit_batches[one[1]]).is_meta or count
        }
        self.unclustered = [one for one in present if one not in clustered]
        return [one for one in running if one not in clustered]

    def _leave(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        running, self._running = self._running, None
        if running is None:
            return
        if torch.is_grad_enabled():

            def recall(gradient: torch.Tensor) -> None:
                self._last_training_pass = running

            # Several forward passes may precede one backward pass, which enters each at its outputs, the latest first.
            for tensor in tree_leaves(output):
                if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                    tensor.register_hook(recall)
        cache = _cache(kwargs)
        if cache is None and isinstance(
            output, Mapping
        ):  # use_cache=True without a cache: the model created one
            cache = _cache(output)
        elif cache is None and isinstance(output, tuple):  # return_dict=False
            cache = next((part for part in output if hasattr(part, "get_seq_length")), None)
        if running.fresh and cache is not None and not isinstance(cache, tuple):
            setattr(cache, _HELD, running.fresh)
        elif running.held is None and hasattr(cache, _HELD):  # filled again, without the adapter
            delattr(cache, _HELD)

    def describe(self, model: nn.Module, batch: Mapping[str, Any]) -> ForwardPass:
        """Returns what the layers need to know about a forward pass of a batch, the model's keyword arguments."""
        cache = _cache(batch)
        tokens: Any = (
            batch.get("inputs_embeds") if batch.get("input_ids") is None else batch["input_ids"]
        )
        shape = tokens.shape[:2] if isinstance(tokens, torch.Tensor) and tokens.ndim >= 2 else None
        if (mask_BT := batch.get("prompt_mask")) is not None:
            tokens, shape = mask_BT, mask_BT.shape
        elif type(cache).__name__ == "PagedAttentionCache" and self._reads_prompt():
            raise BaditError(
                "generate_batch: does not store a prompt's gates; call generate, or use routing='token'"
            )
        elif cached := _length(cache):
            held, length = getattr(cache, _HELD, {}), self._generation_prompt_length
            # During ``generate``, several positions are a part of the prompt or candidate tokens of the answer.
            if (
                held
                and shape is not None
                and shape[1] > 1
                and (length is None or cached < length - 1)
            ):
                fix = "for gates of the whole text, call cache.reset() and pass all of it"
                self.warn_once(
                    "text is added to a filled cache, which keeps the gates of its first prompt",
                    fix,
                )
            if self._stored is not None and self._stored[0] is not held:
                self._stored = held, {}
            return ForwardPass(held=held, shape=shape, stored=self._stored and self._stored[1])
        if shape is None:
            return ForwardPass()
        # Only small tensors are kept for later: neither the embeddings nor the cache.
        names = "prompt_mask", "attention_mask", "labels", "position_ids", "cu_seq_lens_q"
        find_prompt = partial(
            self._prompt, model, {name: batch.get(name) for name in names}, shape, tokens.device
        )
        fills_cache = cache is not None or batch.get("use_cache") is not False
        return ForwardPass(find_prompt, shape=shape, fills_cache=fills_cache)

    def _prompt(
        self, model: Any, batch: Any, shape: torch.Size, device: Any
    ) -> tuple[torch.Tensor, Segments | None]:
        segments = _segments(batch, shape, device)
        if batch["prompt_mask"] is not None:
            return batch["prompt_mask"].bool(), segments
        labels_BT, prompt_length = batch["labels"], self._generation_prompt_length
        if getattr(model, "get_output_embeddings", lambda: None)() is None:
            labels_BT = None  # a classifier: the whole row is the prompt
        elif labels_BT is None and model.training and torch.is_grad_enabled():
            fix = "pass the model labels (-100 on the prompt) or prompt_mask= (batch, positions)"
            self.warn_once(
                "a language model is trained without labels, so the gates depend on all tokens", fix
            )
        mask_BT = _attended(batch["attention_mask"], shape, device)
        if isinstance(labels_BT, torch.Tensor) and labels_BT.shape == mask_BT.shape:
            prompt_BT = before_first_label(labels_BT, mask_BT, segments)
            if not self._looked_at_labels:  # once, because it waits for the device
                self._looked_at_labels = True
                self._warn_of_labels(labels_BT, prompt_BT, segments)
            return prompt_BT, segments
        if prompt_length is None:
            return mask_BT, segments
        if mask_BT.shape[1] < prompt_length:
            raise BaditError(
                "the prompt comes in pieces, so that the gates would depend on the first one only (or generate lost "
                "its cache, as in transformers before 5.24 in training mode with gradient checkpointing: call "
                "model.eval() first); generate without prefill_chunk_size, or use routing='token'"
            )
        return mask_BT & (torch.arange(mask_BT.shape[1], device=device) < prompt_length), None

    def _warn_of_labels(
        self, labels_BT: torch.Tensor, prompt_BT: torch.Tensor, segments: Segments | None
    ) -> None:
        """Warns if the labels do not separate the prompt from the answer."""
        rows_BT = torch.arange(len(labels_BT), device=labels_BT.device)[:, None].expand(
            labels_BT.shape
        )
        of_P = (rows_BT if segments is None else segments.of_BT).flatten()
        labelled_P = (labels_BT != IGNORED_LABEL).flatten()
        starts_P = labelled_P.clone()
        starts_P[1:] &= ~labelled_P[:-1] | (of_P[1:] != of_P[:-1])
        prompts_S, answers_S = (
            of_P[each_P].bincount(minlength=1) for each_P in (prompt_BT.flatten(), starts_P)
        )
        if int(prompts_S.masked_fill(answers_S == 0, 2).min()) <= 1:
            fix = "set labels to -100 on the prompt (TRL: completion_only_loss or assistant_only_loss)"
            self.warn_once(
                "labels begin at the first token, so the gates depend on that token only", fix
            )
        elif int(answers_S.max()) > 1:
            problem = "a row has several answers, and all of them have the gates of the text before the first"
            self.warn_once(problem, "give each answer its own row (badit.data.answer_rows)")


def cache_of(output: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the cache in the output of a model or of ``generate``, as a keyword argument of the next call."""
    known = output.keys()  # transformers' outputs warn if an earlier name is looked up
    return dict(
        [
            (name, output[name])
            for name in _CACHE_NAMES
            if name in known and output[name] is not None
        ][:1]
    )


def select_rows(cache: Mapping[str, Any], rows_R: torch.Tensor) -> bool:
    """Keeps only these rows (indices) of a cache and its gates; returns False if the cache does not support it."""
    kept = _with_layers_of(cache, DynamicLayer, DynamicSlidingWindowLayer)
    if kept is None:
        return False
    kept.batch_select_indices(rows_R)
    if held := getattr(kept, _HELD, None):
        setattr(kept, _HELD, {name: gates[rows_R.to(gates.device)] for name, gates in held.items()})
    return True


def drop_last(cache: Mapping[str, Any], count: int) -> bool:
    """Removes the last positions of a cache, not its gates; returns False if the cache does not support it."""
    kept = _with_layers_of(cache, DynamicLayer)
    if kept is not None:
        kept.crop(-count)
    return kept is not None


def _with_layers_of(cache: Mapping[str, Any], *kinds: type) -> Any:
    """Returns the cache itself if it has only layers of these classes, else None. Subclasses may have other states."""
    kept = next(iter(cache.values()), None)
    return (
        kept
        if type(kept) is DynamicCache and all(type(layer) in kinds for layer in kept.layers)
        else None
    )


def inside_backward() -> bool:
    """Returns whether a backward pass is running, for example when gradient checkpointing recomputes a layer."""
    return torch._C._current_graph_task_id() != -1


def before_first_label(
    labels_BT: torch.Tensor, attended_BT: torch.Tensor, segments: Segments | None = None
) -> torch.Tensor:
    """Returns the prompt: attended positions before the first predicted label of each row, or of each segment."""
    # No position predicts the label of the first token.
    labelled_BT = (labels_BT != IGNORED_LABEL) & (attended_BT.cumsum(dim=1) > 1)
    if segments is None:
        return attended_BT.bool() & (labelled_BT.cumsum(dim=1) == 0)
    of_P, labelled_P = segments.of_BT.flatten(), labelled_BT.flatten()
    labelled_P[1:] &= of_P[1:] == of_P[:-1]
    labels_S = labelled_P.new_zeros(segments.number, dtype=torch.long).index_add(
        0, of_P, labelled_P.long()
    )
    before_S = labels_S.cumsum(dim=0) - labels_S
    # A segment without labels is padding, unless none has any.
    is_prompt_S = (labels_S > 0) | ~labelled_P.any()
    return attended_BT.bool() & (
        (labelled_P.cumsum(dim=0) == before_S[of_P]) & is_prompt_S[of_P]
    ).view_as(labels_BT)


def _cache(batch: Mapping[str, Any]) -> Any:
    return next(iter(cache_of(batch).values()), None)


def _length(cache: Any) -> int:
    """Returns a cache's length; 1 for a tuple, and for the filled cache of a recurrent model, which has no length."""
    if not hasattr(cache, "get_seq_length"):  # a tuple, None, or the paged cache of generate_batch
        return int(isinstance(cache, tuple))
    try:
        return int(cache.get_seq_length())
    except ValueError:
        return int(cache.has_previous_state())


def _attended(attention_mask: Any, shape: torch.Size, device: torch.device) -> torch.Tensor:
    """Returns the mask (B, T) of real tokens from a 2-D mask, a 4-D mask of a compilable cache, or None."""
    batch, length = shape
    if isinstance(attention_mask, Mapping):  # one mask per type of attention, with equal diagonals
        attention_mask = next(iter(attention_mask.values()))
    if attention_mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device=device)
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
        return attention_mask[:, :length].bool()  # a mask for a whole static cache is longer
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 4:
        # Position t attends to itself unless it is padding. A float mask adds 0 where attending is allowed.
        own_BT = attention_mask[:, 0].diagonal(dim1=1, dim2=2)[:, :length]
        own_BT = own_BT if own_BT.dtype == torch.bool else own_BT == 0
        return own_BT.expand(batch, -1)
    kind, fix = (
        type(attention_mask).__name__,
        "pass prompt_mask= (batch, positions), or use routing='token'",
    )
    raise BaditError(f"cannot find the prompt with an attention mask of type {kind}; {fix}")


def _segments(batch: Mapping[str, Any], shape: torch.Size, device: torch.device) -> Segments | None:
    """Returns the segments of packed rows, from position ids that restart at 0 or flash attention's ends; else None."""
    position_ids, ends = batch["position_ids"], batch["cu_seq_lens_q"]
    starts_BT = torch.zeros(shape, dtype=torch.bool, device=device)
    if isinstance(ends, torch.Tensor):
        starts_BT.view(-1)[ends[ends < starts_BT.numel()].to(device)] = True
    elif (
        batch["attention_mask"] is None
        and isinstance(position_ids, torch.Tensor)
        and position_ids.ndim == 2
    ):
        starts_BT |= (position_ids == 0).to(device)
    else:
        return None  # before anything waits for the device
    starts_BT[:, 0] = True
    if not bool(starts_BT[:, 1:].any()):
        return None
    of_P = starts_BT.flatten().cumsum(dim=0) - 1
    return Segments(of_P.view(shape), int(of_P[-1]) + 1)

"""What the adapted layers need to know of the forward pass they are in: which positions are the prompt.

A layer sees hidden states, not the batch, so a hook on the base model reads the batch's ``labels``, ``attention_mask``
and cache before each forward pass and keeps what follows here, where the layers look it up.

* Labels given (training, scoring): the prompt is what comes before the first label.
* No labels, no cache or an empty one (plain forward, prefill): every attended position is prompt.
* A filled cache (decoding): the gates were settled when it was filled. They are kept *on the cache object*, so that
  several generations may run in turns, and a copied prompt cache carries its routing along.
* ``prompt_mask=`` given to the model's forward: that mask, whatever else is there.

``generate(use_cache=False)`` runs the whole sequence again for every token; ``generating`` tells where its prompt ends.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from badit.errors import BaditError

_IGNORED_LABEL = -100
_HELD = "badit_gates"
_CACHE_NAMES = ("cache", "past_key_values")  # transformers renamed it within version 5


class ForwardPass:
    """One forward pass: its prompt mask (B, T), or the gates that its cache holds already, by layer."""

    def __init__(self, prompt_mask_BT: torch.Tensor | None, held: dict[str, torch.Tensor] | None = None) -> None:
        self.prompt_mask_BT = prompt_mask_BT
        self.held = held
        self.fresh: dict[str, torch.Tensor] = {}


class RoutingContext:
    """The hooks on one base model and the forward pass that is running in it. Shared by all of its adapted layers."""

    def __init__(self) -> None:
        self._running: ForwardPass | None = None
        # Gradient checkpointing runs layers again in the backward pass, after the forward pass has ended.
        self._differentiated: ForwardPass | None = None
        self._generation_prompt_length: int | None = None
        self._warned_of_labels = False
        self._hooks: list[Any] = []

    @classmethod
    def of(cls, model: nn.Module) -> RoutingContext:
        """The model's context; the first call makes it and hooks it in."""
        context = model.__dict__.get("_badit_routing")
        if context is None:
            context = cls()
            context._hooks = [
                model.register_forward_pre_hook(context._enter, with_kwargs=True),
                model.register_forward_hook(context._leave, with_kwargs=True, always_call=True),
            ]
            model.__dict__["_badit_routing"] = context
        return context

    def detach(self, model: nn.Module) -> None:
        """Removes the hooks, for a model whose adapters are unloaded."""
        for hook in self._hooks:
            hook.remove()
        model.__dict__.pop("_badit_routing", None)

    @contextmanager
    def generating(self, prompt_length: int) -> Iterator[None]:
        """While a generation runs: positions from ``prompt_length`` on are answer, also without a cache."""
        outer, self._generation_prompt_length = self._generation_prompt_length, prompt_length
        try:
            yield
        finally:
            self._generation_prompt_length = outer

    def forward_pass(self) -> ForwardPass | None:
        """The pass that the calling layer belongs to; None when the base model was entered by another door."""
        if self._running is not None:
            return self._running
        inside_backward = torch._C._current_graph_task_id() != -1
        return self._differentiated if inside_backward else None

    def _enter(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        prompt_mask_BT = kwargs.pop("prompt_mask", None)
        batch = {**dict(zip(_parameter_names(model), args, strict=False)), **kwargs}
        self._running = self._describe(batch, prompt_mask_BT)
        if torch.is_grad_enabled():
            self._differentiated = self._running
        return args, kwargs

    def _leave(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        running, self._running = self._running, None
        if running is None:
            return
        if torch.is_grad_enabled():
            self._recall_in_backward(running, output)
        if not running.fresh:
            return
        cache = _cache(kwargs)
        if cache is None:  # use_cache=True without a cache: the model made one
            cache = _cache(output) if isinstance(output, Mapping) else None
        if cache is not None and not isinstance(cache, tuple):
            setattr(cache, _HELD, running.fresh)

    def _recall_in_backward(self, forward_pass: ForwardPass, output: Any) -> None:
        """Several passes may precede one backward pass, which then enters each at its outputs, the latest first."""

        def recall(gradient: torch.Tensor) -> None:
            self._differentiated = forward_pass

        for value in output.values() if isinstance(output, Mapping) else (output,):
            if isinstance(value, torch.Tensor) and value.requires_grad:
                value.register_hook(recall)

    def _describe(self, batch: Mapping[str, Any], prompt_mask_BT: torch.Tensor | None) -> ForwardPass:
        if prompt_mask_BT is not None:
            return ForwardPass(prompt_mask_BT.bool())
        cache = _cache(batch)
        if cache is not None and _length(cache) > 0:
            return ForwardPass(None, held=getattr(cache, _HELD, {}))
        tokens = batch.get("input_ids")
        if tokens is None:
            tokens = batch.get("inputs_embeds")
        if not isinstance(tokens, torch.Tensor) or tokens.ndim < 2:
            return ForwardPass(None)  # no language model: a layer takes all of its input
        _refuse_packing(batch)
        mask_BT = _attended(batch.get("attention_mask"), tokens)
        labels_BT = batch.get("labels")
        if isinstance(labels_BT, torch.Tensor) and labels_BT.shape == mask_BT.shape:
            mask_BT = mask_BT & _before_first_label(labels_BT)
            self._warn_of_unmasked_prompt(labels_BT)
        elif self._generation_prompt_length is not None:
            position_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
            mask_BT = mask_BT & (position_T < self._generation_prompt_length)
        return ForwardPass(mask_BT)

    def _warn_of_unmasked_prompt(self, labels_BT: torch.Tensor) -> None:
        if self._warned_of_labels:
            return
        self._warned_of_labels = True  # looked at once, since it waits for the device
        if bool((labels_BT[:, :2] != _IGNORED_LABEL).all()):
            warnings.warn(
                "every position carries a label, so the prompt that BADIT routes on is the first token alone: "
                "set labels to -100 on the prompt (TRL: completion_only_loss or assistant_only_loss), "
                "or use routing='token'",
                stacklevel=2,
            )


def _parameter_names(model: nn.Module) -> list[str]:
    return list(inspect.signature(model.forward).parameters)


def _cache(batch: Mapping[str, Any]) -> Any:
    return next((batch[name] for name in _CACHE_NAMES if batch.get(name) is not None), None)


def _length(cache: Any) -> int:
    return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else len(cache)


def _before_first_label(labels_BT: torch.Tensor) -> torch.Tensor:
    """True up to the first predicted label. Position 0 predicts nothing, so its label does not count."""
    labelled_BT = labels_BT != _IGNORED_LABEL
    labelled_BT[:, 0] = False
    return labelled_BT.cumsum(dim=1) == 0


def _attended(attention_mask: Any, tokens: torch.Tensor) -> torch.Tensor:
    """The (B, T) mask of real tokens from a 2-D mask, from the 4-D masks of compilable caches, or from none."""
    batch, length = tokens.shape[:2]
    if isinstance(attention_mask, Mapping):  # one mask a kind of attention; their diagonals agree
        attention_mask = next(iter(attention_mask.values()))
    if attention_mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device=tokens.device)
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
        return attention_mask[:, -length:].bool()
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 4:
        # Position t attends to itself unless it is padding. A float mask adds 0 where attending is allowed.
        own_BT = attention_mask[:, 0].diagonal(dim1=1, dim2=2)[:, :length]
        own_BT = own_BT if own_BT.dtype == torch.bool else own_BT == 0
        return own_BT.expand(batch, -1)
    raise BaditError(
        f"cannot tell the prompt from an attention mask of type {type(attention_mask).__name__}; "
        "pass prompt_mask= (batch, positions) to the model, or use routing='token'"
    )


def _refuse_packing(batch: Mapping[str, Any]) -> None:
    position_ids = batch.get("position_ids")
    restarts = (
        batch.get("attention_mask") is None
        and isinstance(position_ids, torch.Tensor)
        and position_ids.ndim == 2
        and bool((position_ids[:, 1:] == 0).any())
    )
    if restarts or "cu_seq_lens_q" in batch:
        raise BaditError(
            "a packed batch holds several prompts in one row, which routing='prompt' cannot mix apart: "
            "set packing=False and padding_free=False, or use routing='token'"
        )

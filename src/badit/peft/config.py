"""Configuration of a BADIT adapter."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, get_args

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner

from badit.errors import BaditError
from badit.method.decomposition import SvdMethod
from badit.method.routing import GateKind
from badit.peft.registration import peft_type

# Older versions save a bias for the methods that they know by name only.
_PEFT_SAVES_BIASES = hasattr(BaseTuner, "_get_learnable_bias_state_dict")
_INIT_WEIGHTS = (True, False, "bad", "lora")
_ROUTING = ("prompt", "token")
_BASE_WEIGHT = ("delta", "folded")


@dataclass
class BaditConfig(PeftConfig):
    """BADIT: ``num_experts`` orthogonal LoRA experts of rank ``r`` in every target module, mixed by a router.

    Use it with ``get_peft_model`` as any PEFT configuration, and add ``badit.RegroupCallback()`` to the trainer for
    DOG. Defaults are the paper's published setting (arXiv 2605.05676: K 8, r 4, alpha 32, dropout 0.05, gate_proj).

    The paper's ablations: without BAD, ``init_weights="lora"``; without DOG, leave the callback out; the paper's own
    gates, ``gates="softmax"``.
    """

    num_experts: int = field(default=8, metadata={"help": "Number of experts, K (the paper's basic abilities)."})
    r: int = field(default=4, metadata={"help": "Rank of one expert; the adapter's total rank is num_experts × r."})
    lora_alpha: float = field(default=32, metadata={"help": "LoRA's alpha; the scaling is lora_alpha / r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout on the adapter's input, in training only."})
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Names of the modules to adapt, a regex, or 'all-linear'. "
            "Default: the MLP's gate projection (the paper's), or its first projection where there is no gate."
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names of modules, or a regex, to leave out of target_modules."}
    )
    routing: str = field(
        default="prompt",
        metadata={
            "help": "'prompt': one mixture a sequence, from the mean over its prompt, kept for the whole generation. "
            "'token': one mixture a position."
        },
    )
    gates: str = field(
        default="mean_one",
        metadata={
            "help": "'mean_one': K·softmax, all gates 1 at step 0. 'softmax': the paper's form, gates of sum 1, "
            "with which the adapted model does not start as the base model."
        },
    )
    top_k: int | None = field(
        default=None,
        metadata={
            "help": "Keep only the k largest gates (default: all). Below num_experts the model starts as the base "
            "model only with init_weights='lora', since the other experts' share of the weight is switched off."
        },
    )
    base_weight: str = field(
        default="delta",
        metadata={
            "help": "'delta': the base weight is left alone and the initial experts are subtracted in the forward "
            "pass. 'folded': the residual is written into the base weight, a little faster; one adapter only, "
            "and the weight is restored to the bit when the adapter is switched off or unloaded."
        },
    )
    init_weights: bool | str = field(
        default=True,
        metadata={
            "help": "True or 'bad': the top singular triples (BAD). 'lora': random A and zero B (w/o BAD). "
            "False: random A and B, for tests only: the adapted model is not the base model at step 0."
        },
    )
    svd_method: str = field(
        default="auto",
        metadata={"help": "'exact', 'randomized', or 'auto' (randomized where the weight is large)."},
    )
    svd_tolerance: float = field(
        default=1e-3, metadata={"help": "Largest relative residual ‖Wv − σu‖/σ of any triple of the randomized SVD."}
    )
    bias: str = field(default="none", metadata={"help": "Biases to train: 'none', 'all' or 'badit_only'."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to train whole and save with the adapter."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers to adapt (default: all)."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the layer list that layers_to_transform counts in."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type()
        self.target_modules = _as_set(self.target_modules)
        self.exclude_modules = _as_set(self.exclude_modules)
        for name in ("num_experts", "r"):
            if not _is_int(getattr(self, name)) or getattr(self, name) < 1:
                raise BaditError(f"{name} must be a whole number of at least 1, got {getattr(self, name)!r}")
        if not _is_number(self.lora_alpha) or not self.lora_alpha > 0:
            raise BaditError(f"lora_alpha must be a positive number, got {self.lora_alpha!r}")
        if not _is_number(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
            raise BaditError(f"lora_dropout must be at least 0 and below 1, got {self.lora_dropout!r}")
        if not _is_number(self.svd_tolerance) or not self.svd_tolerance > 0:
            raise BaditError(f"svd_tolerance must be a positive number, got {self.svd_tolerance!r}")
        if self.top_k is not None and (not _is_int(self.top_k) or not 1 <= self.top_k <= self.num_experts):
            raise BaditError(f"top_k must be between 1 and num_experts = {self.num_experts}, got {self.top_k!r}")
        _one_of("routing", self.routing, _ROUTING)
        _one_of("gates", self.gates, get_args(GateKind))
        _one_of("base_weight", self.base_weight, _BASE_WEIGHT)
        _one_of("init_weights", self.init_weights, _INIT_WEIGHTS)
        _one_of("svd_method", self.svd_method, get_args(SvdMethod))
        _one_of("bias", self.bias, ("none", "all", "badit_only"))
        if self.bias != "none" and not _PEFT_SAVES_BIASES:
            raise BaditError("bias must be 'none' with PEFT before 0.21, which would not save the trained biases")
        if self.base_weight == "folded" and not self.decomposes:
            raise BaditError("base_weight='folded' needs init_weights='bad': without BAD there is no residual to write")
        if isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise BaditError(f"{name} does not go with a target_modules regex; write the layers into the regex")
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise BaditError("layers_pattern needs layers_to_transform: it names the list that those indices count in")

    @property
    def decomposes(self) -> bool:
        """Whether the experts start as singular triples of the base weight (BAD)."""
        return self.init_weights is True or self.init_weights == "bad"

    @property
    def num_components(self) -> int:
        """N = K·r, the adapter's total rank."""
        return self.num_experts * self.r

    @property
    def scaling(self) -> float:
        """LoRA's s = lora_alpha / r."""
        return self.lora_alpha / self.r


def _as_set(names: Any) -> Any:
    return set(names) if isinstance(names, (list, tuple)) else names


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _one_of(name: str, value: Any, allowed: Iterable[Any]) -> None:
    # `1 == True`, so compare types too: init_weights=1 is a mistake, not a choice.
    if not any(value == choice and type(value) is type(choice) for choice in allowed):
        raise BaditError(f"{name} must be one of {', '.join(repr(choice) for choice in allowed)}, got {value!r}")

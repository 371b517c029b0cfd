"""The configuration of a BADIT adapter, and what it shares with the baselines': LoRA experts on every target module."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, get_args

import torch
from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTuner

from badit.errors import BaditError
from badit.method import expert_directions, expert_factors, top_singular_triples
from badit.method.decomposition import SvdMethod
from badit.method.routing import GateKind, RouterInput

# The version of what an adapter's files hold: the settings' names and defaults, the tensors' names and meanings. A
# change that older releases would read wrongly raises it. Every earlier one can be read: tests/tuner/formats has them.
FORMAT = 1
FORMAT_FIELD = "format_version"
# Settings that earlier releases have saved and that change nothing any more.
RETIRED_FIELDS = {"base_weight"}

# Older versions save a bias for the methods that they know by name only.
_PEFT_SAVES_BIASES = hasattr(BaseTuner, "_get_learnable_bias_state_dict")


def peft_type(name: str = "BADIT") -> PeftType:
    """The enum member ``PeftType.<name>``, made on the first call.

    PEFT registers members of its enum alone and offers no way to add one; nothing else here reaches into PEFT.
    """
    if name not in PeftType.__members__:
        member: Any = str.__new__(PeftType, name)
        member._name_ = name
        member._value_ = name
        member.__objclass__ = PeftType
        member._sort_order_ = len(PeftType.__members__)
        PeftType._member_names_.append(name)
        PeftType._member_map_[name] = member
        PeftType._value2member_map_[name] = member
        # EnumType refuses setattr on an enum class; `type` itself does not.
        type.__setattr__(PeftType, name, member)
    return PeftType[name]


def refuse_newer_format(version: Any) -> None:
    """Raises for a saved adapter that this release cannot know."""
    if not is_int(version) or version < 1:
        raise BaditError(f"{FORMAT_FIELD} must be a whole number of at least 1, got {version!r:.60}")
    if version > FORMAT:
        raise BaditError(
            f"{FORMAT_FIELD}: the adapter has format {version}, this badit reads formats up to {FORMAT}: "
            "pip install --upgrade badit"
        )


@dataclass
class ExpertConfig(PeftConfig):
    """``num_experts`` LoRA experts of rank ``r``, and where they go. A method names itself and adds its own fields.

    Shape suffixes: I/O = in/out features, N = components.
    """

    #: The method's name in PEFT's registry, in capitals.
    method: ClassVar[str]
    #: Whether every row's task must be named, by :meth:`badit.tuner.Hooks.rows_of`.
    needs_tasks: ClassVar[bool] = False
    #: Whether all experts take the same ``r`` rows of A, so that no component is one expert's alone.
    shares_A: ClassVar[bool] = False

    num_experts: int = field(default=8, metadata={"help": "Number of experts, K."})
    r: int = field(default=4, metadata={"help": "Rank of one expert; the adapter's total rank is num_experts × r."})
    lora_alpha: float = field(default=32, metadata={"help": "LoRA's alpha; the scaling is lora_alpha / r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout on the adapter's input, in training only."})
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Names of the modules to adapt, a regex, or 'all-linear'. "
            "Default: the MLP's gate projection (as in the paper), or its first projection where there is no gate."
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names of modules, or a regex, to leave out of target_modules."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to train whole and save with the adapter."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers to adapt (default: all)."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the layer list that layers_to_transform counts in."}
    )
    format_version: int = field(
        default=FORMAT, metadata={"help": "Version of the saved form, set by badit; a newer one is refused."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_newer_format(self.format_version)
        self.format_version = FORMAT  # an older one, once read, is saved as the present one
        self.peft_type = peft_type(self.method)
        self.target_modules = _as_set(self.target_modules)
        self.exclude_modules = _as_set(self.exclude_modules)
        for name in ("num_experts", "r"):
            if not is_int(getattr(self, name)) or getattr(self, name) < 1:
                raise BaditError(f"{name} must be a whole number of at least 1, got {getattr(self, name)!r}")
        if not is_number(self.lora_alpha) or not self.lora_alpha > 0:
            raise BaditError(f"lora_alpha must be a positive number, got {self.lora_alpha!r}")
        if not is_number(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
            raise BaditError(f"lora_dropout must be at least 0 and below 1, got {self.lora_dropout!r}")
        if isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise BaditError(f"{name} does not go with a target_modules regex; write the layers into the regex")
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise BaditError("layers_pattern needs layers_to_transform: it names the list that those indices count in")

    @property
    def scaling(self) -> float:
        """LoRA's s = lora_alpha / r."""
        return self.lora_alpha / self.r

    @property
    def num_components(self) -> int:
        """N = K·r, the adapter's total rank: the columns of B."""
        return self.num_experts * self.r

    @property
    def rows_of_A(self) -> int:
        """R: N, or r where the experts share their A."""
        return self.r if self.shares_A else self.num_components

    @property
    def has_fixed_gates(self) -> bool:
        """Whether no gate depends on the input, so that the adapter is one weight for all of it: a plain LoRA."""
        return self.num_experts == 1

    @property
    def subtracted_share(self) -> float:
        """The share of the initial experts, s·B0 A0, that the forward pass takes off; above 0, A0 and B0 are kept."""
        return 0.0

    def initial_factors(self, weight_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """A (N, I) and B (O, N) at step 0, from the base weight; None for LoRA's start: a random A and a zero B."""
        return None

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """PEFT's hook for a saved configuration: leaves out what earlier releases have saved and is no setting now."""
        return super().check_kwargs(**{key: value for key, value in kwargs.items() if key not in RETIRED_FIELDS})

    def _refuse_top_k_beyond_experts(self, top_k: Any) -> None:
        if not is_int(top_k) or not 1 <= top_k <= self.num_experts:
            raise BaditError(f"top_k must be between 1 and num_experts = {self.num_experts}, got {top_k!r}")


@dataclass
class BaditConfig(ExpertConfig):
    """BADIT: ``num_experts`` orthogonal LoRA experts of rank ``r`` in every target module, mixed by a router.

    Use it with ``get_peft_model`` as any PEFT configuration, and add ``badit.RegroupCallback()`` to the trainer for
    DOG. Defaults are the paper's published setting (arXiv 2605.05676: K 8, r 4, alpha 32, dropout 0.05, gate_proj).

    The paper's ablations: without BAD, ``init_weights="lora"``; without DOG, leave the callback out; the paper's own
    gates, ``gates="softmax"``.
    """

    method: ClassVar[str] = "BADIT"

    routing: str = field(
        default="prompt",
        metadata={
            "help": "'prompt': one mixture a sequence, from the mean over its prompt, kept for the whole generation. "
            "'token': one mixture a position."
        },
    )
    router_input: str = field(
        default="mean",
        metadata={
            "help": "What routing by prompt reads of the layer's input. 'mean': its mean over the prompt. "
            "'standardised': how that differs from the other prompts' of the training so far."
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
            "help": "Keep only the k largest gates (default: all). Below num_experts, with init_weights='bad', the "
            "model does not start as the base model, since the other experts' share of the weight is switched off."
        },
    )
    init_weights: bool | str = field(
        default=True,
        metadata={
            "help": "True or 'bad': the top singular triples (BAD). 'directions': their right singular vectors as A, "
            "at the scale of LoRA's, and zero B. 'lora': random A and zero B (w/o BAD)."
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

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.svd_tolerance) or not self.svd_tolerance > 0:
            raise BaditError(f"svd_tolerance must be a positive number, got {self.svd_tolerance!r}")
        if self.top_k is not None:
            self._refuse_top_k_beyond_experts(self.top_k)
        one_of("routing", self.routing, ("prompt", "token"))
        one_of("router_input", self.router_input, get_args(RouterInput))
        one_of("gates", self.gates, get_args(GateKind))
        one_of("init_weights", self.init_weights, (True, "bad", "directions", "lora"))
        one_of("svd_method", self.svd_method, get_args(SvdMethod))
        one_of("bias", self.bias, ("none", "all", "badit_only"))
        if self.router_input == "standardised" and self.routing != "prompt":
            raise BaditError("router_input='standardised' compares prompts: it needs routing='prompt'")
        if self.bias != "none" and not _PEFT_SAVES_BIASES:
            raise BaditError("bias must be 'none' with PEFT before 0.21, which would not save the trained biases")

    @property
    def subtracted_share(self) -> float:
        """All of it where the experts start as a part of the base weight (BAD)."""
        return 1.0 if self.init_weights in (True, "bad") else 0.0

    def initial_factors(self, weight_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """From the weight's top singular triples: as they are (BAD), or their directions alone."""
        if self.init_weights == "lora":
            return None
        triples = top_singular_triples(
            weight_OI,
            self.num_components,
            method=self.svd_method,  # pyright: ignore[reportArgumentType] (validated above)
            tolerance=self.svd_tolerance,
        )
        if self.init_weights == "directions":
            return expert_directions(triples)
        return expert_factors(triples, self.scaling)


def _as_set(names: Any) -> Any:
    return set(names) if isinstance(names, (list, tuple)) else names


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    # Compared, since an integer may be too large to be converted.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def one_of(name: str, value: Any, allowed: Iterable[Any]) -> None:
    """Refuses a value that is none of the field's choices."""
    # `1 == True`, so compare types too: init_weights=1 is a mistake, not a choice.
    if not any(value == choice and type(value) is type(choice) for choice in allowed):
        raise BaditError(f"{name} must be one of {', '.join(repr(choice) for choice in allowed)}, got {value!r}")

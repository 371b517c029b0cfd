"""What the configurations of BADIT and of its rivals share: several LoRA experts on every target module."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft import PeftConfig

from badit.errors import BaditError
from badit.tuner.registration import peft_type

# The version of what an adapter's files hold: the settings' names and defaults, the tensors' names and meanings. A
# change that older releases would read wrongly raises it. Every earlier one can be read: tests/tuner/formats has them.
FORMAT = 1
FORMAT_FIELD = "format_version"


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
    """``num_experts`` LoRA experts of rank ``r``, and where they go. A method names itself and adds its own fields."""

    method: ClassVar[str]  # its name in PEFT's registry, in capitals
    needs_tasks: ClassVar[bool] = False  # whether every row's task must be named

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
        """N, or fewer where the experts share their A."""
        return self.num_components

    @property
    def experts_own_components(self) -> bool:
        """Whether every component, a row of A and a column of B, is one expert's; not where they share rows of A."""
        return self.rows_of_A == self.num_components

    @property
    def routes_in_layer(self) -> bool:
        """Whether every layer has a router of its own, ``badit_router``."""
        return True

    @property
    def decomposes(self) -> bool:
        """Whether the experts start from singular triples of the base weight, and not with LoRA's random A."""
        return False

    @property
    def keeps_initial_factors(self) -> bool:
        """Whether A0 and B0 are kept: where the experts start as a part of the base weight, which has it already."""
        return self.decomposes

    @property
    def removed_share(self) -> float:
        """The share of the initial experts, s·B0 A0, that comes off the base weight, there or in the forward pass."""
        return 0.0

    @property
    def changes_base_weight(self) -> bool:
        """Whether the base layer's own weight is another one while the adapter is on."""
        return False

    @property
    def subtracted_share(self) -> float:
        """The share of the initial experts that the forward pass takes off again."""
        return self.removed_share

    @property
    def has_fixed_gates(self) -> bool:
        """Whether no gate depends on the input, so that the adapter is one weight for all of it: a plain LoRA."""
        return self.num_experts == 1

    def _refuse_top_k_beyond_experts(self, top_k: Any) -> None:
        if not is_int(top_k) or not 1 <= top_k <= self.num_experts:
            raise BaditError(f"top_k must be between 1 and num_experts = {self.num_experts}, got {top_k!r}")


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

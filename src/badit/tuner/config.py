"""Configuration of a BADIT adapter."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, get_args

from peft.tuners.tuners_utils import BaseTuner

from badit.errors import BaditError
from badit.method.decomposition import SvdMethod
from badit.method.routing import GateKind, RouterInput
from badit.tuner.base_config import ExpertConfig, is_number, one_of

# Older versions save a bias for the methods that they know by name only.
_PEFT_SAVES_BIASES = hasattr(BaseTuner, "_get_learnable_bias_state_dict")
_INIT_WEIGHTS = (True, False, "bad", "directions", "lora")
_ROUTING = ("prompt", "token")
_BASE_WEIGHT = ("delta", "folded")


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
            "help": "True or 'bad': the top singular triples (BAD). 'directions': their right singular vectors as A, "
            "at the scale of LoRA's, and zero B. 'lora': random A and zero B (w/o BAD). "
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

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.svd_tolerance) or not self.svd_tolerance > 0:
            raise BaditError(f"svd_tolerance must be a positive number, got {self.svd_tolerance!r}")
        if self.top_k is not None:
            self._refuse_top_k_beyond_experts(self.top_k)
        one_of("routing", self.routing, _ROUTING)
        one_of("router_input", self.router_input, get_args(RouterInput))
        one_of("gates", self.gates, get_args(GateKind))
        one_of("base_weight", self.base_weight, _BASE_WEIGHT)
        one_of("init_weights", self.init_weights, _INIT_WEIGHTS)
        one_of("svd_method", self.svd_method, get_args(SvdMethod))
        one_of("bias", self.bias, ("none", "all", "badit_only"))
        if self.router_input == "standardised" and self.routing != "prompt":
            raise BaditError("router_input='standardised' compares prompts: it needs routing='prompt'")
        if self.bias != "none" and not _PEFT_SAVES_BIASES:
            raise BaditError("bias must be 'none' with PEFT before 0.21, which would not save the trained biases")
        if self.base_weight == "folded" and not self.keeps_initial_factors:
            raise BaditError("base_weight='folded' needs init_weights='bad': else there is no residual to write")

    @property
    def decomposes(self) -> bool:
        """Whether the experts start from singular triples of the base weight."""
        return self.keeps_initial_factors or self.init_weights == "directions"

    @property
    def keeps_initial_factors(self) -> bool:
        """Whether the experts start as a part of the base weight (BAD)."""
        return self.init_weights is True or self.init_weights == "bad"

    @property
    def removed_share(self) -> float:
        """All of it."""
        return 1.0 if self.keeps_initial_factors else 0.0

    @property
    def subtracted_share(self) -> float:
        """All of it, unless the base weight is rid of it already."""
        return 0.0 if self.base_weight == "folded" else self.removed_share

    @property
    def changes_base_weight(self) -> bool:
        """When folded, where the residual takes its place."""
        return self.base_weight == "folded"

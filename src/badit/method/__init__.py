"""Decomposition (BAD), grouping (DOG), routing and orthogonal updates as pure functions on tensors.

BADIT: "Decomposing the Basic Abilities of Large Language Models: Mitigating Cross-Task Interference
in Multi-Task Instruct-Tuning" (ICML 2026, arXiv 2605.05676).
"""

from badit.method.decomposition import (
    SingularTriples,
    expert_directions,
    expert_factors,
    top_singular_triples,
)
from badit.method.grouping import (
    ExpertAngles,
    cosine_gram,
    expert_angles,
    group_components,
    grouping_objective,
)
from badit.method.orthogonal import Moments, inverse_root, no_moments, orthogonal_updates
from badit.method.routing import (
    batch_moments,
    expert_gates,
    prompt_mean,
    segment_means,
    standardised,
    updated_moments,
)

__all__ = [
    "ExpertAngles",
    "Moments",
    "SingularTriples",
    "batch_moments",
    "cosine_gram",
    "expert_angles",
    "expert_directions",
    "expert_factors",
    "expert_gates",
    "group_components",
    "grouping_objective",
    "inverse_root",
    "no_moments",
    "orthogonal_updates",
    "prompt_mean",
    "segment_means",
    "standardised",
    "top_singular_triples",
    "updated_moments",
]

"""Whether gates find the abilities that tasks are known to share, which only the built-in suite can tell.

Two measures, each against what it would be if abilities were handed to the tasks at random (abilities stay together as
sets, so that their sizes and overlaps are those of the suite):

* correlation, over pairs of tasks, of the gates' similarity with the Jaccard overlap of the tasks' abilities. Pairs
  that share a task are no independent measurements, so the p-value is that of Mantel's test (Mantel 1967, Cancer
  Research 27), which permutes tasks and not pairs;
* the share of tasks whose nearest neighbour by gates shares an ability with them.

Shape suffixes: T = tasks, R = permutations, E = pairs of tasks.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from badit.analysis.tables import TidyTable
from badit.errors import BaditError

PERMUTATIONS = 10_000


def ability_recovery(
    tasks: Sequence[str],
    similarity_TT: np.ndarray,
    abilities: Mapping[str, Collection[str]],
    *,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> TidyTable:
    """How well the similarity of the tasks' gates agrees with their abilities.

    Args:
        tasks: names, in the order of the similarity's rows.
        similarity_TT: symmetric; the diagonal is not read.
        abilities: what each task is known to need.
        permutations: of the tasks, from which chance and p-value are taken.
        seed: of the permutations.

    Raises:
        BaditError: a task without known abilities, or a similarity of another size.
    """
    if unknown := [task for task in tasks if not abilities.get(task)]:
        raise BaditError(f"abilities: task {unknown[0]} has none that are known; only the built-in suite's have")
    if similarity_TT.shape != (len(tasks), len(tasks)):
        raise BaditError(f"similarity: has shape {similarity_TT.shape} for {len(tasks)} tasks")
    overlap_TT = np.array([[_jaccard(abilities[a], abilities[b]) for b in tasks] for a in tasks])
    rng = np.random.default_rng(seed)
    orders_RT = rng.permuted(np.tile(np.arange(len(tasks)), (permutations, 1)), axis=1)
    measures = {
        "correlation": _correlations(similarity_TT, overlap_TT, orders_RT),
        "nearest_neighbour": _neighbour_shares(similarity_TT, overlap_TT, orders_RT),
    }
    return TidyTable(
        name="ability_recovery",
        about=(
            f"Whether tasks that are known to share abilities draw on the experts alike, over {len(tasks)} tasks. "
            f"Chance and p-value come from {permutations} permutations of the tasks (seed {seed}); the correlation's "
            "is Mantel's test."
        ),
        columns={
            "measure": (
                "correlation: of gate similarity with the Jaccard overlap of abilities, over pairs of tasks; "
                "nearest_neighbour: share of tasks whose nearest neighbour by gates shares an ability"
            ),
            "value": "the measure; null where it is not defined",
            "chance": "its mean over the permutations",
            "p_value": "share of permutations that reach the value (one-sided, the observed one counted as well)",
        },
        rows=[[measure, *_tested(values)] for measure, values in measures.items()],
    )


def _jaccard(one: Collection[str], two: Collection[str]) -> float:
    return len(set(one) & set(two)) / len(set(one) | set(two))


def _correlations(similarity_TT: np.ndarray, overlap_TT: np.ndarray, orders_RT: np.ndarray) -> np.ndarray:
    """Pearson's, over pairs: as observed, then for every permutation of the abilities (1 + R)."""
    first_E, second_E = np.triu_indices(len(similarity_TT), k=1)
    if len(first_E) < 2:
        return np.full(1 + len(orders_RT), np.nan)
    similarity_E = _standardised(similarity_TT[first_E, second_E])
    # Permuting tasks only reorders the pairs, so mean and deviation of the overlaps stay.
    standard_TT = np.zeros_like(overlap_TT)
    standard_TT[first_E, second_E] = _standardised(overlap_TT[first_E, second_E])
    standard_TT += standard_TT.T
    permuted_RE = standard_TT[orders_RT[:, first_E], orders_RT[:, second_E]]
    observed = standard_TT[first_E, second_E] @ similarity_E
    return np.concatenate([[observed], permuted_RE @ similarity_E])


def _standardised(values_E: np.ndarray) -> np.ndarray:
    """With mean 0 and sum of squares 1, so that a product of two is their correlation; NaN where all are equal."""
    centred_E = values_E - values_E.mean()
    norm = np.linalg.norm(centred_E)
    return centred_E / norm if norm > 1e-12 else np.full_like(values_E, np.nan)


def _neighbour_shares(similarity_TT: np.ndarray, overlap_TT: np.ndarray, orders_RT: np.ndarray) -> np.ndarray:
    """The share of tasks with a related nearest neighbour: as observed, then for every permutation (1 + R)."""
    tasks = len(similarity_TT)
    if tasks < 2 or not np.isfinite(similarity_TT[~np.eye(tasks, dtype=bool)]).all():
        return np.full(1 + len(orders_RT), np.nan)
    others_TT = similarity_TT.copy()
    np.fill_diagonal(others_TT, -np.inf)
    nearest_T = others_TT.argmax(axis=1)
    related_TT = overlap_TT > 0
    observed = related_TT[np.arange(tasks), nearest_T].mean()
    return np.concatenate([[observed], related_TT[orders_RT, orders_RT[:, nearest_T]].mean(axis=1)])


def _tested(values: np.ndarray) -> tuple[float | None, float | None, float | None]:
    """Value, chance and p-value; equal values may differ by rounding."""
    observed, permuted_R = values[0], values[1:]
    if not np.isfinite(values).all():
        return None, None, None
    reached = int((permuted_R >= observed - 1e-9).sum())
    return float(observed), float(permuted_R.mean()), (1 + reached) / (1 + len(permuted_R))

"""The order of tasks in matrices: similar tasks are next to each other."""

# pandas' type stubs declare every selection as a frame, a series or a scalar.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false

from collections.abc import Sequence

import numpy as np
import pandas as pd

from badit.analysis.verdict import of_shown_parameters

# Tables with pairs of tasks and their column of similarities, and the tables that are shown as
# matrices in this order.
_ORDERED = {
    ("gradient_overall", "cosine"): ["gradient_cosines"],
    ("coactivation_pairs", "overlap"): ["coactivation_pairs"],
    ("gate_similarity", "similarity"): ["gate_similarity", "gates", "clusters", "expert_losses"],
}
_TASK_COLUMNS = ["task", "task_a", "task_b"]


def order_tasks(frames_of_sources: Sequence[dict[str, pd.DataFrame]]) -> None:
    """Makes the tasks of matrices categories, in the order of the first source's similarities."""
    for (similarities, column), matrices in _ORDERED.items():
        order: list[str] = []
        for frames in frames_of_sources:
            if similarities in frames:
                order = by_similarity(frames[similarities], column)
                break
        for frames in frames_of_sources:
            for name in matrices:
                if name in frames:
                    frames[name] = _in_order(frames[name], order)


def _in_order(frame: pd.DataFrame, order: list[str]) -> pd.DataFrame:
    columns = [column for column in _TASK_COLUMNS if column in frame]
    tasks = list(dict.fromkeys(task for column in columns for task in frame[column]))
    tasks.sort(key=[*order, *tasks].index)
    return frame.assign(**{column: pd.Categorical(frame[column], tasks) for column in columns})


def by_similarity(pairs: pd.DataFrame, column: str) -> list[str]:
    """Returns the tasks in the order of the leaves of a tree of similarities.

    The tree joins tasks by average linkage over max − similarity, with the optimal branch order.
    """
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    if "parameters" in pairs:
        pairs = of_shown_parameters(pairs)
    tasks = sorted({*pairs["task_a"], *pairs["task_b"]})
    if len(tasks) < 3:
        return tasks

    # If a pair has several kinds, the first is used.
    half = pairs.drop_duplicates(["task_a", "task_b"]).pivot(
        index="task_a", columns="task_b", values=column
    )
    half = half.clip(-1, 1)  # a damaged file may contain other values
    similarity = half.combine_first(half.T).reindex(index=tasks, columns=tasks)
    similarity_TT = similarity.fillna(np.nan_to_num(half.stack().mean())).to_numpy()
    distance_TT = similarity_TT.max() - similarity_TT
    np.fill_diagonal(distance_TT, 0.0)
    tree = linkage(squareform(distance_TT, checks=False), method="average", optimal_ordering=True)
    return [tasks[leaf] for leaf in leaves_list(tree)]

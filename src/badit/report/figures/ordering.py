"""In which order tasks stand in a matrix: alike next to alike, so that groups of them become blocks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from badit.report.contract import Records


def tasks_of(pairs: Records) -> list[str]:
    """The tasks of records with ``task_a`` and ``task_b``, sorted."""
    return sorted({record[column] for record in pairs for column in ("task_a", "task_b")})


def in_order(tasks: Sequence[str], like: Records, column: str) -> list[str]:
    """The tasks in the order that the records' similarities give, those that these say nothing of at the end."""
    known = by_similarity(tasks_of(like), like, column)
    return [task for task in known if task in tasks] + [task for task in tasks if task not in known]


def by_similarity(tasks: Sequence[str], pairs: Records, column: str) -> list[str]:
    """The tasks as the leaves of an average-linkage tree over 1 − similarity, best order of its branches."""
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    if len(tasks) < 3:
        return list(tasks)
    position = {task: i for i, task in enumerate(tasks)}
    known = [record[column] for record in pairs if record[column] is not None]
    similarity_TT = np.full((len(tasks), len(tasks)), np.mean(known) if known else 0.0)
    for record in pairs:
        if record[column] is not None:
            a, b = position[record["task_a"]], position[record["task_b"]]
            similarity_TT[a, b] = similarity_TT[b, a] = record[column]
    distance_TT = similarity_TT.max() - similarity_TT
    np.fill_diagonal(distance_TT, 0.0)
    tree = linkage(squareform(distance_TT, checks=False), method="average", optimal_ordering=True)
    return [tasks[int(i)] for i in leaves_list(tree)]

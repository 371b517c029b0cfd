"""What each task draws on: gates, how alike tasks' gates are, and what is lost without an expert."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from statistics import fmean
from typing import Any

from badit.report.contract import Records
from badit.report.figures.choice import ALL, layer_choice, module_choice
from badit.report.figures.heat_map import Axis, Shade, grid_cells, heat_map, limit_of, pair_cells, pair_index
from badit.report.figures.ordering import in_order, tasks_of


def gates(records: Records, names: Mapping[str, str], like: Records) -> Any:
    """Task × expert mean gates, of all layers or one; 1 is neutral."""
    experts = _experts(records)
    order = _tasks(records, like)
    place = {task: i * len(experts) for i, task in enumerate(order)}
    sums: dict[tuple[str, ...], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        if record["mean"] is not None:
            layer, module = str(record["layer"]), record["module"]
            for key in ((layer, module), (layer, ALL), (ALL, module), (ALL, ALL)):
                sums[key][place[record["task"]] + record["expert"]].append(record["mean"])
    size = len(order) * len(experts)
    lists = {key: [fmean(values[i]) if i in values else None for i in range(size)] for key, values in sums.items()}
    single = [value for key, values in lists.items() if key[0] != ALL for value in values]
    limit, limit_of_all = (limit_of(values, middle=1.0) for values in (single, lists.get((ALL, ALL), [])))
    shade = Shade("mean gate", limit, limit_of_all, middle=1.0)
    return heat_map(
        grid_cells(len(order), len(experts)),
        lists,
        rows=Axis(None, [names[task] for task in order], order),
        columns=Axis("expert", experts),
        shade=shade,
        choices=[
            layer_choice((record["layer"] for record in records), "mean over layers"),
            module_choice(record["module"] for record in records),
        ],
    )


def gate_similarity(similarity: Records, names: Mapping[str, str], like: Records) -> Any:
    """Task × task correlation of gates, the tasks in the order that ``like`` gives."""
    tasks = in_order(tasks_of(similarity), like, "similarity")
    position, index = {task: i for i, task in enumerate(tasks)}, pair_index(len(tasks))
    values: list[float | None] = [None] * len(index)
    for record in similarity:
        a, b = sorted((position[record["task_a"]], position[record["task_b"]]))
        values[index[a, b]] = record["similarity"]
    axis = Axis(None, [names[task] for task in tasks], tasks)
    return heat_map(pair_cells(len(tasks)), {(): values}, rows=axis, columns=axis, shade=Shade("correlation", 1.0))


def expert_losses(losses: Records, names: Mapping[str, str], like: Records) -> Any:
    """Task × expert: by how much the loss rises without the expert."""
    experts = _experts(losses)
    tasks = _tasks(losses, like)
    values: list[float | None] = [None] * (len(tasks) * len(experts))
    for record in losses:
        values[tasks.index(record["task"]) * len(experts) + record["expert"]] = record["change"]
    return heat_map(
        grid_cells(len(tasks), len(experts)),
        {(): values},
        rows=Axis(None, [names[task] for task in tasks], tasks),
        columns=Axis("expert switched off", experts),
        shade=Shade("rise of the loss (nats a token)", limit_of(values), written=True),
    )


def _tasks(records: Records, like: Records) -> list[str]:
    return in_order(list(dict.fromkeys(record["task"] for record in records)), like, "similarity")


def _experts(records: Records) -> list[str]:
    return [str(expert) for expert in range(1 + max(record["expert"] for record in records))]

"""Removes an added task from a saved adapter.

Its clusters go, and so does its expert, unless a task that was added later uses it. The tensors of
all other tasks stay as they are. Extensions and abilities are numbered again without gaps.
"""

import copy
import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from badit.support.errors import BaditError, nearest
from badit.tuner.config import BaditConfig, Extension

_NAME = re.compile(r"(.*\.badit_extensions\.)([A-Za-z]+)_(\d+)")
_OF_CLUSTERS = ("directions", "offsets", "means", "spread", "counts")

Tensors = Mapping[str, Tensor]


def without_task(
    config: BaditConfig, tensors: Tensors, task: str
) -> tuple[BaditConfig, dict[str, Tensor]]:
    """Returns the configuration and the saved tensors of an adapter without an added task."""
    number = _number_of(config, task)
    extensions = list(config.extensions)
    # The expert without clusters, which only later tasks may use.
    extensions[number - 1] = replace(extensions[number - 1], tasks=[], clusters=0, used=0)
    remaining = dict(tensors)
    for name in tensors:
        kind, of_number = _parsed(name)
        if of_number == number and kind in _OF_CLUSTERS:
            del remaining[name]
        elif of_number == number and kind in ("gates", "used"):
            remaining[name] = tensors[name][:0].clone()
    kept = _kept(config, extensions, remaining)
    config = copy.copy(config)
    config.extensions = [extensions[number - 1] for number in kept]
    return config, _renumbered(config, remaining, kept)


def _number_of(config: BaditConfig, task: str) -> int:
    """Returns the extension of a task; BaditError unless it was added alone."""
    for number, extension in enumerate(config.extensions, start=1):
        if extension.tasks == [task]:
            return number
        if task in extension.tasks:
            others = ", ".join(name for name in extension.tasks if name != task)
            raise BaditError(f"task {task}: was trained together with {others}; it cannot go alone")
    if task in (config.tasks or ()):
        problem = "is a task of the joint training, whose experts all its tasks share"
        raise BaditError(f"task {task}: {problem}; only added tasks can be removed")
    raise BaditError(
        f"task {task}: is not an added task of the run{nearest(task, config.added_tasks)}"
    )


def _kept(config: BaditConfig, extensions: list[Extension], tensors: Tensors) -> list[int]:
    """Returns the numbers of the extensions with tasks, and of those that they use."""
    used: set[int] = set()
    for name, tensor in tensors.items():
        kind, number = _parsed(name)
        if kind == "used" and extensions[number - 1].tasks:
            used |= {ability - config.num_experts + 1 for ability in tensor.tolist()}
    return [
        number
        for number, extension in enumerate(extensions, start=1)
        if extension.tasks or number in used
    ]


def _renumbered(config: BaditConfig, tensors: Tensors, kept: list[int]) -> dict[str, Tensor]:
    """Returns the tensors of the kept extensions, numbered from 1."""
    new_number = {number: index for index, number in enumerate(kept, start=1)}
    abilities = list(range(config.num_experts))
    new_ability = {ability: ability for ability in abilities}
    for number, new in new_number.items():
        new_ability[config.num_experts + number - 1] = config.num_experts + new - 1
    result = {}
    for name, tensor in tensors.items():
        kind, number = _parsed(name)
        if number == 0:
            result[name] = tensor
        elif number in new_number:
            if kind == "used":
                values = [new_ability[ability] for ability in tensor.tolist()]
                tensor = torch.tensor(values, dtype=tensor.dtype)
            result[_NAME.sub(rf"\g<1>\g<2>_{new_number[number]}", name)] = tensor
    return result


def _parsed(name: str) -> tuple[str, int]:
    """Returns kind and number of an extension's tensor; 0 for another tensor."""
    match = _NAME.fullmatch(name)
    return (match[2], int(match[3])) if match else ("", 0)

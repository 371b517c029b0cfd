"""Removing added tasks from the tensors of an adapter."""

import pytest
import torch

from badit.tuner import BaditConfig
from badit.tuner.config import Extension
from badit.tuner.removal import without_task
from refusals import refuses

LAYER = "base_model.model.layers.0.badit_extensions."


def adapter(*uses):
    """Returns an adapter of two experts and one task per list of the abilities that it uses."""
    config = BaditConfig(num_experts=2, r=1, tasks=["first", "second"])
    config.extensions = [
        Extension([f"task {number}"], 1, 1, len(used)) for number, used in enumerate(uses, start=1)
    ]
    tensors = {"base_model.model.layers.0.badit_A": torch.ones(2, 3)}
    for number, used in enumerate(uses, start=1):
        tensors[f"{LAYER}A_{number}"] = torch.full((1, 3), float(number))
        tensors[f"{LAYER}gates_{number}"] = torch.full((len(used),), float(number))
        tensors[f"{LAYER}used_{number}"] = torch.tensor(used, dtype=torch.long)
        tensors[f"{LAYER}counts_{number}"] = torch.ones(1, 1)
    return config, tensors


def owners(config, tensors):
    """Returns, by remaining extension, its task and the tasks or experts that it uses."""
    names = ["expert 0", "expert 1"]
    names += [
        f"task {int(tensors[f'{LAYER}A_{n + 1}'][0, 0])}" for n in range(len(config.extensions))
    ]
    return {
        names[1 + number]: [names[used] for used in tensors[f"{LAYER}used_{number}"].tolist()]
        for number in range(1, len(config.extensions) + 1)
    }


def test_an_expert_that_nothing_uses_goes_and_the_others_keep_theirs():
    config, tensors = without_task(*adapter([0], [1], [0, 2]), "task 2")
    assert owners(config, tensors) == {"task 1": ["expert 0"], "task 3": ["expert 0", "task 1"]}
    assert [entry.tasks for entry in config.extensions] == [["task 1"], ["task 3"]]
    assert torch.equal(tensors[f"{LAYER}gates_2"], torch.full((2,), 3.0))
    assert not any(name.endswith("_3") for name in tensors)


def test_an_expert_that_a_later_task_uses_stays_without_clusters():
    config, tensors = adapter([0], [2], [3, 1])
    for task in ("task 1", "task 2"):
        config, tensors = without_task(config, tensors, task)
    # task 2 used task 1, but is not computed by itself any more.
    assert owners(config, tensors) == {"task 2": [], "task 3": ["task 2", "expert 1"]}
    assert [entry.clusters for entry in config.extensions] == [0, 1]
    assert f"{LAYER}counts_1" not in tensors
    config, tensors = without_task(config, tensors, "task 3")
    assert list(tensors) == ["base_model.model.layers.0.badit_A"]
    assert config.extensions == []


@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_arguments_are_not_changed(number):
    config, tensors = adapter([0], [2], [3, 1])
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    without_task(config, tensors, f"task {number}")
    assert len(config.extensions) == 3
    assert before.keys() == tensors.keys()
    assert all(torch.equal(tensors[name], before[name]) for name in before)


def test_refusals():
    config, tensors = adapter([0])
    config.extensions[0].tasks.append("joint")
    refuses("task 1: was trained together with joint", without_task, config, tensors, "task 1")
    refuses("first: is a task of the joint training", without_task, config, tensors, "first")
    refuses("task x: is not an added task", without_task, config, tensors, "x")

"""Helpers for tasks that are added to a trained adapter."""

import torch

from badit.tuner import hooks_of
from tuner.helpers import CLUSTERS, adapt, generate, layers, take_steps

KEY = {**CLUSTERS, "key": "embedding", "init_weights": "lora"}
# The first token of each task's vocabulary.
TASKS = {"first": 4, "second": 30, "third": 56, "fourth": 80}


def batches_of(*tasks, rows=16, seed=0):
    """Returns batches of tasks whose prompts, of five tokens, have separate vocabularies."""
    batches = {}
    for task in tasks:
        generator = torch.Generator().manual_seed(seed + TASKS[task])
        ids = torch.randint(TASKS[task], TASKS[task] + 8, (rows, 9), generator=generator)
        labels = ids.where(torch.arange(9) > 4, -100)
        batches[task] = [
            {"input_ids": ids[i : i + 4], "labels": labels[i : i + 4]} for i in range(0, rows, 4)
        ]
    return batches


def trained(model, **options):
    """Returns a model with an adapter as after training on the first two tasks."""
    model = adapt(model, **options)
    randomise_factors(model)
    hooks_of(model).start_task(batches_of("first", "second"))
    return model


@torch.no_grad()
def randomise_factors(model):
    generator = torch.Generator().manual_seed(1)
    for layer in layers(model):
        for factors in (layer.badit_A, layer.badit_B, layer.badit_router):
            for factor in factors.values():
                factor.add_(0.3 * torch.randn(factor.shape, generator=generator))


def add(model, task, steps=3, **options):
    """Adds a task, with gates on up to four earlier experts, to a model and trains it."""
    hooks_of(model).add_tasks([task], **{"rank": 5, "reused": 4, **options})
    batches = batches_of(task)
    hooks_of(model).start_task(batches)
    model.train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.05)
    losses = take_steps(optimizer, steps, lambda: model(**batches[task][0]).loss)
    model.eval()
    return losses


@torch.no_grad()
def results(model, *tasks, seed=0):
    """Returns the logits of whole batches of tasks, and generated answers."""
    found = {}
    for task in tasks:
        batch = batches_of(task, seed=seed)[task][0]
        prompts = batch["input_ids"][:, :5]
        answers = generate(model, prompts, torch.ones_like(prompts), new_tokens=3)
        found[task] = (model(**batch).logits, answers)
    return found


def assert_same(found, expected):
    for task, tensors in expected.items():
        for mine, theirs in zip(found[task], tensors, strict=True):
            assert torch.equal(mine, theirs), task

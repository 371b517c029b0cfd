#!/usr/bin/env python3
"""Method trials on a real LLM at a tenth of the cost of a full run.

The lower layers of SmolLM2 are frozen; their output is computed once and cached. Adapters are on
gate_proj of the upper layers only. A run of 2,500 examples takes about five minutes on one core.
Learning rates are chosen on `val` (held out of each task's training data). `test` is read once, by
the final command of a stage. The result is appended to results.jsonl in the folder of ``--out``.

    rig.py --name lora_1e-3 --lr 1e-3
    rig.py --name dirs_orth --init dirs --opt orthogonal --lr 2e-3 --seed 1
    summary.py rig-results lora_1e-3 dirs_orth   # paired over instances, by method and seed
"""

import math
import platform
import random
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from model import RigModel
from options import parsed
from peft.optimizers import create_riemannian_optimizer
from results import RESULTS
from tasks import Example, load_examples, number, task_folders
from torch import nn
from transformers import AutoTokenizer

from badit.support.files import append_to_log
from badit.training.optimizers import OrthogonalUpdates

WARMUP = 0.05  # share of the steps; the final learning rate is also 5 % of the highest
LAST_REGROUPING = 0.7  # share of the steps
POOL = 8  # batches of similar length are formed within this many batches


def main() -> None:
    options = parsed()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    random.seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    folders = task_folders(options)
    model = RigModel(options, len(folders))
    train_examples, held_examples = load_examples(options, tokenizer)
    train_hidden = model.lower_output(train_examples, "train")
    held_hidden = model.lower_output(held_examples, options.split)
    if options.only:
        task = [number(folder) for folder in folders].index(options.only)
        is_of_task = [example.task == task for example in train_examples]
        train_hidden = [h for h, keep in zip(train_hidden, is_of_task, strict=True) if keep]
        train_examples = [e for e, keep in zip(train_examples, is_of_task, strict=True) if keep]

    began = time.process_time()
    losses = train(model, options, train_examples, train_hidden)
    result = evaluate(model, held_examples, held_hidden)
    libraries = ("torch", "transformers", "peft")
    result |= {
        "arguments": {
            name: value
            for name, value in vars(options).items()
            if name not in ("name", "out", "model", "data")
        },
        "versions": {name: version(name) for name in libraries}
        | {"cpu": platform.processor() or platform.machine()},
        "parameters": sum(weight.numel() for weight in trained(model)),
        "moved": sum(adapter.moved for adapter in model.adapters),
        "train_loss": fmean(losses[-50:]),
        "cpu_seconds": time.process_time() - began,
    }
    append_to_log(Path(options.out) / RESULTS, {"name": options.name, **result})
    numbers = f"parameters {result['parameters']:7d}  train {result['train_loss']:.4f}"
    print(f"{options.name:32s} {numbers}")
    scores = f"nll {result['nll']:.4f}  em {result['em']:.2f}  gate std {result['gate_std']}"
    print(f"{options.split} {scores}")


def trained(model: RigModel) -> list[nn.Parameter]:
    factors = [adapter.A for adapter in model.adapters] + [adapter.B for adapter in model.adapters]
    return [*factors, *routers(model)]  # pyright: ignore[reportReturnType]


def routers(model: RigModel) -> list[nn.Parameter]:
    return [weight for adapter in model.adapters for weight in adapter.router_parameters]


def make_optimizer(model: RigModel, options: Namespace) -> torch.optim.Optimizer:
    modules = nn.ModuleList(model.adapters)
    router_rate = options.lr * options.router_rate
    if options.opt == "orthogonal":
        return OrthogonalUpdates(modules, lr=options.lr, other_lr=router_rate)
    if options.opt == "riemannian":
        settings: dict[str, Any] = {"lr": options.lr, "weight_decay": 0}
        any_model: Any = modules
        return create_riemannian_optimizer(any_model, torch.optim.AdamW, **settings)
    groups: list[dict[str, Any]] = [
        {"params": [adapter.A for adapter in model.adapters], "lr": options.lr},
        {"params": [adapter.B for adapter in model.adapters], "lr": options.lr * options.b_rate},
    ]
    if router := routers(model):
        groups.append({"params": router, "lr": router_rate})
    return torch.optim.AdamW(groups, weight_decay=0)


def train(
    model: RigModel, options: Namespace, examples: Sequence[Example], hidden: list[torch.Tensor]
) -> list[float]:
    """Trains the adapters; returns the loss of every step."""
    optimizer = make_optimizer(model, options)
    rates = [group["lr"] for group in optimizer.param_groups]
    steps = options.epochs * math.ceil(len(examples) / options.batch)
    began = time.process_time()
    losses: list[float] = []
    for step, indices in enumerate(batches(options, hidden)):
        nll_L, _, row_L = model.losses([examples[i] for i in indices], [hidden[i] for i in indices])
        # The mean over rows of the mean over a row's tokens.
        tokens_B = torch.bincount(row_L, minlength=len(indices))
        loss = (nll_L / tokens_B[row_L]).sum() / len(indices)
        loss.backward()
        if options.dog:
            for adapter in model.adapters:
                adapter.add_gradients_to_gram()
            if (step + 1) % options.dog == 0 and step < LAST_REGROUPING * steps:
                for adapter in model.adapters:
                    adapter.regroup(seed=step)

        nn.utils.clip_grad_norm_(trained(model), 1.0)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * schedule(step, steps)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if len(losses) % 100 == 0:
            seconds = time.process_time() - began
            progress = f"step {step + 1} of {steps}  loss {fmean(losses[-100:]):.4f}"
            print(f"{options.name}  {progress}  {seconds:.0f} CPU s", flush=True)
    return losses


def batches(options: Namespace, hidden: Sequence[torch.Tensor]) -> Iterator[list[int]]:
    """Yields the indices of random batches with examples of similar length."""
    for _ in range(options.epochs):
        order = list(range(len(hidden)))
        random.shuffle(order)
        of_epoch = []
        for start in range(0, len(order), POOL * options.batch):
            pool = order[start : start + POOL * options.batch]
            pool.sort(key=lambda i: len(hidden[i]))
            of_epoch += [pool[i : i + options.batch] for i in range(0, len(pool), options.batch)]
        random.shuffle(of_epoch)
        yield from of_epoch


def schedule(step: int, steps: int) -> float:
    """Returns the factor of the learning rate: linear warm-up, and a cosine."""
    warmup = min(1, (step + 1) / max(1, WARMUP * steps))
    return warmup * (0.05 + 0.475 * (1 + math.cos(math.pi * step / steps)))


@torch.no_grad()
def evaluate(
    model: RigModel, examples: Sequence[Example], hidden: list[torch.Tensor]
) -> dict[str, Any]:
    """Returns NLL and exact match of the teacher-forced answers: means over tasks, instances."""
    for adapter in model.adapters:
        adapter.eval()
    rows: Any = [None] * len(examples)
    gates = []
    order = sorted(range(len(examples)), key=lambda i: len(hidden[i]))
    for start in range(0, len(order), 16):
        indices = order[start : start + 16]
        nll_L, is_right_L, row_L = model.losses(
            [examples[i] for i in indices], [hidden[i] for i in indices]
        )
        if model.options.gate != "none":
            gates.append(torch.stack([adapter.gates_B1N[:, 0] for adapter in model.adapters], 1))
        for row, i in enumerate(indices):
            nll = round(nll_L[row_L == row].mean().item(), 4)
            rows[i] = (examples[i].task, nll, int(is_right_L[row_L == row].all()))
    for adapter in model.adapters:
        adapter.train()

    spread = torch.cat(gates).std(0).mean().item() if gates else None
    scores = {"nll": task_mean(rows, 1), "em": 100 * task_mean(rows, 2)}
    return {**scores, "gate_std": spread, "instances": rows}


def task_mean(rows: Sequence[tuple[float, ...]], column: int) -> float:
    """Returns the mean over tasks of the mean of a column."""
    by_task: dict[float, list[float]] = {}
    for row in rows:
        by_task.setdefault(row[0], []).append(row[column])
    return fmean(fmean(values) for values in by_task.values())


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Checks the cells of abilities_cause.py with a few steps on three tasks, in some three minutes.

    export BADIT_SUPERNI=/path/to/superni
    python benchmarks/experiments/abilities_cause_check.py

It prints a line per check and stops at the first one that fails.

Run it in a checkout of commit deee141f, whose modules it changes.
"""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import abilities_cause as cause
import torch
import torch.nn.functional as F
import transformers
from badit.data.encoded import AnswerCollator, batches_by_task, encode_tasks
from badit.files import read_jsonl
from badit.train import base_model, make_plan
from badit.trainer import answer_losses

from badit.data.tasks import mixture

ANSWERS = "task073_commonsenseqa_answer_generation"
TASKS = [ANSWERS, "task181_outcome_extraction", "task875_emotion_classification"]
SMALL = {"data": {"tasks": TASKS, "train_per_task": 8, "validation_per_task": 0}}
SEED = 90


def prepared(name: str) -> tuple[Any, list[Any]]:
    """Returns a cell's model before its first step, and its training batches of all tasks."""
    cell = cause.CELLS[name]
    recipe = cause.recipe_of(cell, SEED, "unused", **SMALL)
    plan = make_plan(recipe)
    method = cause.CellMethod(cell, SEED)
    transformers.set_seed(SEED)
    base, tokenizer = base_model(recipe)
    model = method.apply(base, TASKS)
    order = mixture(plan.tasks, recipe.data.seed)
    examples = encode_tasks(tokenizer, plan.tasks, recipe.prompt.model_dump(), order)
    collate = AnswerCollator(tokenizer.pad_token_id, with_tasks=True)
    batches = batches_by_task(examples, collate, 4)
    method.before_training(model, batches)
    return model.eval(), [batch for of_task in batches.values() for batch in of_task]


@torch.no_grad()
def losses(model: Any, batch: Any) -> torch.Tensor:
    return answer_losses(model, batch)[0]


def check_start() -> None:
    """At step 0 every cell has the base model's function, so all have equal losses, bit for bit."""
    model, batches = prepared("lora")
    expected = losses(model, batches[0])
    for name in cause.CELLS:
        model, batches = prepared(name)
        found = losses(model, batches[0])
        assert torch.equal(found, expected), name
        if name == "lora-offset":
            check_offset(model, batches)
        elif name == "identical-code":
            check_codes(model)
        elif name == "global-key":
            check_key(model, batches)


def check_codes(model: Any) -> None:
    """All clusters of a layer have the same code, with sum 1; layers differ."""
    codes = [layer.badit_codes["default"] for layer in cause.layers_of(model)]
    for codes_CK in codes:
        assert torch.equal(codes_CK, codes_CK[:1].expand_as(codes_CK))
        assert torch.allclose(codes_CK.sum(dim=1), torch.ones(len(codes_CK)))
    assert not torch.equal(codes[0], codes[1])
    print("identical-code: one code per layer, for example", codes[0][0].tolist())


def check_offset(model: Any, batches: list[Any]) -> None:
    """Offsets are 0 and trained, and shift A x of the rows of their own cluster only."""
    layers = cause.layers_of(model)
    sizes = []

    def measure(layer: Any, args: Any, output: Any) -> None:
        hidden = F.linear(args[0].float(), layer.badit_A["default"])
        sizes.append(hidden.square().mean().sqrt().item())

    hooks = [layer.register_forward_hook(measure) for layer in layers]
    losses(model, batches[0])
    for hook in hooks:
        hook.remove()
    values = f"{min(sizes):.3f} to {max(sizes):.3f}, mean {fmean(sizes):.3f}"
    print(f"lora-offset: root mean square of A x by layer: {values}")
    layer = layers[3]
    offset_CN = layer.badit_offset["default"]
    assert offset_CN.requires_grad
    assert not offset_CN.any()
    torch.nn.init.normal_(layer.badit_B["default"])
    before = losses(model, batches[0])
    own = layer.cluster_B1C[:, 0].argmax(dim=1)
    unused = next(c for c in range(len(offset_CN)) if c not in own)
    with torch.no_grad():
        offset_CN[unused] = 1.0
    assert torch.equal(losses(model, batches[0]), before)
    with torch.no_grad():
        offset_CN[own[0]] = 1.0
    assert not torch.equal(losses(model, batches[0]), before)


def check_key(model: Any, batches: list[Any]) -> None:
    """A prompt has one cluster in all layers, which does not depend on the other rows."""
    layers = cause.layers_of(model)
    key = layers[0].key
    assert all(layer.key is key for layer in layers)
    of_layers: list[torch.Tensor] = []

    def measure(layer: Any, args: Any, output: Any) -> None:
        codes_CK = layer.badit_codes["default"]
        gates_BK = layer.gates("default", args[0])[:, 0]
        of_layers.append((gates_BK[:, None] == codes_CK).all(dim=-1).int().argmax(dim=1))

    for layer in layers:
        layer.register_forward_hook(measure)
    # Rows of different tasks and lengths: the first row of every batch, alone and with the others.
    firsts = [{name: part[:1] for name, part in batch.items()} for batch in batches]
    alone = []
    for batch in firsts:
        losses(model, joined([batch]))
        alone.append(int(of_layers[-1][0]))
    of_layers.clear()
    losses(model, joined(firsts))
    assert len(of_layers) == len(layers)
    assert all(of_layer.tolist() == alone for of_layer in of_layers)
    assert len({layer.badit_codes["default"][0, 0].item() for layer in layers}) == len(layers)
    print("global-key: tasks and clusters", [batch["tasks"][0][:7] for batch in firsts], alone)


def joined(batches: list[Any]) -> Any:
    """Returns one batch with the rows of batches of one row, padded to the longest."""
    width = max(int(batch["attention_mask"].sum()) for batch in batches)
    fills = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    padded: dict[str, Any] = {"tasks": [batch["tasks"][0] for batch in batches]}
    for name, fill in fills.items():
        # A negative width removes the padding of the row's own batch.
        rows = [batch[name] for batch in batches]
        rows = [F.pad(row, (0, width - row.shape[1]), value=fill) for row in rows]
        padded[name] = torch.cat(rows)
    return padded


def check_training(folder: Path) -> None:
    """Three steps of every cell have finite losses, one per instance; the offsets leave 0."""
    for name, cell in cause.CELLS.items():
        method, run = cause.trained(cell, SEED, folder / name, **SMALL)
        records = list(read_jsonl(run.path / cause.RECORDS))
        steps = run.environment["training"]["steps"]
        assert len(records) == 8 * len(TASKS)
        assert {record["task"] for record in records} == set(TASKS)
        assert sorted({record["step"] for record in records}) == list(range(1, steps + 1))
        assert all(math.isfinite(record["loss"]) for record in records)
        groups = method.trainer_made.optimizer.param_groups
        rates = [(len(group["params"]), group["initial_lr"]) for group in groups]
        print(f"{name}: {steps} steps, tensors and rates {rates}, first record {records[0]}")
        if name == "lora-offset":
            layers = cause.layers_of(method.trainer_made.model)
            assert all(layer.badit_offset["default"].any() for layer in layers)


def check_resuming(folder: Path) -> None:
    """A training that is interrupted and continued has the records of one that is not."""
    for name, cell in cause.CELLS.items():
        stopped = folder / f"{name}-stopped"
        options = {**SMALL, "training": {"save_steps": 1}}
        interrupted = patch.object(cause.RecordingTrainer, "compute_loss", interrupting())
        with suppress(InterruptedError), interrupted:
            cause.trained(cell, SEED, stopped, **options)
        cause.trained(cell, SEED, stopped, **options)
        records = [list(read_jsonl(run / cause.RECORDS)) for run in (stopped, folder / name)]
        assert records[0] == records[1], name
        print(f"{name}: equal records after an interruption")


def interrupting() -> Any:
    """Returns compute_loss that raises InterruptedError in the third step."""
    original = cause.RecordingTrainer.compute_loss

    def compute_loss(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        loss = original(trainer, *args, **kwargs)
        if trainer.state.global_step == 2:
            raise InterruptedError
        return loss

    return compute_loss


def main() -> None:
    with TemporaryDirectory() as folder:
        cause.RUNS = Path(folder)
        check_start()
        check_training(Path(folder))
        check_resuming(Path(folder))
    print("all checks passed")


if __name__ == "__main__":
    main()

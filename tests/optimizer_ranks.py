"""What each process runs in ``test_optimizer``: a small training by orthogonal updates, then the same resumed.

    python optimizer_ranks.py FOLDER BATCH_SIZE

Process N writes FOLDER/rank-N.safetensors: the trained weights after four steps, whole, and, as ``resumed.NAME``, those
of a second training that was resumed from the first one's checkpoint of step 2.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from badit.optimizer import OrthogonalUpdates
from training.ranks import leave, shard_on_cpu
from training.trainers import adapted, make_trainer


def trained(folder: Path, batch_size: int, checkpoint: Path | None = None) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 47, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, pad_token_id=0)
    # Five rows of A and 47 of B do not divide evenly.
    model = adapted(LlamaForCausalLM(config), lora_dropout=0.0, num_experts=5, r=1)
    options: dict[str, Any] = {"group_by_length": False, "max_steps": 4, "save_steps": 2}
    trainer = make_trainer(model, folder, [], per_device_train_batch_size=batch_size, **options)

    def create_optimizer(model: Any = None) -> OrthogonalUpdates:  # Trainer takes no ready optimizer under FSDP
        if trainer.optimizer is None:
            trainer.optimizer = OrthogonalUpdates(trainer.model, 0.01, other_lr=0.02)  # pyright: ignore
        return trainer.optimizer  # pyright: ignore

    trainer.create_optimizer = create_optimizer
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    parameters = {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}  # pyright: ignore
    return {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in parameters.items()}


def run(folder: Path, batch_size: int) -> None:
    whole = trained(folder / "run", batch_size)
    resumed = trained(folder / "resumed", batch_size, folder / "run" / "checkpoint-2")
    tensors = {**whole, **{f"resumed.{name}": tensor for name, tensor in resumed.items()}}
    tensors = {name.removeprefix("module."): tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / f"rank-{os.environ.get('RANK', '0')}.safetensors")


if __name__ == "__main__":
    shard_on_cpu()
    run(Path(sys.argv[1]), int(sys.argv[2]))
    leave(0)

"""What each of several processes runs in ``test_optimizer``: a small training by orthogonal updates, then resumed.

    python optimizer_ranks.py FOLDER BATCH_SIZE

Process N writes FOLDER/rank-N.safetensors: the trained weights after four steps, whole, and, as ``resumed.NAME``, those
of a second training that took up the first one's checkpoint of step 2.
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
from training.ranks import shard_on_cpu
from training.trainers import adapted, make_trainer


def trained(folder: Path, batch_size: int, resume_from: Path | None) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=47, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
    )
    # Five rows of A and 47 of B do not divide evenly.
    model = adapted(LlamaForCausalLM(config), lora_dropout=0.0, num_experts=5, r=1)
    trainer = make_trainer(
        model, folder, [], per_device_train_batch_size=batch_size, group_by_length=False, max_steps=4, save_steps=2
    )

    def create_optimizer(model: Any = None) -> OrthogonalUpdates:  # Trainer takes no ready optimizer under FSDP
        if trainer.optimizer is None:
            trainer.optimizer = OrthogonalUpdates(trainer.model, 0.01, other_lr=0.02)  # pyright: ignore
        return trainer.optimizer  # pyright: ignore

    trainer.create_optimizer = create_optimizer
    trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
    parameters = {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}  # pyright: ignore
    return {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in parameters.items()}


def main(folder: Path, batch_size: int) -> None:
    whole = trained(folder / "run", batch_size, None)
    resumed = trained(folder / "resumed", batch_size, folder / "run" / "checkpoint-2")
    tensors = {**whole, **{f"resumed.{name}": tensor for name, tensor in resumed.items()}}
    tensors = {name.removeprefix("module."): tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / f"rank-{os.environ.get('RANK', '0')}.safetensors")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        # gloo's threads and the objects that Python frees at its end sometimes wait for each other for ever. All that
        # this process was for is on disk, so it ends without that end.
        os._exit(0)


if __name__ == "__main__":
    if os.environ.get("BADIT_SHARD_ON_CPU"):
        shard_on_cpu()
    main(Path(sys.argv[1]), int(sys.argv[2]))

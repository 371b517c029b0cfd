"""What each of several processes runs in ``test_two_ranks``: a small training, whose adapter every rank keeps."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from badit.regroup import RegroupCallback
from training.trainers import adapted, make_trainer


def main(folder: Path, batch_size: int) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
    )
    model = adapted(LlamaForCausalLM(config), lora_dropout=0.0)
    trainer = make_trainer(
        model,
        folder,
        [RegroupCallback(every=3)],
        per_device_train_batch_size=batch_size,
        group_by_length=False,
        save_strategy="no",
    )
    trainer.train()
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if "badit_" in name}
    save_file(state, folder / f"rank-{os.environ.get('RANK', '0')}.safetensors")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        # gloo's threads and the objects that Python frees at its end sometimes wait for each other for ever. All that
        # this process was for is on disk, so it ends without that end.
        os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

"""What each of several processes runs in ``launches``: the command, with what it sees kept on the side.

    python ranks.py RECORD RECIPE [key=value …]

Every process writes RECORD/rank-N.safetensors: each step's gradients of the adapter, whole, and at the end its labels.
accelerate shards a model (FSDP2) on accelerators only; with ``BADIT_SHARD_ON_CPU`` set it takes CPU processes for such.
``BADIT_STOP_AT=N`` sends the last process alone a SIGTERM in step N.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from badit.cli import main
from badit.gradients import several
from badit.methods import AdapterMethod


class Recorder(TrainerCallback):
    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name, parameter in kwargs["model"].named_parameters():
            if parameter.requires_grad and parameter.grad is not None:
                gradient = parameter.grad
                whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
                self.tensors[f"{state.global_step}.{name}"] = whole.clone()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        last = int(os.environ.get("WORLD_SIZE", "1")) - 1
        if os.environ.get("RANK", "0") == str(last) and os.environ.get("BADIT_STOP_AT") == str(state.global_step + 1):
            os.kill(os.getpid(), signal.SIGTERM)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        labels = {name: value for name, value in kwargs["model"].named_buffers() if "expert_of" in name}
        save_file({**self.tensors, **labels}, self.path)


def shard_on_cpu() -> None:
    initialise = PartialState.__init__

    def patched(self: PartialState, *args: Any, **kwargs: Any) -> None:
        initialise(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_XPU

    PartialState.__init__ = patched


def deepspeed_on_cpu() -> None:
    """accelerate starts DeepSpeed on accelerators only, and DeepSpeed would first compile an exchange of its own."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    PartialState._prepare_backend = lambda self, *args: ("gloo", DistributedType.MULTI_CPU)  # pyright: ignore


if __name__ == "__main__":
    if os.environ.get("BADIT_SHARD_ON_CPU"):
        shard_on_cpu()
    if os.environ.get("ACCELERATE_USE_DEEPSPEED"):
        deepspeed_on_cpu()
    record = Path(sys.argv[1]) / f"rank-{os.environ.get('RANK', '0')}.safetensors"
    own = AdapterMethod.callbacks
    AdapterMethod.callbacks = lambda self, run: [*own(self, run), Recorder(record)]  # pyright: ignore
    code = main(["train", *sys.argv[2:]])
    if several():
        torch.distributed.barrier()
    sys.stdout.flush()
    # gloo's threads and the objects that Python frees at its end sometimes wait for each other for ever. All that
    # this process was for is on disk, so it ends without that end.
    os._exit(code)

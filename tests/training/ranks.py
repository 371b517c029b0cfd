"""What each of several processes runs in ``launches``: the command, launched as a script or forked.

    python ranks.py RECIPE [key=value …]

accelerate shards a model (FSDP2) on accelerators only; with ``BADIT_SHARD_ON_CPU`` set it takes CPU processes for such.
``BADIT_STOP_AT=N`` sends the last process, and no other, a SIGTERM in step N.
"""

import os
import signal
import sys
from typing import Any, NoReturn

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

from badit.cli import main
from training.trainers import on, with_callbacks


def shard_on_cpu() -> None:
    initialise = PartialState.__init__

    def patched(self: PartialState, *args: Any, **kwargs: Any) -> None:
        initialise(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_XPU

    if os.environ.get("BADIT_SHARD_ON_CPU"):
        PartialState.__init__ = patched


def deepspeed_on_cpu() -> None:
    """accelerate starts DeepSpeed on accelerators only, and DeepSpeed would first compile its own communication."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED"):
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        PartialState._prepare_backend = lambda self, *args: ("gloo", DistributedType.MULTI_CPU)  # pyright: ignore


def stop(state: Any, keywords: dict[str, Any]) -> None:
    last = os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1)
    if last and os.environ.get("BADIT_STOP_AT") == str(state.global_step + 1):
        os.kill(os.getpid(), signal.SIGTERM)


def leave(code: int) -> NoReturn:
    """Ends the process at once: gloo's threads and Python's own cleanup sometimes wait for each other forever."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(code)


def run(words: list[str]) -> NoReturn:
    shard_on_cpu()
    deepspeed_on_cpu()
    with with_callbacks(on("on_step_begin", stop)):
        leave(main(["train", *words]))


def forked(words: list[str], variables: dict[str, str], printed: str) -> NoReturn:
    for stream in (1, 2):
        os.dup2(os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.environ.update(variables)
    run(words)


if __name__ == "__main__":
    run(sys.argv[1:])

"""The training command that every process of ``launches`` runs, launched as a script or forked.

    python ranks.py RECIPE [key=value …]

accelerate shards a model (FSDP2) on accelerators only. ``BADIT_SHARD_ON_CPU`` makes it treat CPU
processes as XPUs. With ``BADIT_STOP_AT=N`` set, the last rank, and no other, sends itself SIGTERM
in step N. ``BADIT_COMMAND`` replaces the command ``train``.
"""

import os
import signal
import sys
from typing import Any, NoReturn

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from badit import BaditConfig
from badit.cli import main
from badit.tuner import hooks_of
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
    """Lets accelerate start DeepSpeed on the CPU, without compiling its communication library."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED"):
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        PartialState._prepare_backend = lambda self, *args: ("gloo", DistributedType.MULTI_CPU)  # pyright: ignore


def stop(state: Any, keywords: dict[str, Any]) -> None:
    last = os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1)
    if last and os.environ.get("BADIT_STOP_AT") == str(state.global_step + 1):
        os.kill(os.getpid(), signal.SIGTERM)


def leave(code: int) -> NoReturn:
    """Exits without Python's cleanup, which sometimes deadlocks with gloo's threads."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(code)


def run(words: list[str]) -> NoReturn:
    shard_on_cpu()
    deepspeed_on_cpu()
    with with_callbacks(on("on_step_begin", stop)):
        leave(main([os.environ.get("BADIT_COMMAND", "train"), *words]))


def clustered(
    options: dict[str, Any], batches: list[dict[str, Any]], variables: dict[str, str], path: str
) -> None:
    """Finds the clusters and codes of a tiny model in a process group, and saves its adapter.

    Each rank reads every R-th batch from its own on, or all batches if ``path`` says so.
    """
    os.environ.update(variables)
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    ranks = torch.distributed.get_world_size()
    own = batches if "alike" in path else batches[rank::ranks]
    torch.save(codes_of(options, own, seed=rank), f"{path}-{rank}")
    torch.distributed.destroy_process_group()


def codes_of(
    options: dict[str, Any], batches: list[dict[str, Any]], seed: int = 0
) -> dict[str, torch.Tensor]:
    """Returns the adapter of a tiny model with its clusters and codes."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(
        vocab_size=100, num_attention_heads=4, initializer_range=0.2, pad_token_id=0, **sizes
    )
    model = get_peft_model(LlamaForCausalLM(config), BaditConfig(num_experts=3, r=2, **options))
    torch.manual_seed(seed)  # the ranks' random states differ
    hooks_of(model).start_task({"all": batches})
    return {name: tensor for name, tensor in model.state_dict().items() if "badit_" in name}


def forked(words: list[str], variables: dict[str, str], printed: str) -> NoReturn:
    for stream in (1, 2):
        os.dup2(os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.environ.update(variables)
    run(words)


if __name__ == "__main__":
    run(sys.argv[1:])

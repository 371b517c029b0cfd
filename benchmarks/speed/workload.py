"""The workload of the speed benchmarks: SmolLM2-135M with adapters, a batch, a training step."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from loops import use_loops
from peft import LoraConfig, get_peft_model
from torch import nn

from badit import BaditConfig, load_base_model
from badit.models import fast_dtype
from badit.recipe.loading import build_recipe
from badit.training.encoding import encoded
from badit.training.trainer import answer_losses

MODEL = "smollm2-135m"
EXPERTS, RANK = 8, 4
TARGETS = ["gate_proj"]

ADAPTERS = ("lora", "badit", "gated change", "experts in a loop", "experts per sequence")


def fast_dtypes() -> list[str]:
    """Returns float32, and bfloat16 unless this processor computes it in software."""
    return ["float32"] if fast_dtype(torch.device("cpu")) == "float32" else ["bfloat16", "float32"]


def base(dtype: str) -> Any:
    torch.manual_seed(0)
    model, _ = load_base_model(MODEL, dtype=dtype)  # pyright: ignore[reportArgumentType]
    return model


def adapted(name: str, dtype: str, *, experts: int = EXPERTS, rank: int = RANK) -> nn.Module:
    """Returns SmolLM2 in training mode with rank ``experts · rank`` on every gate_proj."""
    model = base(dtype)
    if name == "lora":
        width = experts * rank
        config = LoraConfig(
            r=width, lora_alpha=8 * width, target_modules=TARGETS, task_type="CAUSAL_LM"
        )
        return get_peft_model(model, config).train()
    config = BaditConfig(
        num_experts=experts,
        r=rank,
        lora_alpha=8 * rank,
        lora_dropout=0.0,
        init_weights="bad",
        router_input="mean",
        gated="change" if name == "gated change" else "factors",
        target_modules=TARGETS,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config).train()
    if name.startswith("experts"):
        use_loops(model, per_sequence=name.endswith("sequence"))
    return model


def batch(
    rows: int, tokens: int, *, answer: int = 20, vocabulary: int = 49_000
) -> dict[str, torch.Tensor]:
    """Returns random prompts of ``tokens − answer`` tokens with answers of ``answer`` tokens."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(0, vocabulary, (rows, tokens), generator=generator)
    labels = input_ids.clone()
    labels[:, :-answer] = -100
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}


def training_step(model: nn.Module, inputs: dict[str, torch.Tensor]) -> Callable[[], None]:
    """Returns a step: forward pass, loss on the answers, backward pass and AdamW."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        losses, _, _ = answer_losses(model, inputs)
        losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def data_options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds ``--data``, for benchmarks on real prompts."""
    parser.add_argument(
        "--data",
        default="builtin",
        help="a folder of tasks, such as SuperNI (default: built-in tasks)",
    )
    return parser


def instances(tokenizer: Any, source: str, per_task: int) -> list[dict[str, Any]]:
    """Returns encoded training instances of every task, in file order."""
    recipe = build_recipe({"data": {"source": source, "train_per_task": per_task}})
    pairs = [(task, instance) for task in recipe.data.load() for instance in task.train]
    return encoded(tokenizer, recipe, pairs, None)

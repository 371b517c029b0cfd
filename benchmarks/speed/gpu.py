"""What only a machine with a GPU can measure: steps and memory, SVD, clusters, DOG, decoding.

    python benchmarks/speed/gpu.py                     # SmolLM2-135M
    python benchmarks/speed/gpu.py --model FOLDER      # another model, of a local folder

Every part is written to the result when it ends. A part that fails is recorded with its error, and
the others run. No network is needed for a local model. ``--device cpu --small`` tests the script.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch._dynamo
from measure import Samples, in_turns, keep, options, ratio
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.utils.import_utils import is_flash_attn_2_available
from workload import batch, training_step

from badit import BaditConfig, hooks_of, load_base_model
from badit.cli.entry import quiet_libraries
from badit.method import cosine_gram, group_components, top_singular_triples
from badit.models import device as accelerator

EXPERTS, RANK = 8, 4
WIDTH = EXPERTS * RANK
BADIT: dict[str, dict[str, Any]] = {
    "badit": {},
    "badit, change of singular triples": {"init_weights": "bad", "gated": "change"},
}


class Machine:
    """The device, the model and the sizes of the measurements."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.device = torch.device(arguments.device or accelerator())
        self.model = arguments.model
        self.rounds = arguments.rounds
        small = arguments.small
        self.rows, self.tokens = (2, 32) if small else (8, 1024)
        self.matrix = (64, 96) if small else (4096, 14336)
        self.prompt, self.new_tokens = (8, 4) if small else (128, 64)
        self.clusters = 2 if small else 16
        self.vocabulary = arguments.vocabulary

    def wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def timed(self, calls: Mapping[str, Callable[[], object]]) -> Samples:
        """Returns seconds by alternative, each until the device has finished."""

        def finished(call: Callable[[], object]) -> Callable[[], None]:
            def run() -> None:
                call()
                self.wait()

            return run

        alternatives = {name: finished(call) for name, call in calls.items()}
        return in_turns(alternatives, rounds=self.rounds, warmup=2)

    def peak_bytes(self, call: Callable[[], object]) -> int | None:
        """Returns the device's peak memory during a call; None on a CPU."""
        if self.device.type != "cuda":
            return None
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        call()
        self.wait()
        return torch.cuda.max_memory_allocated()

    def batch(self, rows: int, tokens: int) -> dict[str, torch.Tensor]:
        inputs = batch(rows, tokens, answer=tokens // 4, vocabulary=self.vocabulary)
        return {name: tensor.to(self.device) for name, tensor in inputs.items()}

    def base(self, form: str) -> Any:
        """Returns the base model in bfloat16, in one of the forms of :data:`FORMS`."""
        torch.manual_seed(0)
        quantisation = "bnb-4bit" if form == "4-bit" else None
        model, _ = load_base_model(
            self.model, dtype="bfloat16", quantisation=quantisation, device=self.device
        )
        if form == "FlashAttention":
            model.set_attn_implementation("flash_attention_2")
        return model

    def adapted(self, name: str, form: str = "bfloat16") -> Any:
        """Returns the model in training mode with an adapter of rank 32, clusters found."""
        targets = {"target_modules": ["gate_proj"], "task_type": "CAUSAL_LM"}
        config: Any = LoraConfig(r=WIDTH, lora_alpha=8 * WIDTH, **targets)
        if name != "lora":
            config = BaditConfig(
                num_experts=EXPERTS,
                r=RANK,
                lora_dropout=0.0,
                num_clusters=self.clusters,
                gates="clusters",
                **BADIT[name],
                **targets,
            )
        model = get_peft_model(self.base(form), config)
        hooks_of(model).start_task({"all": self.prompts()})
        if form == "compiled":
            # Each model's layers are compiled with and without gradients.
            torch._dynamo.config.recompile_limit = 64
            for layer in model.get_base_model().model.layers:
                layer.compile(fullgraph=True)
        return model.train()

    def prompts(self) -> list[dict[str, torch.Tensor]]:
        return [self.batch(self.clusters * 2, self.tokens)]


def training(machine: Machine, form: str) -> dict[str, Any]:
    """Measures a training step and its memory against PEFT's LoRA of the same rank."""
    inputs = machine.batch(machine.rows, machine.tokens)
    names = ("lora", *BADIT)
    memory = {}
    synchronisations = {}
    losses = {}
    for name in names:  # one model at a time
        model = machine.adapted(name, form)
        losses[name] = _loss(model, inputs)
        step = training_step(model, inputs)
        step()  # the optimizer's state exists from the second step on
        memory[name] = machine.peak_bytes(step)
        synchronisations[name] = _synchronisations(machine, step)
        del model, step
    steps = {name: training_step(machine.adapted(name, form), inputs) for name in names}
    samples = machine.timed(steps)
    return {
        "seconds": samples,
        "ratio to lora": {name: ratio(samples, name, "lora") for name in BADIT},
        "peak bytes": memory,
        "synchronisations of a step": synchronisations,
        "loss before training": losses,
    }


def _synchronisations(machine: Machine, step: Callable[[], object]) -> int | None:
    """Returns how often a step waits for the device; None on a CPU."""
    if machine.device.type != "cuda":
        return None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroni" in str(warning.message) for warning in caught)


def _loss(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> float:
    with torch.no_grad():
        return float(model(**inputs, use_cache=False).loss)


def decomposition(machine: Machine) -> dict[str, Any]:
    """Measures torch's exact SVD of a large weight against the randomised one."""
    rows, columns = machine.matrix
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator).to(machine.device)
    # A spectrum that decays like that of a trained weight.
    u, _, vh = torch.linalg.svd(weight, full_matrices=False)
    weight = (u * torch.arange(1, rows + 1, device=machine.device) ** -0.3) @ vh
    calls = {
        "exact": lambda: torch.linalg.svd(weight, full_matrices=False),
        "randomised": lambda: top_singular_triples(weight, WIDTH, method="randomized"),
    }
    samples = machine.timed(calls)
    found = top_singular_triples(weight, WIDTH, method="randomized")[1].double().cpu()
    exact = torch.arange(1, WIDTH + 1, dtype=torch.float64) ** -0.3
    return {
        "seconds": samples,
        "exact / randomised": ratio(samples, "exact", "randomised"),
        "largest relative error of a singular value": float(((found - exact) / exact).abs().max()),
    }


def clusters(machine: Machine) -> dict[str, Any]:
    """Measures the search of clusters, of each layer and of the whole model with its codes."""
    seconds: dict[str, list[float]] = {}
    ways: dict[str, dict[str, Any]] = {
        "of each layer": {},
        "of the model, with matched codes": {"key": "embedding", "codes": "matched"},
    }
    for name, chosen in ways.items():
        seconds[name] = []
        for _ in range(machine.rounds):
            config = BaditConfig(
                num_experts=EXPERTS,
                r=RANK,
                num_clusters=machine.clusters,
                gates="clusters",
                target_modules=["gate_proj"],
                task_type="CAUSAL_LM",
                **chosen,
            )
            model = get_peft_model(machine.base("bfloat16"), config)
            prompts = machine.prompts()
            machine.wait()
            began = time.perf_counter()
            hooks_of(model).start_task({"all": prompts})
            machine.wait()
            seconds[name].append(time.perf_counter() - began)
    return {"seconds": seconds}


def grouping(machine: Machine) -> dict[str, Any]:
    """Measures the Gram matrix of a layer's gradients, and the grouping of its components."""
    rows, columns = machine.matrix
    a_NI = torch.randn(WIDTH, columns, device=machine.device)
    b_ON = torch.randn(rows, WIDTH, device=machine.device)
    gram_NN = cosine_gram(a_NI, b_ON)
    labels = torch.arange(WIDTH).numpy() % EXPERTS
    matrix = gram_NN.double().cpu().numpy()
    calls = {
        "gram": lambda: cosine_gram(a_NI, b_ON),
        "grouping": lambda: group_components(matrix, labels),
    }
    return {"seconds": machine.timed(calls)}


def decoding(machine: Machine) -> dict[str, Any]:
    """Measures greedy decoding against the base model's."""
    models: dict[str, Any] = {"base": machine.base("bfloat16").eval()}
    models |= {name: machine.adapted(name).eval() for name in ("lora", "badit")}
    settings = {
        "max_new_tokens": machine.new_tokens,
        "min_new_tokens": machine.new_tokens,
        "do_sample": False,
        "pad_token_id": 0,
    }
    result = {}
    for rows in (1, 8):
        inputs = machine.batch(rows, machine.prompt)
        del inputs["labels"]
        calls = {}
        for name, model in models.items():
            calls[name] = partial(model.generate, **inputs, **settings)
        samples = machine.timed(calls)
        result[f"{rows} prompts at a time"] = {
            "tokens per second": {
                name: [rows * machine.new_tokens / value for value in values]
                for name, values in samples.items()
            },
            "speed to the base model's": {
                name: ratio(samples, "base", name) for name in models if name != "base"
            },
        }
    return result


PARTS: dict[str, Callable[[Machine], dict[str, Any]]] = {
    **{
        f"training step, {form}": lambda machine, form=form: training(machine, form)
        for form in ("bfloat16", "4-bit", "compiled", "FlashAttention")
    },
    "SVD": decomposition,
    "search of clusters": clusters,
    "grouping": grouping,
    "decoding": decoding,
}


def main(arguments: argparse.Namespace) -> int:
    machine = Machine(arguments)
    if machine.device.type == "cpu" and arguments.device is None:
        print("no GPU was found; --device cpu --small tests this script")
        return 2
    result: dict[str, Any] = {"device": _device_name(machine.device), "model": machine.model}
    for name, part in PARTS.items():
        if name.endswith("FlashAttention") and not is_flash_attn_2_available():
            result[name] = "flash-attn is not installed"
            continue
        print(name, flush=True)
        try:
            result[name] = part(machine)
        # Each part uses other kernels and libraries; those that work are measured.
        except Exception as error:
            result[name] = {"error": f"{type(error).__name__}: {error}"[:500]}
        keep(arguments.name, result)
    failed = [name for name, value in result.items() if "error" in value]
    print(json.dumps({"failed": failed}))
    return int(bool(failed))


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return str(device)


if __name__ == "__main__":
    quiet_libraries()
    parser = options(__doc__, rounds=7)
    parser.add_argument("--model", default="smollm2-135m", help="built-in name or local folder")
    parser.add_argument("--vocabulary", type=int, default=49_000, help="ids of the random prompts")
    parser.add_argument("--device", help="such as cuda or cpu (default: the accelerator)")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to test the script")
    parser.add_argument("--name", default="gpu", help="results/speed/NAME.json")
    raise SystemExit(main(parser.parse_args()))

"""Compare a run's answers with those of the LoRAs that `badit serve` chooses; time the proxy.

    python benchmarks/serving_routed.py runs/mine
    # `make test-serving` makes the environment of vLLM
    python benchmarks/serving_routed.py runs/mine --vllm .venv/serving/bin/python

transformers answers the test instances of the run's tasks greedily; vLLM gives the same tokens
(tests/serving). With --vllm, some prompts are sent one at a time for a single token, in turn
directly and through the proxies, to measure the time of the proxies. Writes
results/serving-routed.json.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import cycle
from operator import eq
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

import httpx2
import torch
from fixed_gates import mean_export
from peft import PeftModel

import badit
from badit.data import Instance, Task
from badit.evaluation.generation import generate_answers
from badit.integrations.proxy import Router
from badit.metrics.answers import rouge_l
from badit.models import resolve_model
from badit.support.environment import environment
from badit.support.files import write_json
from badit.training.encoding import encoded
from badit.training.loading import load_base

RESULTS = Path(__file__).parent / "results" / "serving-routed.json"
PORT = 8765


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="a run's folder; vLLM must be able to load its base model")
    parser.add_argument("--vllm", help="a Python interpreter that has vLLM")
    parser.add_argument(
        "--prompts", type=int, default=20, help="number of timed prompts (default: 20)"
    )
    options = parser.parse_args()
    run = badit.Run(options.run)
    with TemporaryDirectory() as folder:
        exported = run.export(f"{folder}/tasks", all_tasks=True, progress=False)
        loras = {name: part.folder for name, part in exported.tasks.items()}
        loras["mean"] = mean_export(run, exported.tasks, Path(folder)).folder
        router = Router(run, exported.folder)
        pairs = [
            (task, instance) for task in badit.plan(run.recipe).tasks for instance in task.test
        ]
        base, tokenizer = load_base(run.recipe)
        examples = encoded(tokenizer, run.recipe, pairs, base)
        prompts = [example["input_ids"][: example["prompt_length"]] for example in examples]
        content = answered(run, router, loras, pairs, prompts, base, tokenizer)
        chosen = prompts[:: max(1, len(prompts) // options.prompts)]
        content["processor_seconds"] = processor_seconds(router, chosen)
        write_json(RESULTS, content)
        if options.vllm:
            with ExitStack() as stack:
                vllm = stack.enter_context(
                    served_by_vllm(options.vllm, run, loras, exported.max_lora_rank)
                )
                nearest = stack.enter_context(
                    proxy(str(run.path), str(exported.folder), f"--url={vllm}")
                )
                exact = stack.enter_context(proxy(str(run.path), f"--url={vllm}"))
                ways: dict[str, Any] = {
                    "direct": (vllm, cycle(loras)),
                    "proxy, named model": (nearest, cycle(loras)),
                }
                auto = {"badit serve RUN EXPORTS": nearest, "badit serve RUN": exact}
                ways |= {name: (url, cycle(["auto"])) for name, url in auto.items()}
                content["seconds_for_one_token"] = timed(ways, chosen)
            content["vllm"] = version(options.vllm)
            write_json(RESULTS, content)


def answered(
    run: badit.Run,
    router: Router,
    loras: Mapping[str, Path],
    pairs: Sequence[tuple[Task, Instance]],
    prompts: Sequence[list[int]],
    base: Any,
    tokenizer: Any,
) -> dict[str, Any]:
    """Returns Rouge-L of the run and of the chosen LoRAs, and how often each LoRA is chosen."""
    own = [task.name for task, _ in pairs]
    gates = torch.stack([router.gates(prompt) for prompt in prompts])
    plain = (router.gates_TMK - gates[:, None]).square().sum(dim=(2, 3)).argmin(dim=1)
    by_gates = [router.exports[i] for i in plain.tolist()]
    nearest = [router.nearest(each) for each in gates]
    chosen = {
        "nearest LoRA": nearest,
        "own task's LoRA": own,
        "mean gates' LoRA": ["mean"] * len(own),
    }
    model: Any = None
    texts: dict[tuple[str, int], str] = {}
    for name, folder in loras.items():
        if model is None:
            model = PeftModel.from_pretrained(base, str(folder), adapter_name=name)
        else:
            model.load_adapter(str(folder), adapter_name=name)
        model.set_adapter(name)
        asked = [i for i in range(len(own)) if any(of_way[i] == name for of_way in chosen.values())]
        settings: dict[str, Any] = {
            "max_new_tokens": run.recipe.evaluation.max_new_tokens,
            "batch_size": 16,
        }
        found = generate_answers(model, tokenizer, [prompts[i] for i in asked], **settings)
        texts |= {(name, i): text for i, text in zip(asked, found, strict=True)}
        print(name, len(asked), flush=True)
    kept = {
        (task, id_): text
        for task, id_, text in run.predictions[["task", "instance_id", "prediction"]].values
    }
    answers = {"exact routing": [kept[task.name, instance.id] for task, instance in pairs]}
    answers |= {
        way: [texts[name, i] for i, name in enumerate(names)] for way, names in chosen.items()
    }
    others: dict[str, Counter[str]] = {}
    for task, adapter in zip(own, nearest, strict=True):
        others.setdefault(task, Counter())[adapter] += 1
    return {
        "recipe": run.recipe.model_dump(mode="json", exclude={"compare", "output"}),
        "training": run.environment["training"],
        "environment": environment(),
        "prompts": len(prompts),
        "mean_prompt_tokens": sum(map(len, prompts)) / len(prompts),
        "rouge_l": {way: rouge(pairs, found) for way, found in answers.items()},
        "answers_equal_to_exact_routing": {
            way: sum(map(eq, found, answers["exact routing"])) for way, found in answers.items()
        },
        "to_own_task": sum(map(eq, own, nearest)),
        "to_own_task_by_distance_of_gates": sum(map(eq, own, by_gates)),
        "routed": others,
    }


def rouge(pairs: Sequence[tuple[Task, Instance]], texts: Sequence[str]) -> dict[str, float]:
    """Returns Rouge-L per task and their mean."""
    by_task: dict[str, list[float]] = {}
    for (task, instance), text in zip(pairs, texts, strict=True):
        by_task.setdefault(task.name, []).append(rouge_l(text, instance.outputs))
    means = {name: fmean(scores) for name, scores in by_task.items()}
    return {**means, "mean": fmean(means.values())}


@contextmanager
def served_by_vllm(
    python: str, run: badit.Run, loras: Mapping[str, Path], rank: int | None
) -> Iterator[str]:
    """Starts vLLM's OpenAI server on this machine in float32; yields its address."""
    base = resolve_model(run.recipe.model.name)
    words = f"-m vllm.entrypoints.openai.api_server --model {base} --dtype float32 --enforce-eager "
    words += "--max-model-len 1024 --no-enable-prefix-caching "
    words += "--enable-lora --max-loras 8 --max-cpu-loras 40 "
    words += f"--max-lora-rank {rank} --host 127.0.0.1 --port {PORT} --lora-modules"
    modules = [f"{name}={folder}" for name, folder in loras.items()]
    settings = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    settings["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    log_file = Path(gettempdir(), "badit-vllm.log")
    with log_file.open("w") as log:
        command, environment = [python, *shlex.split(words), *modules], {**os.environ, **settings}
        with subprocess.Popen(command, env=environment, stdout=log, stderr=log) as process:
            try:
                while not answers_on(PORT):
                    assert process.poll() is None, f"vLLM has exited; see {log_file}"
                    time.sleep(1)
                yield f"http://127.0.0.1:{PORT}"
            finally:
                process.terminate()


def answers_on(port: int) -> bool:
    try:
        return httpx2.get(f"http://127.0.0.1:{port}/health", timeout=60).is_success
    except httpx2.HTTPError:
        return False


@contextmanager
def proxy(*words: str) -> Iterator[str]:
    """Starts `badit serve`; yields its address."""
    command = [sys.executable, "-m", "badit", "serve", *words, "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().split()[1].removesuffix("/v1,")
        finally:
            process.terminate()


def ask(url: str, model: str, prompt: list[int], tokens: int) -> tuple[str, str]:
    """Returns the greedy answer and the adapter that the proxy reports."""
    content = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    answer = httpx2.post(f"{url}/v1/completions", json=content, timeout=600).raise_for_status()
    return answer.json()["choices"][0]["text"].strip(), answer.headers.get("x-badit-adapter", model)


def timed(
    ways: dict[str, tuple[str, Iterator[str]]], prompts: Sequence[list[int]]
) -> dict[str, Any]:
    """Returns seconds until the first token: one request at a time, each prompt in each way."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for prompt in [prompts[0], *prompts]:
        for name, (url, models) in ways.items():
            began = time.monotonic()
            ask(url, next(models), prompt, 1)
            times[name].append(time.monotonic() - began)
    measured = {name: of_way[1:] for name, of_way in times.items()}  # the first prompt is slower
    return {name: {"median": median(of_way), "each": of_way} for name, of_way in measured.items()}


def processor_seconds(router: Router, prompts: Sequence[list[int]]) -> dict[str, float]:
    """Returns the proxy's CPU seconds per prompt (medians): reading it and writing its LoRA."""
    reading, writing = [], []
    for prompt in [prompts[0], *prompts]:
        began = time.process_time()
        gates = router.gates(prompt)
        router.nearest(gates)
        read = time.process_time()
        with TemporaryDirectory() as folder:
            router.write(gates, Path(folder))
        reading.append(read - began)
        writing.append(time.process_time() - read)
    return {"reading the prompt": median(reading[1:]), "writing its LoRA": median(writing[1:])}


def version(python: str) -> str:
    code = "from importlib.metadata import version; print(version('vllm-cpu'))"
    return (
        "vllm-cpu "
        + subprocess.run(
            [python, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
    )


if __name__ == "__main__":
    main()

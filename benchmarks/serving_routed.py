"""Compare what a run answers behind `badit serve` with its own answers and with single exported LoRAs, on vLLM.

    python benchmarks/serving_routed.py runs/mine --vllm .venv/serving/bin/python     # made by: make test-serving

The test instances of the run's tasks are answered greedily, several at a time. Then some of them are asked one after
another for a single token, in turn directly and through the proxies, for the time that these take.
Writes results/serving-routed.json.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import cycle
from operator import eq
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import httpx2
import torch

import badit
from badit.data import Task
from badit.environment import environment
from badit.evaluate import score_model
from badit.files import write_json
from badit.models import resolve_model
from badit.results import read_scores
from badit.serve import Router
from badit.train import encoded

RESULTS = Path(__file__).parent / "results" / "serving-routed.json"
PORT = 8765
AT_A_TIME = 8
ITSELF = "the run itself"  # by transformers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run's folder, on a model that vLLM loads from its folder")
    parser.add_argument("--vllm", required=True, help="a Python that has vLLM")
    parser.add_argument("--prompts", type=int, default=20, help="timed in every way (default: 20)")
    options = parser.parse_args()
    run = badit.Run(options.run)
    recipe, tasks = run.recipe, badit.plan(run.recipe).tasks
    with TemporaryDirectory() as folder, ExitStack() as stack:
        exported = run.export(f"{folder}/tasks", all_tasks=True, progress=False)
        loras = {name: part.folder for name, part in exported.tasks.items()}
        loras["mean"] = run.export(f"{folder}/mean", progress=False).folder
        router = Router(run.path, exported.folder)
        pairs = [(task, instance) for task in tasks for instance in task.test]
        _, tokenizer = run.load()
        prompts = [each["input_ids"][: each["prompt_length"]] for each in encoded(tokenizer, recipe, pairs)]
        vllm = stack.enter_context(served_by_vllm(options.vllm, recipe.model.name, loras, exported.max_lora_rank))
        nearest = stack.enter_context(proxy(str(run.path), str(exported.folder), f"--url={vllm}"))
        exact = stack.enter_context(proxy(str(run.path), f"--url={vllm}"))
        settings = {
            "badit serve RUN": (exact, ["auto"] * len(pairs)),
            "badit serve RUN EXPORTS": (nearest, ["auto"] * len(pairs)),
            "own task's LoRA": (vllm, [task.name for task, _ in pairs]),
            "mean gates' LoRA": (vllm, ["mean"] * len(pairs)),
            "base model": (vllm, [resolve_model(recipe.model.name)] * len(pairs)),
        }
        scores = {ITSELF: rouge(read_scores(run.scores_path))}
        answers = {ITSELF: list(run.predictions.sort_values(["task", "id"])["prediction"])}
        routed: list[str] = []
        no_model: Any = None
        for name, (url, models) in settings.items():
            began = time.monotonic()
            found = ask_all(url, models, prompts, recipe.evaluation.max_new_tokens)
            print(f"{name}: {len(found)} answers in {time.monotonic() - began:.0f} s", flush=True)
            texts = [text for text, _ in found]
            quiet = {"progress": False, "answer": lambda _, texts=texts: texts}
            scored, predictions = score_model(no_model, tokenizer, recipe, tasks, "test", **quiet)
            scores[name] = rouge(scored)
            answers[name] = [p.prediction for p in sorted(predictions, key=lambda p: (p.task, p.instance_id))]
            routed = [adapter for _, adapter in found] if name == "badit serve RUN EXPORTS" else routed
        times = timed(
            {
                "direct": (vllm, cycle(loras)),
                "proxy, named model": (nearest, cycle(loras)),
                "badit serve RUN EXPORTS": (nearest, cycle(["auto"])),
                "badit serve RUN": (exact, cycle(["auto"])),
            },
            prompts[:: max(1, len(prompts) // options.prompts)],
        )
    equal = {name: sum(map(eq, found, answers[ITSELF])) for name, found in answers.items()}
    content = {
        "recipe": recipe.model_dump(mode="json", exclude={"compare", "output"}),
        "steps": run.environment["training"]["steps"],
        "environment": environment(),
        "vllm": version(options.vllm),
        "prompts": len(prompts),
        "mean_prompt_tokens": sum(map(len, prompts)) / len(prompts),
        "rouge_l": scores,
        "answers_equal_to_the_run": equal,
        "routed": routed_by(router, pairs, prompts, routed),
        "seconds_for_one_token": times,
    }
    write_json(RESULTS, content)
    print(RESULTS)


def rouge(scores: dict[str, Any]) -> dict[str, float]:
    """Rouge-L per task and their mean."""
    return {**{name: each["rouge_l"] for name, each in scores["tasks"].items()}, "mean": scores["rouge_l"]}


@contextmanager
def served_by_vllm(python: str, base: str, loras: dict[str, Path], rank: int | None) -> Iterator[str]:
    """vLLM's OpenAI server on this machine, in float32; its address."""
    words = f"-m vllm.entrypoints.openai.api_server --model {resolve_model(base)} --dtype float32 --enforce-eager "
    words += "--max-model-len 1024 --no-enable-prefix-caching --enable-lora --max-loras 8 --max-cpu-loras 40 "
    words += f"--max-lora-rank {rank} --host 127.0.0.1 --port {PORT} --lora-modules"
    modules = [f"{name}={folder}" for name, folder in loras.items()]
    settings = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    settings["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    with Path("vllm.log").open("w") as log:
        command, environment = [python, *shlex.split(words), *modules], {**os.environ, **settings}
        with subprocess.Popen(command, env=environment, stdout=log, stderr=log) as process:
            try:
                while not answers_on(PORT):
                    assert process.poll() is None, "vLLM has ended: see vllm.log"
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
    """`badit serve`; its address."""
    command = [sys.executable, "-m", "badit", "serve", *words, "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().split()[1].removesuffix("/v1,")
        finally:
            process.terminate()


def ask(url: str, model: str, prompt: list[int], tokens: int) -> tuple[str, str]:
    """The greedy answer, and the adapter that the proxy names."""
    content = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    answer = httpx2.post(f"{url}/v1/completions", json=content, timeout=600).raise_for_status()
    return answer.json()["choices"][0]["text"].strip(), answer.headers.get("x-badit-adapter", model)


def ask_all(url: str, models: Sequence[str], prompts: Sequence[list[int]], tokens: int) -> list[tuple[str, str]]:
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        return list(pool.map(lambda model, prompt: ask(url, model, prompt, tokens), models, prompts))


def timed(ways: dict[str, tuple[str, Iterator[str]]], prompts: Sequence[list[int]]) -> dict[str, Any]:
    """Seconds until the first token, one request at a time, every prompt in each way in turn."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for prompt in [prompts[0], *prompts]:
        for name, (url, models) in ways.items():
            began = time.monotonic()
            ask(url, next(models), prompt, 1)
            times[name].append(time.monotonic() - began)
    measured = {name: of_way[1:] for name, of_way in times.items()}  # the first is slower
    return {name: {"median": median(of_way), "each": of_way} for name, of_way in measured.items()}


def routed_by(
    router: Router, pairs: Sequence[tuple[Task, Any]], prompts: Sequence[list[int]], routed: Sequence[str]
) -> dict[str, Any]:
    """How many prompts went to their own task's LoRA, which others they went to, and the same for plain gates."""
    own = [task.name for task, _ in pairs]
    gates = torch.stack([router.gates(prompt) for prompt in prompts])
    plain = (router.gates_TMN - gates[:, None]).square().sum(dim=(2, 3)).argmin(dim=1)
    by_gates = [router.exports[i] for i in plain.tolist()]
    others: dict[str, dict[str, int]] = {}
    for task, adapter in zip(own, routed, strict=True):
        of_task = others.setdefault(task, {})
        of_task[adapter] = of_task.get(adapter, 0) + 1
    return {
        "to_own_task": sum(map(eq, own, routed)),
        "to_own_task_by_distance_of_gates": sum(map(eq, own, by_gates)),
        "by_task": others,
    }


def version(python: str) -> str:
    code = "from importlib.metadata import version; print(version('vllm-cpu'))"
    return "vllm-cpu " + subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()

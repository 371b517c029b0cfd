"""Compare a run's answers with those of the LoRAs that `badit serve` chooses; time the proxy.

    python benchmarks/serving_routed.py runs/mine
    # `make test-serving` makes the environment of vLLM
    python benchmarks/serving_routed.py runs/mine --vllm .venv/serving/bin/python

transformers answers the test instances of the run's tasks greedily; vLLM gives the same tokens
(tests/serving). With --vllm, some prompts are sent one at a time for a single token, in turn
directly and through the proxies, to measure the time of the proxies. Writes
results/serving-routed.json.
"""

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
from typing import Any, NamedTuple

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


class Questions(NamedTuple):
    """The test instances of a run's tasks, and their prompts as tokens."""

    pairs: list[tuple[Task, Instance]]
    prompts: list[list[int]]

    @property
    def tasks(self) -> list[str]:
        return [task.name for task, _ in self.pairs]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="a run's folder; vLLM must be able to load its base model")
    parser.add_argument("--vllm", help="a Python interpreter that has vLLM")
    parser.add_argument("--prompts", type=int, default=20, help="number to time (default: 20)")
    options = parser.parse_args()

    run = badit.Run(options.run)
    with TemporaryDirectory() as folder:
        exports = run.export(f"{folder}/tasks", all_tasks=True, progress=False)
        loras = {name: export.folder for name, export in exports.tasks.items()}
        loras["mean"] = mean_export(run, exports.tasks, Path(folder)).folder
        router = Router(run, exports.folder)
        base, tokenizer = load_base(run.recipe)
        questions = questions_of(run, base, tokenizer)
        gates = torch.stack([router.gates(prompt) for prompt in questions.prompts])
        chosen = {
            "nearest LoRA": [router.nearest(gates_MK) for gates_MK in gates],
            "own task's LoRA": questions.tasks,
            "mean gates' LoRA": ["mean"] * len(questions.prompts),
        }
        answers = {"exact routing": own_answers(run, questions)}
        answers |= lora_answers(run, base, tokenizer, loras, questions.prompts, chosen)

        content = {
            "recipe": run.recipe.model_dump(mode="json", exclude={"compare", "output"}),
            "training": run.environment["training"],
            "environment": environment(),
            "prompts": len(questions.prompts),
            "mean_prompt_tokens": fmean(map(len, questions.prompts)),
            **compared(questions, answers),
            **routed(questions.tasks, chosen["nearest LoRA"], nearest_by_gates(router, gates)),
        }
        prompts = questions.prompts[:: max(1, len(questions.prompts) // options.prompts)]
        content["processor_seconds"] = processor_seconds(router, prompts)
        write_json(RESULTS, content)
        if options.vllm is None:
            return
        with ExitStack() as stack:
            vllm = stack.enter_context(
                served_by_vllm(options.vllm, run, loras, exports.max_lora_rank)
            )
            url = f"--url={vllm}"
            nearest = stack.enter_context(proxy(str(run.path), str(exports.folder), url))
            exact = stack.enter_context(proxy(str(run.path), url))
            ways: dict[str, tuple[str, Iterator[str]]] = {
                "direct": (vllm, cycle(loras)),
                "proxy, named model": (nearest, cycle(loras)),
                "badit serve RUN EXPORTS": (nearest, cycle(["auto"])),
                "badit serve RUN": (exact, cycle(["auto"])),
            }
            content["seconds_for_one_token"] = timed(ways, prompts)
        content["vllm"] = version(options.vllm)
        write_json(RESULTS, content)


def questions_of(run: badit.Run, base: Any, tokenizer: Any) -> Questions:
    pairs = [(task, instance) for task in badit.plan(run.recipe).tasks for instance in task.test]
    examples = encoded(tokenizer, run.recipe, pairs, base)
    prompts = [example["input_ids"][: example["prompt_length"]] for example in examples]
    return Questions(pairs, prompts)


def own_answers(run: badit.Run, questions: Questions) -> list[str]:
    """Returns the answers of the run itself, which has scored them."""
    predictions = run.predictions.set_index(["task", "instance_id"])["prediction"]
    return [str(predictions[task.name, instance.id]) for task, instance in questions.pairs]


def lora_answers(
    run: badit.Run,
    base: Any,
    tokenizer: Any,
    loras: Mapping[str, Path],
    prompts: Sequence[list[int]],
    chosen: Mapping[str, Sequence[str]],
) -> dict[str, list[str]]:
    """Returns the answers by way of choosing a LoRA; ``chosen`` has the LoRA of each prompt."""
    settings: dict[str, Any] = {
        "max_new_tokens": run.recipe.evaluation.max_new_tokens,
        "batch_size": 16,
    }
    model: Any = None
    texts: dict[tuple[str, int], str] = {}
    for lora, folder in loras.items():
        if model is None:
            model = PeftModel.from_pretrained(base, str(folder), adapter_name=lora)
        else:
            model.load_adapter(str(folder), adapter_name=lora)
        model.set_adapter(lora)
        # A prompt for which several ways choose this LoRA is answered once.
        asked = [i for i, names in enumerate(zip(*chosen.values(), strict=True)) if lora in names]
        answers = generate_answers(model, tokenizer, [prompts[i] for i in asked], **settings)
        texts |= {(lora, i): answer for i, answer in zip(asked, answers, strict=True)}
        print(lora, len(asked), flush=True)
    return {way: [texts[lora, i] for i, lora in enumerate(names)] for way, names in chosen.items()}


def nearest_by_gates(router: Router, gates: torch.Tensor) -> list[str]:
    """Returns the exports with the nearest gates, in place of the nearest weights."""
    distances = (router.gates_TMK - gates[:, None]).square().sum(dim=(2, 3))
    return [router.exports[i] for i in distances.argmin(dim=1).tolist()]


def compared(questions: Questions, answers: Mapping[str, list[str]]) -> dict[str, Any]:
    """Returns Rouge-L of each way, and how many answers equal those of exact routing."""
    exact = answers["exact routing"]
    return {
        "rouge_l": {way: rouge(questions.pairs, texts) for way, texts in answers.items()},
        "answers_equal_to_exact_routing": {
            way: sum(map(eq, texts, exact)) for way, texts in answers.items()
        },
    }


def routed(tasks: list[str], nearest: list[str], by_gates: list[str]) -> dict[str, Any]:
    """Returns how often the nearest LoRA is that of the task, and of each task the LoRAs."""
    loras_of_task: dict[str, Counter[str]] = {}
    for task, lora in zip(tasks, nearest, strict=True):
        loras_of_task.setdefault(task, Counter())[lora] += 1
    return {
        "to_own_task": sum(map(eq, tasks, nearest)),
        "to_own_task_by_distance_of_gates": sum(map(eq, tasks, by_gates)),
        "routed": loras_of_task,
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
    command = [python, *shlex.split(words), *modules]
    variables = {
        **os.environ,
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    log_file = Path(gettempdir(), "badit-vllm.log")
    with (
        log_file.open("w") as log,
        subprocess.Popen(command, env=variables, stdout=log, stderr=log) as process,
    ):
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


def ask_for_one_token(url: str, model: str, prompt: list[int]) -> None:
    content = {"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 0}
    httpx2.post(f"{url}/v1/completions", json=content, timeout=600).raise_for_status()


def timed(
    ways: dict[str, tuple[str, Iterator[str]]], prompts: Sequence[list[int]]
) -> dict[str, Any]:
    """Returns seconds until the first token: one request at a time, each prompt in each way."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for prompt in [prompts[0], *prompts]:
        for name, (url, models) in ways.items():
            began = time.monotonic()
            ask_for_one_token(url, next(models), prompt)
            times[name].append(time.monotonic() - began)
    # Without the first prompt, which is slower.
    return {
        name: {"median": median(seconds[1:]), "each": seconds[1:]}
        for name, seconds in times.items()
    }


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
    command = [python, "-c", code]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return f"vllm-cpu {printed.strip()}"


if __name__ == "__main__":
    main()

"""Exports give the same tokens in vLLM and llama.cpp as in transformers: ``make test-serving``.

BADIT_SERVING is the folder of the Makefile's environment and of results.json; without it the tests
are skipped. Everything runs in float32 on the CPU. The base model is the built-in one, under its
hub id in a local hub cache.
"""

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path

import httpx2
import pytest
from transformers import AutoTokenizer

from badit import Run, train
from badit.evaluation.generation import generate_answers
from badit.models import BUILT_IN_HUB_ID, resolve_model

ENVIRONMENT = os.environ.get("BADIT_SERVING")
pytestmark = pytest.mark.skipif(
    not ENVIRONMENT, reason="BADIT_SERVING names no environment: make test-serving"
)
HERE, SERVING = Path(__file__).parent, Path(ENVIRONMENT or ".").resolve()
WORK = SERVING / "work"
SNAPSHOT = Path(f"models--{BUILT_IN_HUB_ID.replace('/', '--')}") / "snapshots" / "0"
SOURCE = str(HERE.parents[1] / "src")
LLAMA, PYTHON = SERVING / "llama.cpp", SERVING / "bin" / "python"

RECIPE = {
    "model": {"name": "smollm2-135m", "dtype": "float32"},
    "data": {"source": "builtin", "train_per_task": 5, "test_per_task": 4},
    # llama.cpp permutes q_proj.
    "method": {
        "name": "badit",
        "target_modules": ["q_proj", "gate_proj"],
        "regroup": {"every": 10},
    },
    # 20 steps at the default's rate, after which the answers differ from the base model's and are
    # still long.
    "training": {"per_device_train_batch_size": 4, "learning_rate": 2e-3},
    "evaluation": {"max_new_tokens": 16},
    "output": str(WORK / "run"),
}
FORMS = {"lora": {}, "rank-16": {"rank": 16}, "merged": {"merged": True}}
REQUESTS = ["Explain how {} works.", "Write a short story about {}.", "List five facts about {}.",
            "Describe {} to a child.", "What would the world be like without {}?"]  # fmt: skip
TOPICS = [
    "a bicycle",
    "the tide",
    "bread",
    "a library",
    "the violin",
    "electricity",
    "a volcano",
    "chess",
]
TOKENS, LONG = 32, 20
# Servers add in another order, so a token may differ, but only if transformers' two largest logits
# are this close.
BOUND = 1e-3
ENGINES = [
    ("vllm", "lora"),
    ("vllm", "rank-16"),
    ("vllm", "merged"),
    ("llama", "lora"),
    ("llama", "merged"),
]


def process_environment(python_path=""):
    """Environment variables of a process whose hub cache has only the built-in model."""
    hub = {"HF_HUB_CACHE": str(WORK / "hub"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": python_path}
    one_thread = {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }  # and 1 GiB of cache
    return {**os.environ, **hub, **one_thread, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}


def call(command, python_path=""):
    environment = process_environment(python_path)
    done = subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def answer(program, name, model, prompts, **more):
    job, answers = WORK / f"{name}.job.json", WORK / f"{name}.json"
    settings = {
        "model": str(model),
        "prompts": prompts,
        "tokens": TOKENS,
        "answers": str(answers),
        **more,
    }
    job.write_text(json.dumps(settings))
    call([*program, job])
    return json.loads(answers.read_text())


@pytest.fixture(scope="module")
def prompts():
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("smollm2-135m"))
    chats = [
        [{"role": "user", "content": ask.format(topic)}] for ask in REQUESTS for topic in TOPICS
    ]
    return [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        for chat in chats
    ]


@pytest.fixture(scope="module")
def exports():
    run = train(RECIPE, progress=False)
    snapshot = WORK / "hub" / SNAPSHOT
    snapshot.mkdir(parents=True, exist_ok=True)
    (snapshot.parents[1] / "refs").mkdir(exist_ok=True)
    (snapshot.parents[1] / "refs" / "main").write_text("0")
    for file in Path(resolve_model("smollm2-135m")).iterdir():
        if not (snapshot / file.name).exists():
            (snapshot / file.name).symlink_to(file)
    return {
        name: run.export(WORK / name, task="got_more", **options).folder
        for name, options in FORMS.items()
    }


@pytest.fixture(scope="module")
def references(exports, prompts):
    """transformers' answers and margins by export; those of the base model as "base"."""
    program = [sys.executable, HERE / "transformers_answers.py"]
    models = {"base": BUILT_IN_HUB_ID, **exports}
    return {
        name: answer(program, f"transformers-{name}", model, prompts)
        for name, model in models.items()
    }


@pytest.fixture(scope="module")
def vllm(exports, prompts):
    """vLLM's answers by export; one engine serves both LoRAs."""
    program = [PYTHON, HERE / "vllm_answers.py"]
    loras = {name: str(exports[name]) for name in ("lora", "rank-16")}
    found = answer(program, "vllm-loras", BUILT_IN_HUB_ID, prompts, loras=loras, rank=64)
    return found | answer(program, "vllm-merged", exports["merged"], prompts, loras={})


@pytest.fixture(scope="module")
def llama(exports, prompts):
    """llama.cpp's answers by export, converted with its own scripts."""
    found = {}
    for name, whole in (("lora", WORK / "hub" / SNAPSHOT), ("merged", exports["merged"])):
        model, lora = WORK / f"{name}-model.gguf", WORK / "lora.gguf" if name == "lora" else None
        call(
            [PYTHON, LLAMA / "convert_hf_to_gguf.py", whole, "--outtype", "f32", "--outfile", model]
        )
        if lora is not None:
            call([PYTHON, LLAMA / "convert_lora_to_gguf.py", exports[name], "--outfile", lora])
        found |= answer(
            ["node", HERE / "llama_answers.mjs"],
            f"llama-{name}",
            model,
            prompts,
            lora=lora and str(lora),
        )
    return found


@pytest.fixture(scope="module")
def results():
    """All comparisons, written to results.json at the end."""
    converters = next((SERVING / "source").iterdir()).name  # its hash is checked by pip
    versions = {name: version(name) for name in ("torch", "transformers", "peft")}
    versions["converters"] = converters.removesuffix(".tar.gz")
    found = {"versions": versions, "max_new_tokens": TOKENS, "bound": BOUND, "comparisons": []}
    yield found
    (SERVING / "results.json").write_text(json.dumps(found, indent=2) + "\n")


@pytest.mark.parametrize(("engine", "export"), ENGINES)
def test_answers_match_transformers(engine, export, request, references, results):
    expected, margins = references[export]["answers"], references[export]["margins"]
    served = request.getfixturevalue(engine)
    differences = []
    for i, (one, other) in enumerate(zip(expected, served[export], strict=True)):
        at = next((t for t, (a, b) in enumerate(zip_longest(one, other)) if a != b), None)
        if at is not None:
            differences.append({"prompt": i, "token": at, "margin": margins[i][at]})
    long = sum(len(each) >= LONG for each in expected)
    changed = sum(
        one != base for one, base in zip(expected, references["base"]["answers"], strict=True)
    )
    results["versions"] |= served["versions"]
    results["comparisons"].append(
        {"engine": engine, "export": export, "prompts": len(expected), "of_20_tokens_or_more": long,
         "differ_from_base": changed,
         "equal": len(expected) - len(differences), "differences": differences,
         "smallest_margin": min(map(min, margins))}
    )  # fmt: skip
    assert min(long, changed) >= 32
    assert all(each["margin"] < BOUND for each in differences), differences


def test_vllm_and_transformers_give_an_export_the_same_scores(exports):
    run, found = WORK / "run", {}
    for engine, python in (("transformers", sys.executable), ("vllm", PYTHON)):
        out = WORK / f"scored-{engine}"
        call(
            [
                python,
                "-m",
                "badit",
                "export",
                run,
                "-o",
                out,
                "--all-tasks",
                "--score",
                "--engine",
                engine,
            ],
            SOURCE,
        )
        found[engine] = json.loads((out / "scores.json").read_text())
    assert len(found["vllm"]["tasks"]) == 16
    assert found["vllm"] == {**found["transformers"], "engine": "vllm"}


@contextmanager
def started(*words, output=subprocess.PIPE):
    """A server process that is terminated at the end of the context."""
    with subprocess.Popen(
        list(map(str, words)), env=process_environment(SOURCE), stdout=output, text=True
    ) as process:
        try:
            yield process
        finally:
            process.terminate()


def test_proxy_to_vllm_answers_like_the_run_or_the_named_export(exports, prompts):
    run, asked = Run(WORK / "run"), prompts[::5]
    tasks = run.export(WORK / "tasks", all_tasks=True, progress=False)
    expected = generate_answers(*run.load(), asked, max_new_tokens=TOKENS, batch_size=8)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    vllm = f"http://127.0.0.1:{port}"
    words = f"--dtype float32 --enforce-eager --max-model-len 256 --port {port} "
    words += "--enable-lora --max-lora-rank 64"
    loras = [f"{name}={part.folder}" for name, part in tasks.tasks.items()]
    server_words = [
        PYTHON,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        BUILT_IN_HUB_ID,
        *words.split(),
    ]
    with (
        started(*server_words, "--lora-modules", *loras, output=subprocess.DEVNULL) as server,
        started(
            sys.executable, "-m", "badit", "serve", run.path, "--port=0", f"--url={vllm}"
        ) as exact,
        started(
            sys.executable,
            "-m",
            "badit",
            "serve",
            run.path,
            tasks.folder,
            "--port=0",
            f"--url={vllm}",
        ) as nearest,
    ):
        urls = [
            process.stdout.readline().split()[1].removesuffix("/v1,")
            for process in (exact, nearest)
        ]
        while server.poll() is None and not answers_on(vllm):
            time.sleep(1)

        def ask(url, model, prompt):
            content = {"model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
            return httpx2.post(
                f"{url}/v1/completions", json=content, timeout=600
            ).raise_for_status()

        def text(answer):
            return answer.json()["choices"][0]["text"].strip()

        assert [text(ask(urls[0], "auto", prompt)) for prompt in asked] == expected
        for prompt in asked:
            answer = ask(urls[1], "auto", prompt)
            assert answer.headers["x-badit-adapter"] in tasks.tasks
            assert text(answer) == text(ask(vllm, answer.headers["x-badit-adapter"], prompt))
        served = {model["id"] for model in httpx2.get(f"{urls[1]}/v1/models").json()["data"]}
        assert served == {"auto", BUILT_IN_HUB_ID, *tasks.tasks}, "per-prompt LoRAs are unloaded"


def answers_on(url):
    try:
        return httpx2.get(f"{url}/health", timeout=60).is_success
    except httpx2.HTTPError:
        return False

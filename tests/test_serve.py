"""``badit serve`` over HTTP with a stand-in for vLLM: routed, forwarded and refused requests."""

import asyncio
import json
import shutil
import signal
import socketserver
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import httpx2
import pytest
import torch
from peft import PeftModel
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route

from badit.analysis.gates import adapted_layers, mean_gates
from badit.data import AnswerCollator, batches_by_task
from badit.integrations.proxy import MAX_BODY, Router, application
from badit.runs.resolved import resolve
from badit.training.encoding import encoded
from badit.training.loading import load_base
from data.examples import write_animals
from refusals import refuses
from steps import export
from studio.conftest import BADIT, served

MODELS = {"object": "list", "data": [{"id": "base"}]}
CHAT = {"model": "auto", "messages": [{"role": "user", "content": "land 3"}]}
WAIT = 60
NOT_ONE_PROMPT = "prompt: must be one text or the token ids of one"


@pytest.fixture(scope="module")
def run(trained):
    return trained(BADIT)


@pytest.fixture(scope="module")
def router(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports") / "tasks"
    return Router(run, export(run, folder, all_tasks=True).folder)


@pytest.fixture
def vllm(run, tmp_path):
    """A stand-in for vLLM.

    It has its port, the completion requests, the loaded LoRAs and copies of them, and events that
    control a stream's second chunk.
    """
    _, tokenizer = load_base(run.recipe)
    server = SimpleNamespace(
        asked=[],
        loaded=[],
        removed_too_early=False,
        hangs=None,  # the path of the requests that are never answered
        copies=tmp_path,
        goes_on=threading.Event(),
        ended=threading.Event(),
    )

    async def tokenize(request):
        content = await request.json()
        if content["prompt"] == "refused":
            return JSONResponse({"error": {"message": "no\nsuch prompt"}}, 422)
        if "messages" in content:
            chat = content["messages"]
            encoding = tokenizer.apply_chat_template(chat, add_generation_prompt=True)
        else:
            encoding = tokenizer(content["prompt"])
        return JSONResponse({"tokens": encoding["input_ids"]})

    async def complete(request):
        content = await request.json()
        key = request.headers["authorization"]
        server.asked.append((request.url.path, content, key, list(server.loaded)))
        if content["model"] == "unknown":
            return JSONResponse({"error": {"message": "no such model"}}, 404)
        if "stream" in content:
            return StreamingResponse(chunks(), media_type="text/event-stream")
        return JSONResponse({})

    async def chunks():
        try:
            yield "data: 1\n\n"
            while not server.goes_on.is_set():
                await asyncio.sleep(0.01)
            yield "data: [DONE]\n\n"
        finally:
            server.ended.set()

    async def lora(request):
        content = await request.json()
        if request.url.path == "/v1/load_lora_adapter":
            shutil.copytree(content["lora_path"], server.copies / content["lora_name"])
            server.loaded.append(content["lora_name"])
        elif content["lora_name"] in server.loaded:
            server.loaded.remove(content["lora_name"])
            server.removed_too_early |= not Path(content["lora_path"]).is_dir()
        return PlainTextResponse("Success")

    calls = {"tokenize": tokenize, "v1/load_lora_adapter": lora, "v1/unload_lora_adapter": lora}
    calls |= dict.fromkeys(["v1/completions", "v1/chat/completions"], complete)
    routes = [
        Route(f"/{path}", answering(server, call), methods=["POST"]) for path, call in calls.items()
    ]
    routes.append(Route("/v1/models", JSONResponse(MODELS)))
    with served(Starlette(routes=routes)) as server.port:
        yield server


def proxied(router, port):
    return served(application(router, f"http://127.0.0.1:{port}/v1/"))


@pytest.fixture
def client(router, vllm):
    with (
        proxied(router, vllm.port) as port,
        httpx2.Client(base_url=f"http://127.0.0.1:{port}/v1") as client,
    ):
        yield client


def answering(server, call):
    """Returns the call, which does not answer the path ``server.hangs``."""

    async def answer(request):
        if request.url.path != server.hangs:
            return await call(request)
        while not await request.is_disconnected():
            await asyncio.sleep(0.01)
        return PlainTextResponse("")

    return answer


@contextmanager
def closing_reused_connections():
    """A server that closes a connection at its second request; yields its port.

    So does every server whose time for idle connections ends while a request is on its way.
    """
    answer = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"

    class Connection(socketserver.StreamRequestHandler):
        def handle(self):
            length = 0
            while line := self.rfile.readline().strip().lower():
                if line.startswith(b"content-length:"):
                    length = int(line.partition(b":")[2])
            self.rfile.read(length)
            self.wfile.write(answer)
            self.rfile.read(1)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Connection) as closing:
        closing.daemon_threads = True
        threading.Thread(target=closing.serve_forever).start()
        try:
            yield closing.server_address[1]
        finally:
            closing.shutdown()


def unloaded(vllm):
    """Waits until no LoRA is loaded.

    Returns False after WAIT seconds, or if the folder of a loaded LoRA was removed.
    """
    until = time.monotonic() + WAIT
    while vllm.loaded and time.monotonic() < until:
        time.sleep(0.01)
    return not vllm.loaded and not vllm.removed_too_early


def training_prompts(router):
    recipe = router.run.recipe
    pairs = [(task, instance) for task in resolve(recipe).tasks for instance in task.train]
    return encoded(load_base(recipe)[1], recipe, pairs, router.model)


def test_prompt_is_routed_to_the_export_with_the_nearest_weights(client, router, vllm, run):
    tasks = json.loads((run.path / "gates.json").read_text())["tasks"]
    gates_by_task = {name: of_task["means"] for name, of_task in tasks.items()}
    layers = adapted_layers(router.model)
    expected = []
    for example in training_prompts(router):
        # Gates ignore the answer.
        batches = batches_by_task([{**example, "task": "t"}], AnswerCollator(0), 1)
        prompt_gates = mean_gates(router.model, batches["t"])
        distances = {
            task: sum(distance(layer, prompt_gates, gates) for layer in layers)
            for task, gates in gates_by_task.items()
        }
        expected.append(min(distances, key=distances.__getitem__))
        prompt = example["input_ids"][: example["prompt_length"]]
        content = {"model": "auto", "prompt": [prompt], "max_tokens": 3}
        answer = client.post("/completions", json=content)
        assert (answer.status_code, answer.headers["x-badit-adapter"]) == (200, expected[-1])
        assert vllm.asked[-1][1] == {**content, "model": expected[-1]}
    assert set(expected) == {"cities", "rivers"}


def distance(adapted, *gates):
    """Returns the squared distance between a layer's weights with two mixtures of its experts."""
    first, second = (
        adapted.layer.get_delta_weight(adapted.adapter, torch.tensor(of_layers[adapted.layer.name]))
        for of_layers in gates
    )
    return float((first - second).square().sum())


def test_texts_and_chats_are_tokenised_by_vllm_and_other_models_forwarded(client, router, vllm):
    _, tokenizer = load_base(router.run.recipe)
    chat = tokenizer.apply_chat_template(CHAT["messages"], add_generation_prompt=True)["input_ids"]
    plain = tokenizer("land 3")["input_ids"]
    for path, content, ids in (
        ("chat/completions", CHAT, chat),
        ("chat/completions", {**CHAT, "model": "run"}, chat),  # the run's name
        ("completions", {"prompt": "land 3"}, plain),
        ("completions", {"prompt": ["land 3"]}, plain),
    ):
        answer = client.post(f"/{path}", json=content, headers={"authorization": "Bearer key"})
        adapter = router.nearest(router.gates(ids))
        assert answer.headers["x-badit-adapter"] == adapter
        assert vllm.asked[-1] == (f"/v1/{path}", {**content, "model": adapter}, "Bearer key", [])
    for model, status in (("rivers", 200), ("base", 200), ("unknown", 404)):
        answer = client.post("/chat/completions", json={**CHAT, "model": model, "messages": 3})
        assert (answer.status_code, answer.headers["x-badit-adapter"]) == (status, model)
        assert vllm.asked[-1][1]["model"] == model
    assert [model["id"] for model in client.get("/models").json()["data"]] == ["auto", "base"]


@torch.no_grad()
def test_without_exports_each_prompt_gets_a_lora_equal_to_the_run(router, vllm):
    with proxied(Router(router.run, None), vllm.port) as port:
        for example in training_prompts(router)[::9]:
            prompt = example["input_ids"][: example["prompt_length"]]
            url = f"http://127.0.0.1:{port}/v1/completions"
            answer = httpx2.post(url, json={"model": "auto", "prompt": prompt})
            name = answer.headers["x-badit-adapter"]
            assert vllm.asked[-1][3] == [name], "the LoRA must be loaded during the request"
            assert unloaded(vllm), "the LoRA must be unloaded after the request"
            ids = torch.tensor([prompt])
            base, _ = load_base(router.run.recipe)
            base_logits = base(input_ids=ids).logits
            logits = router.model(input_ids=ids).logits
            lora = PeftModel.from_pretrained(base, str(vllm.copies / name))
            torch.testing.assert_close(lora(input_ids=ids).logits, logits, atol=1e-5, rtol=1e-5)
            assert (logits - base_logits).abs().max() > 0.05


@pytest.mark.parametrize(
    "options",
    [{"key": "embedding", "codes": "grouped"}, {"key": "layer", "codes": "grouped-random"}],
)
def test_gated_change_is_served_by_the_weights_of_its_change(trained, tmp_path, options):
    change = {"gated": "change", "gates": "clusters", "router_input": "standardised"}
    run = trained({**BADIT, **change, **options})
    compares_weights_of_changes(run, tmp_path)


def test_an_extended_run_gives_prompts_of_all_tasks_their_lora(run, tmp_path):
    data = write_animals(tmp_path / "animals.jsonl", train=12)
    extended = run.extend(
        data,
        output=tmp_path / "extended",
        progress=False,
        training={"learning_rate": 0.1, "num_train_epochs": 3},
    )
    router = Router(extended, None)
    added = training_prompts(router)
    earlier = training_prompts(Router(run, None))
    uses_new = []
    for example in [*added[::6], *earlier[::9]]:
        prompt = example["input_ids"][: example["prompt_length"]]
        uses_new.append(bool(router.gates(prompt)[:, -1].all()))
        assert_lora_equals_run(router, prompt, tmp_path / "lora")
    assert uses_new == [True] * len(added[::6]) + [False] * len(earlier[::9])


@torch.no_grad()
def assert_lora_equals_run(router, prompt, folder):
    folder.mkdir()
    router.write(router.gates(prompt), folder)
    base, _ = load_base(router.run.recipe)
    lora = PeftModel.from_pretrained(base, str(folder))
    ids = torch.tensor([prompt])
    expected = router.model(input_ids=ids).logits
    torch.testing.assert_close(lora(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)
    shutil.rmtree(folder)


@torch.no_grad()
def compares_weights_of_changes(run, tmp_path):
    router = Router(run, export(run, tmp_path / "tasks", all_tasks=True).folder)
    layers = adapted_layers(router.model)
    generator = torch.Generator().manual_seed(0)
    for gates_MK in torch.rand(5, len(layers), 4, generator=generator):
        distances = []
        for of_task_MK in router.gates_TMK:
            by_name = [
                dict(zip(router.modules, m.tolist(), strict=True)) for m in (gates_MK, of_task_MK)
            ]
            distances.append(sum(distance(layer, *by_name) for layer in layers))
        difference_TMK = router.gates_TMK - gates_MK
        squares_T = torch.einsum("tmk,mkl,tml->t", difference_TMK, router.gram_MKK, difference_TMK)
        torch.testing.assert_close(squares_T, torch.tensor(distances), rtol=1e-4, atol=1e-6)
        assert router.nearest(gates_MK) == router.exports[distances.index(min(distances))]
    for example in training_prompts(router)[::9]:
        prompt = example["input_ids"][: example["prompt_length"]]
        assert_lora_equals_run(router, prompt, tmp_path / "lora")


@pytest.mark.parametrize("exports", [True, False])
def test_streams_are_forwarded_by_chunk_and_end_when_the_client_leaves(router, vllm, exports):
    with proxied(router if exports else Router(router.run, None), vllm.port) as port:
        for leaves in (False, True):
            vllm.goes_on.clear()
            vllm.ended.clear()
            url, content = f"http://127.0.0.1:{port}/v1/chat/completions", {**CHAT, "stream": True}
            with httpx2.stream("POST", url, json=content, timeout=WAIT) as response:
                assert response.headers["content-type"].startswith("text/event-stream")
                chunks = response.iter_raw()
                assert next(chunks) == b"data: 1\n\n"
                if not leaves:
                    vllm.goes_on.set()
                    assert b"".join(chunks) == b"data: [DONE]\n\n"
            assert vllm.ended.wait(WAIT)
    assert unloaded(vllm)


def test_stopping_the_proxy_ends_a_stream_and_unloads_its_lora(router, vllm):
    with httpx2.Client(timeout=WAIT) as client:
        with proxied(Router(router.run, None), vllm.port) as port:
            url = f"http://127.0.0.1:{port}/v1/chat/completions"
            request = client.build_request("POST", url, json={**CHAT, "stream": True})
            response = client.send(request, stream=True)
            assert next(response.iter_raw()) == b"data: 1\n\n"
        assert unloaded(vllm)


def test_invalid_requests_are_refused_in_openai_format(client, vllm):
    for content, status, problem in (
        (b"{", 400, "request: invalid JSON"),
        (b"[]", 400, "request: must hold one JSON object, not a list"),
        *(({"prompt": prompt}, 400, NOT_ONE_PROMPT) for prompt in (["a", "b"], [1, True], [10**6])),
        (b'{"model": "base", "temperature": 1e999}', 400, "Out of range float values"),
        # This is read, but too deep to be written.
        (b'{"model": "base", "x": ' + b"[" * 970 + b"]" * 970 + b"}", 400, ""),
        ({"prompt": []}, 400, "prompt: must have 1 to 128 tokens, not 0"),
        ({"prompt": [1] * 129}, 400, "prompt: must have 1 to 128 tokens, not 129"),
        ({"prompt": "refused"}, 422, "/tokenize: {"),
        (b" " * (MAX_BODY + 1), 413, "the request is larger than 1024 KiB"),
    ):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        headers = {"Content-Type": "application/json"}
        answer = client.post("/completions", content=body, headers=headers)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (status, status)
        assert error["type"] == "invalid_request"
        assert problem in error["message"]
        assert error["message"].isprintable()
    assert not vllm.asked


def test_foreign_origins_hosts_and_content_types_are_refused(client, vllm):
    for headers in (
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Host": "evil.example"},
    ):
        answer = client.post("/chat/completions", json=CHAT, headers=headers)
        assert answer.status_code in (400, 403)
    assert client.post("/chat/completions", content="{}").status_code == 415
    assert not vllm.asked


def test_unreachable_vllm_or_missing_lora_loading_is_reported(router, vllm):
    with proxied(router, 9) as port:  # no server listens on this port
        for content in (CHAT, {**CHAT, "model": "rivers"}):
            answer = httpx2.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=content)
            message = answer.json()["error"]["message"]
            assert (answer.status_code, message.isprintable()) == (502, True)
            assert message.startswith("http://127.0.0.1:9: does not answer: ")
    with served(Starlette(routes=[])) as absent, proxied(Router(router.run, None), absent) as port:
        answer = httpx2.post(f"http://127.0.0.1:{port}/v1/completions", json={"prompt": [1, 2]})
        assert answer.status_code == 404
        assert answer.json()["error"]["message"].endswith("with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1")
    routes = [Route("/{path:path}", lambda _: JSONResponse({"no": 1}), methods=["GET", "POST"])]
    with served(Starlette(routes=routes)) as stranger, proxied(router, stranger) as port:
        for method, path in (("GET", "models"), ("POST", "completions")):
            url = f"http://127.0.0.1:{port}/v1/{path}"
            answer = httpx2.request(method, url, json={"prompt": "a"})
            assert (answer.status_code, "check --url" in answer.text) == (502, True)


def test_connections_that_vllm_closes_when_idle_are_not_used_again(router):
    with closing_reused_connections() as closing, proxied(router, closing) as port:
        url = f"http://127.0.0.1:{port}/v1/completions"
        for _ in range(4):
            answer = httpx2.post(url, json={"model": "base", "prompt": "a"}, timeout=WAIT)
            assert (answer.status_code, answer.text) == (200, "{}")


@pytest.mark.parametrize("hanging", ["load", "unload"])
def test_folder_of_a_lora_is_removed_while_vllm_hangs(router, vllm, tmp_path, monkeypatch, hanging):
    monkeypatch.setattr("badit.integrations.vllm.ANSWER_SECONDS", 0.5)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    vllm.hangs = f"/v1/{hanging}_lora_adapter"
    with proxied(Router(router.run, None), vllm.port) as port:
        url = f"http://127.0.0.1:{port}/v1/completions"
        answer = httpx2.post(url, json={"prompt": [1, 2]}, timeout=WAIT)
        if hanging == "load":
            assert answer.status_code == 502
            assert "does not answer: ReadTimeout" in answer.json()["error"]["message"]
        else:
            assert answer.status_code == 200
    assert not list(tmp_path.glob("badit-*-*")), "the temporary folder must be removed"


def test_command_serves_until_it_is_stopped(run, vllm):
    command = [sys.executable, "-m", "badit", "serve", str(run.path), "--port=0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    url = f"--url=http://127.0.0.1:{vllm.port}"
    with subprocess.Popen([*command, url], **pipes) as process:
        try:
            address = process.stdout.readline().split()[1].removesuffix(",")
            answer = httpx2.post(f"{address}/completions", json={"prompt": "land 3"}, timeout=WAIT)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=WAIT)
        finally:
            process.kill()
    assert answer.status_code == 200
    assert vllm.asked[-1][3] == [answer.headers["x-badit-adapter"]]
    assert process.returncode == 0
    assert "Traceback" not in errors
    assert unloaded(vllm)


def test_unsuitable_runs_exports_and_urls_are_refused(run, trained, tmp_path, command):
    for method in ({"name": "lora", "r": 2}, {"name": "mtl-lora", "r": 2}):
        refuses("do not depend on the prompt; serve its export", Router, trained(method), None)
    export(trained(BADIT | {"lora_alpha": 1.0}), tmp_path / "tasks", all_tasks=True)
    refuses("was not exported from the present weights of", Router, run, tmp_path / "tasks")
    for argument, problem in (
        (str(tmp_path), "has no task LoRAs; run badit export"),
        ("--url=localhost:8000", "--url: must be an address such as http://127.0.0.1:8000"),
        ("--url=http://127.0.0.1:80o0", "--url: cannot be used (Invalid port: '80o0')"),
    ):
        assert problem in command("serve", run.path, argument, "--port=0", code=2)

"""``badit serve`` over HTTP with a stand-in for vLLM: routed, forwarded and refused requests."""

import asyncio
import json
import shutil
import threading
import time
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
    return Router(
        run,
        export(
            run, tmp_path_factory.mktemp("exports") / "tasks", all_tasks=True, progress=False
        ).folder,
    )


@pytest.fixture
def vllm(run, tmp_path):
    """A stand-in for vLLM: its port, completion requests, LoRAs, and events that control a stream's second chunk."""
    _, tokenizer = load_base(run.recipe)
    here = SimpleNamespace(asked=[], loaded=[], removed_too_early=False, copies=tmp_path)
    here.goes_on, here.ended = threading.Event(), threading.Event()

    async def tokenize(request):
        content = await request.json()
        if content["prompt"] == "refused":
            return JSONResponse({"error": {"message": "no\nsuch prompt"}}, 422)
        chat = content.get("messages")
        ids = (
            tokenizer.apply_chat_template(chat, add_generation_prompt=True)
            if chat
            else tokenizer(content["prompt"])
        )
        return JSONResponse({"tokens": ids["input_ids"]})

    async def complete(request):
        content = await request.json()
        here.asked.append(
            (request.url.path, content, request.headers["authorization"], list(here.loaded))
        )
        if content["model"] == "unknown":
            return JSONResponse({"error": {"message": "no such model"}}, 404)
        return (
            StreamingResponse(chunks(), media_type="text/event-stream")
            if "stream" in content
            else JSONResponse({})
        )

    async def chunks():
        try:
            yield "data: 1\n\n"
            while not here.goes_on.is_set():
                await asyncio.sleep(0.01)
            yield "data: [DONE]\n\n"
        finally:
            here.ended.set()

    async def lora(request):
        content = await request.json()
        if request.url.path == "/v1/load_lora_adapter":
            shutil.copytree(content["lora_path"], here.copies / content["lora_name"])
            here.loaded.append(content["lora_name"])
        else:
            here.loaded.remove(content["lora_name"])
            here.removed_too_early |= not Path(content["lora_path"]).is_dir()
        return PlainTextResponse("Success")

    calls = {"tokenize": tokenize, "v1/load_lora_adapter": lora, "v1/unload_lora_adapter": lora}
    calls |= dict.fromkeys(["v1/completions", "v1/chat/completions"], complete)
    routes = [Route(f"/{path}", call, methods=["POST"]) for path, call in calls.items()]
    with served(
        Starlette(routes=[*routes, Route("/v1/models", JSONResponse(MODELS))])
    ) as here.port:
        yield here


def proxied(router, port):
    return served(application(router, f"http://127.0.0.1:{port}/v1/"))


@pytest.fixture
def client(router, vllm):
    with (
        proxied(router, vllm.port) as port,
        httpx2.Client(base_url=f"http://127.0.0.1:{port}/v1") as client,
    ):
        yield client


def unloaded(vllm):
    """Waits until no LoRA is loaded; returns False after WAIT seconds, or if a LoRA's folder was removed before."""
    until = time.monotonic() + WAIT
    while vllm.loaded and time.monotonic() < until:
        time.sleep(0.01)
    return not vllm.loaded and not vllm.removed_too_early


def training_prompts(router):
    recipe = router.run.recipe
    pairs = [(task, instance) for task in resolve(recipe).tasks for instance in task.train]
    return encoded(load_base(recipe)[1], recipe, pairs, router.model)


def test_prompt_is_routed_to_the_export_with_the_nearest_weights(client, router, vllm, run):
    kept = json.loads((run.path / "gates.json").read_text())["tasks"]
    chosen = []
    for example in training_prompts(router):
        batches = batches_by_task(
            [{**example, "task": "t"}], AnswerCollator(0), 1
        )  # gates ignore the answer
        distances = dict.fromkeys(kept, 0.0)
        layers = adapted_layers(router.model)
        for one, own_K in zip(layers, mean_gates(router.model, batches["t"]).values(), strict=True):
            own = one.layer.get_delta_weight(one.adapter, torch.tensor(own_K))
            for task, gates in kept.items():
                of_task = one.layer.get_delta_weight(
                    one.adapter, torch.tensor(gates[one.layer.name])
                )
                distances[task] += float((own - of_task).square().sum())
        chosen.append(min(distances, key=distances.__getitem__))
        prompt = example["input_ids"][: example["prompt_length"]]
        answer = client.post(
            "/completions", json={"model": "auto", "prompt": [prompt], "max_tokens": 3}
        )
        assert (answer.status_code, answer.headers["x-badit-adapter"]) == (200, chosen[-1])
        assert vllm.asked[-1][1] == {"model": chosen[-1], "prompt": [prompt], "max_tokens": 3}
    assert set(chosen) == {"cities", "rivers"}


def test_texts_and_chats_are_tokenised_by_vllm_and_other_models_forwarded(client, router, vllm):
    _, tokenizer = load_base(router.run.recipe)
    chat = tokenizer.apply_chat_template(CHAT["messages"], add_generation_prompt=True)["input_ids"]
    plain = tokenizer("land 3")["input_ids"]
    asked = [
        ("chat/completions", content, chat) for content in (CHAT, {**CHAT, "model": "run"})
    ]  # the run's name
    asked += [("completions", {"prompt": prompt}, plain) for prompt in ("land 3", ["land 3"])]
    for path, content, ids in asked:
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
            answer = httpx2.post(
                f"http://127.0.0.1:{port}/v1/completions", json={"model": "auto", "prompt": prompt}
            )
            name = answer.headers["x-badit-adapter"]
            assert vllm.asked[-1][3] == [name], "the LoRA must be loaded during the request"
            assert unloaded(vllm), "the LoRA must be unloaded after the request"
            ids = torch.tensor([prompt])
            base, own = (
                load_base(router.run.recipe)[0](input_ids=ids).logits,
                router.model(input_ids=ids).logits,
            )
            model = PeftModel.from_pretrained(
                load_base(router.run.recipe)[0], str(vllm.copies / name)
            )
            torch.testing.assert_close(model(input_ids=ids).logits, own, atol=1e-5, rtol=1e-5)
            assert (own - base).abs().max() > 0.05


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
            response = client.send(
                client.build_request("POST", url, json={**CHAT, "stream": True}), stream=True
            )
            assert next(response.iter_raw()) == b"data: 1\n\n"
        assert unloaded(vllm)


def test_invalid_requests_are_refused_in_openai_format(client, vllm):
    for content, status, problem in (
        (b"{", 400, "request: invalid JSON"),
        (b"[]", 400, "request: must hold one JSON object, not a list"),
        *(({"prompt": prompt}, 400, NOT_ONE_PROMPT) for prompt in (["a", "b"], [1, True], [10**6])),
        (b'{"model": "base", "temperature": 1e999}', 400, "Out of range float values"),
        (
            b'{"model": "base", "x": ' + b"[" * 970 + b"]" * 970 + b"}",
            400,
            "",
        ),  # read, but too deep to be written
        ({"prompt": []}, 400, "prompt: must have 1 to 128 tokens, not 0"),
        ({"prompt": [1] * 129}, 400, "prompt: must have 1 to 128 tokens, not 129"),
        ({"prompt": "refused"}, 422, "/tokenize: {"),
        (b" " * (MAX_BODY + 1), 413, "the request is larger than 1024 KiB"),
    ):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        answer = client.post(
            "/completions", content=body, headers={"Content-Type": "application/json"}
        )
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["type"]) == (
            status,
            status,
            "invalid_request",
        )
        assert problem in error["message"]
        assert error["message"].isprintable()
    assert not vllm.asked


def test_foreign_origins_hosts_and_content_types_are_refused(client, vllm):
    for headers in (
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Host": "evil.example"},
    ):
        assert client.post("/chat/completions", json=CHAT, headers=headers).status_code in (
            400,
            403,
        )
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
    other = Starlette(
        routes=[
            Route("/{path:path}", lambda request: JSONResponse({"no": 1}), methods=["GET", "POST"])
        ]
    )
    with served(other) as stranger, proxied(router, stranger) as port:
        for method, path in (("GET", "models"), ("POST", "completions")):
            answer = httpx2.request(
                method, f"http://127.0.0.1:{port}/v1/{path}", json={"prompt": "a"}
            )
            assert (answer.status_code, "check --url" in answer.text) == (502, True)


def test_unsuitable_runs_exports_and_urls_are_refused(run, trained, tmp_path, command):
    for method in ({"name": "lora", "r": 2}, {"name": "mtl-lora", "r": 2}):
        refuses("do not depend on the prompt; serve its export", Router, trained(method), None)
    export(trained(BADIT | {"lora_alpha": 1.0}), tmp_path / "tasks", all_tasks=True, progress=False)
    refuses("was not exported from the present weights of", Router, run, tmp_path / "tasks")
    wrong = {str(tmp_path): "has no task LoRAs; run badit export"}
    wrong |= {"--url=localhost:8000": "--url: must be an address such as http://127.0.0.1:8000"}
    wrong |= {"--url=http://127.0.0.1:80o0": "--url: cannot be used (Invalid port: '80o0')"}
    for argument, problem in wrong.items():
        assert problem in command("serve", run.path, argument, "--port=0", code=2)

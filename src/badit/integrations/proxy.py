"""``badit serve``: an OpenAI-compatible proxy for vLLM that chooses or writes a LoRA for each prompt's gates.

The LoRA is the nearest export or is written for the request. The distance between gates is that of their weights:

    ‖ΔW(g) − ΔW(m)‖² = s² Σ (g − m)ᵀ G (g − m),   G = (BᵀB) ∘ (AAᵀ), summed over the components of every two experts

Shape suffixes: T = exports, M = adapted modules, K = experts, N = components.
"""

import shlex
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import quote
from uuid import uuid4

import anyio
import httpx2
import torch
from anyio import to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send
from torch.nn.functional import one_hot

from badit.analysis.gates import GATES_FILE, Experts, adapted_layers, mean_gates, read_gates
from badit.data.encoding import IGNORED_LABEL
from badit.export.adapter import write_adapter
from badit.export.factors import NOT_A_LORA, beyond_lora, mixture_factors
from badit.hub.card import refuse_other_weights
from badit.integrations.studio.server import (
    HOST,
    LOCAL_HOSTS,
    ending_with,
    json_body,
    listen,
    run_until_ended,
)
from badit.runs.folder import RECORD, RunFolder
from badit.runs.resolved import open_run
from badit.support.console import show
from badit.support.errors import BaditError, explained
from badit.support.files import read_json, refuse_links
from badit.training.loading import load_run

AUTO = "auto"
MAX_BODY = 1024 * 1024


class Router:
    """A loaded run that computes a prompt's gates and chooses or writes the adapter for them.

    ``exports`` is the folder written by ``badit export --all-tasks``; None to write an adapter for every prompt.
    BaditError if the run's gates do not depend on the prompt, or the folder has no exports of its tasks and weights.
    """

    def __init__(self, run: RunFolder, exports: str | Path | None) -> None:
        self.run, resolved = run, open_run(run)
        recipe, method = resolved.recipe, resolved.method
        if method.needs_tasks or getattr(method.config, "has_fixed_gates", True):
            raise BaditError(
                f"{run.path}: the gates of {method.name} do not depend on the prompt; serve its export"
            )
        if extra := beyond_lora(method.config):
            raise BaditError(f"{run.path}: method.{extra[0]}: {NOT_A_LORA}, which vLLM cannot load")
        self.model: Any = load_run(resolved)[0]
        self.base = recipe.model.name
        self.layers = adapted_layers(self.model)
        self.exports: list[str] = []
        if exports is not None:
            refuse_links(Path(exports))
            if not (files := sorted(Path(exports).glob(f"*/{GATES_FILE}"))):
                command = shlex.join(
                    ["badit", "export", str(run.path), "--all-tasks", "-o", str(exports)]
                )
                raise BaditError(f"{exports}: has no task LoRAs; run {command}")
            refuse_other_weights(
                run, {file.parent: read_json(file.with_name(RECORD)) for file in files}
            )
            self.exports = [file.parent.name for file in files]
            gates = [read_gates(file, self.model) for file in files]
            self.gates_TMK = torch.tensor(
                [[of_task[one.layer.name] for one in self.layers] for of_task in gates]
            )
            self.gram_MKK = torch.stack([_gram(one) for one in self.layers])

    def gates(self, ids: Any) -> torch.Tensor:
        """Returns the gates (M, K) of a prompt's token ids, averaged over positions; BaditError for invalid ids."""
        limit = (
            getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
            or MAX_BODY
        )
        number = self.model.get_input_embeddings().num_embeddings
        if not isinstance(ids, list) or not all(
            type(token) is int and 0 <= token < number for token in ids
        ):
            raise BaditError(
                "prompt: must be one text or the token ids of one; name a model to send several prompts"
            )
        if not 0 < len(ids) <= limit:
            raise BaditError(f"prompt: must have 1 to {limit} tokens, not {len(ids)}")
        input_ids = torch.tensor([ids])
        no_answer = {
            "attention_mask": torch.ones_like(input_ids),
            "labels": torch.full_like(input_ids, IGNORED_LABEL),
        }
        return torch.tensor(
            [*mean_gates(self.model, [{"input_ids": input_ids, **no_answer}]).values()]
        )

    def nearest(self, gates_MK: torch.Tensor) -> str:
        """Returns the export whose weights are nearest to those of the gates."""
        difference_TMK = self.gates_TMK - gates_MK
        distances_T = torch.einsum("tmk,mkl,tml->t", difference_TMK, self.gram_MKK, difference_TMK)
        return self.exports[int(distances_T.argmin())]

    def write(self, gates_MK: torch.Tensor, folder: Path) -> None:
        """Writes the LoRA for these gates."""
        gates = dict(zip((one.layer.name for one in self.layers), gates_MK.tolist(), strict=True))
        write_adapter(
            folder, mixture_factors(self.model, gates), self.model.get_base_model(), self.base
        )


@torch.no_grad()
def _gram(one: Experts) -> torch.Tensor:
    a_RI, b_ON = (factor.float() for factor in one.layer.factors(one.adapter))
    a_NI = a_RI.repeat(b_ON.shape[1] // len(a_RI), 1)
    of_expert_NK = one_hot(one.layer.expert_of(one.adapter)).float()
    return (of_expert_NK.T @ ((b_ON.T @ b_ON) * (a_NI @ a_NI.T)) @ of_expert_NK).cpu()


def serve(run: RunFolder, exports: str | None, *, url: str, port: int) -> None:
    """Serves a run in front of the vLLM server at ``url`` until Ctrl-C or SIGTERM; port 0 uses a free port."""
    with explained("--url", action="used", any_error=True):
        if httpx2.URL(url).scheme not in ("http", "https"):
            raise BaditError(
                f"--url: must be an address such as http://127.0.0.1:8000, not {url!r:.80}"
            )
    with listen(port) as listening:
        web = application(Router(run, exports), url)
        show(
            f"Proxy: http://{HOST}:{listening.getsockname()[1]}/v1, forwards to {url}   (Ctrl-C stops it)"
        )
        run_until_ended(web, listening)


def application(router: Router, url: str) -> Starlette:
    """Returns the proxy of a loaded run in front of the vLLM server at ``url``."""
    url = url.rstrip("/").removesuffix("/v1")
    options: Any = {
        "limits": httpx2.Limits(),
        "timeout": httpx2.Timeout(10, read=None),
    }  # no limit on connections
    client = httpx2.AsyncClient(
        base_url=url, trust_env=False, headers={"accept-encoding": "identity"}, **options
    )
    one_at_a_time = anyio.CapacityLimiter(1)

    @asynccontextmanager
    async def running(web: Starlette) -> AsyncIterator[None]:
        async with client:
            yield

    def key(request: Request) -> dict[str, str]:
        return {"authorization": request.headers.get("authorization", "")}

    async def ask(
        request: Request, method: str, path: str, content: Any = None, hint: str = ""
    ) -> httpx2.Response:
        answer = await client.request(method, path, json=content, headers=key(request))
        if answer.is_error:
            raise HTTPException(
                answer.status_code, f"{url}{path}: {' '.join(answer.text.split())[:500]}{hint}"
            )
        return answer

    def part_of(answer: httpx2.Response, key: str) -> list[Any]:
        try:
            return list(answer.json()[key])
        except (ValueError, TypeError, KeyError):
            raise HTTPException(
                502, f"{answer.url}: is not the answer of a vLLM server; check --url"
            ) from None

    async def models(request: Request) -> Response:
        found = part_of(await ask(request, "GET", "/v1/models"), "data")
        return JSONResponse(
            {
                "object": "list",
                "data": [{"id": AUTO, "object": "model", "owned_by": "badit"}, *found],
            }
        )

    async def completion(request: Request) -> Any:
        """Sends the request to vLLM with the adapter for its prompt as the model, and streams the response."""
        content = await json_body(request, MAX_BODY, programs=True)

        async def forward(scope: Scope, receive: Receive, send: Send) -> None:
            async with ending_with(request), adapter_for(request, content) as name:
                options: Any = {"json": {**content, "model": name}, "headers": key(request)}
                async with client.stream("POST", request.url.path, **options) as answer:
                    headers = {
                        "content-type": answer.headers.get("content-type", ""),
                        "x-badit-adapter": quote(name),
                    }
                    with suppress(
                        httpx2.HTTPError
                    ):  # after the start, an error can only end the connection
                        await StreamingResponse(answer.aiter_raw(), answer.status_code, headers)(
                            scope, receive, send
                        )

        return forward

    @asynccontextmanager
    async def adapter_for(request: Request, content: dict[str, Any]) -> AsyncIterator[str]:
        """A context in which vLLM has the adapter for a request; yields its name, or the request's own model."""
        model = content.get("model") or AUTO
        if model not in (AUTO, router.run.path.resolve().name):
            yield str(model)
            return
        gates_MK = await gates_of(request, content)
        if router.exports:
            yield router.nearest(gates_MK)
            return
        with TemporaryDirectory(prefix="badit-") as folder:
            await to_thread.run_sync(router.write, gates_MK, Path(folder))
            # A new name for each request: vLLM caches prefixes by name.
            about = {"lora_name": f"badit-{uuid4().hex}", "lora_path": folder}
            hint = "; vLLM must run on this machine, with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
            with anyio.CancelScope(
                shield=True
            ):  # otherwise a disconnect now would leave the LoRA in vLLM
                await ask(request, "POST", "/v1/load_lora_adapter", about, hint)
            try:
                yield about["lora_name"]
            finally:
                with anyio.CancelScope(shield=True), suppress(HTTPException, httpx2.HTTPError):
                    await ask(request, "POST", "/v1/unload_lora_adapter", about)

    async def gates_of(request: Request, content: dict[str, Any]) -> torch.Tensor:
        ids, chat = content.get("prompt"), request.url.path.endswith("/chat/completions")
        if isinstance(ids, list) and len(ids) == 1 and not isinstance(ids[0], int):
            ids = ids[0]  # a batch of one
        if chat or isinstance(ids, str):
            options = (
                content if chat else {"add_special_tokens": content.get("add_special_tokens", True)}
            )
            text = {**options, "model": None, "prompt": None if chat else ids}
            ids = part_of(await ask(request, "POST", "/tokenize", text), "tokens")
        return await to_thread.run_sync(router.gates, ids, limiter=one_at_a_time)

    async def failed(request: Request, error: Exception) -> Response:
        status, message = getattr(error, "status_code", 400), getattr(error, "detail", str(error))
        if isinstance(error, httpx2.HTTPError):
            status, message = 502, f"{url}: does not answer: {error or type(error).__name__}"
        about = {"message": message, "type": "invalid_request" if status < 500 else "server_error"}
        return JSONResponse({"error": {**about, "param": None, "code": status}}, status_code=status)

    routes = [
        Route(f"/v1/{path}", completion, methods=["POST"])
        for path in ("chat/completions", "completions")
    ]
    handled = [
        ValueError,
        RecursionError,
        HTTPException,
        ClientDisconnect,
        httpx2.HTTPError,
    ]  # the first two: of JSON
    return Starlette(
        routes=[*routes, Route("/v1/models", models)],
        middleware=[LOCAL_HOSTS],
        exception_handlers=dict.fromkeys(handled, failed),
        lifespan=running,
    )

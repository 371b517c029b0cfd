"""``badit serve``: an OpenAI-compatible proxy for vLLM.

It chooses or writes a LoRA for each prompt's gates. The LoRA is the nearest export, or it is
written for the request.
"""

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext, suppress
from functools import partial
from typing import Any
from urllib.parse import quote

import anyio
import httpx2
from anyio import to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from badit.integrations.routing import Router
from badit.integrations.vllm import VllmClient, temporary_lora
from badit.integrations.web import (
    LOCAL_HOSTS,
    address,
    ending_with,
    json_body,
    listen,
    run_until_ended,
)
from badit.runs.folder import RunFolder
from badit.support.console import show
from badit.support.errors import BaditError, explained

AUTO = "auto"
MAX_BODY = 1024 * 1024


def serve(run: RunFolder, exports: str | None, *, url: str, port: int) -> None:
    """Serves a run in front of the vLLM server at ``url`` until Ctrl-C or SIGTERM.

    Port 0 uses a free port.
    """
    with explained("--url", action="used", any_error=True):
        if httpx2.URL(url).scheme not in ("http", "https"):
            raise BaditError(
                f"--url: must be an address such as http://127.0.0.1:8000, not {url!r:.80}"
            )
    with listen(port) as listening:
        web = application(Router(run, exports), url)
        show(f"Proxy: {address(listening)}/v1, forwards to {url}   (Ctrl-C stops it)")
        run_until_ended(web, listening)


def application(router: Router, url: str) -> Starlette:
    """Returns the proxy of a loaded run in front of the vLLM server at ``url``."""
    vllm = VllmClient(url)
    proxy = _Proxy(router, vllm)

    @asynccontextmanager
    async def lifespan(web: Starlette) -> AsyncIterator[None]:
        async with vllm.http:
            yield

    # ValueError and RecursionError are of JSON. BaditError is a ValueError.
    refused = [ValueError, RecursionError, HTTPException, ClientDisconnect, httpx2.HTTPError]
    return Starlette(
        routes=[
            Route("/v1/chat/completions", proxy.completion, methods=["POST"]),
            Route("/v1/completions", proxy.completion, methods=["POST"]),
            Route("/v1/models", proxy.models),
        ],
        middleware=[LOCAL_HOSTS],
        exception_handlers=dict.fromkeys(refused, proxy.refused),
        lifespan=lifespan,
    )


class _Proxy:
    """The answers to requests."""

    def __init__(self, router: Router, vllm: VllmClient) -> None:
        self.router = router
        self.vllm = vllm
        # Measuring the gates of a prompt changes methods of the run's model.
        self.one_at_a_time = anyio.CapacityLimiter(1)

    async def models(self, request: Request) -> Response:
        auto = {"id": AUTO, "object": "model", "owned_by": "badit"}
        models = await self.vllm.models(_key(request))
        return JSONResponse({"object": "list", "data": [auto, *models]})

    async def completion(self, request: Request) -> Any:
        """Sends a request to vLLM with the LoRA for its prompt, and streams the response."""
        content = await json_body(request, MAX_BODY, programs=True)

        # An ASGI application as the response: the LoRA stays in vLLM until the stream has ended.
        async def forward(scope: Scope, receive: Receive, send: Send) -> None:
            async with (
                ending_with(request),
                await self._lora_for(request, content) as lora,
                self.vllm.complete(
                    request.url.path, _key(request), {**content, "model": lora}
                ) as answer,
            ):
                headers = {
                    "content-type": answer.headers.get("content-type", ""),
                    "x-badit-adapter": quote(lora),  # headers are ASCII
                }
                response = StreamingResponse(answer.aiter_raw(), answer.status_code, headers)
                # After the start, an error can only end the connection.
                with suppress(httpx2.HTTPError):
                    await response(scope, receive, send)

        return forward

    async def _lora_for(
        self, request: Request, content: dict[str, Any]
    ) -> AbstractAsyncContextManager[str]:
        """Returns a context with the name of the LoRA for a request, or of its own model."""
        model = content.get("model") or AUTO
        if model not in (AUTO, self.router.run.path.resolve().name):
            return nullcontext(str(model))
        # The gates must depend on the same tokens as vLLM's answer.
        ids = await self._token_ids(request, content)
        gates_MK = await to_thread.run_sync(self.router.gates, ids, limiter=self.one_at_a_time)
        if self.router.exports:
            return nullcontext(self.router.nearest(gates_MK))
        return temporary_lora(self.vllm, partial(self.router.write, gates_MK), _key(request))

    async def _token_ids(self, request: Request, content: dict[str, Any]) -> Any:
        """Returns the token ids of a prompt. vLLM tokenises chats and texts."""
        if request.url.path.endswith("/chat/completions"):
            # vLLM does not know the model "auto".
            chat = {**content, "model": None, "prompt": None}
            return await self.vllm.tokenize(chat, _key(request))
        prompt = content.get("prompt")
        if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
            prompt = prompt[0]  # a batch of one
        if not isinstance(prompt, str):
            return prompt
        text = {"prompt": prompt, "add_special_tokens": content.get("add_special_tokens", True)}
        return await self.vllm.tokenize(text, _key(request))

    async def refused(self, request: Request, error: Exception) -> Response:
        """Returns an error in OpenAI's format."""
        status = getattr(error, "status_code", 400)
        message = getattr(error, "detail", str(error))
        if isinstance(error, httpx2.HTTPError):
            status = 502
            message = f"{self.vllm.url}: does not answer: {str(error) or type(error).__name__}"
        kind = "invalid_request" if status < 500 else "server_error"
        content = {"message": message, "type": kind, "param": None, "code": status}
        return JSONResponse({"error": content}, status_code=status)


def _key(request: Request) -> dict[str, str]:
    """Returns the header with the key of a request, which vLLM may require."""
    return {"authorization": request.headers.get("authorization", "")}

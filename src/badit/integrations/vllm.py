"""A vLLM server: its HTTP client, and LoRAs that it has loaded for a single request."""

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

import anyio
import httpx2
from anyio import to_thread
from starlette.exceptions import HTTPException

_LOAD_FIX = "; vLLM must run on this machine, with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"

ANSWER_SECONDS = 30  # for every request except completions, which may take longer

Headers = Mapping[str, str]


class VllmClient:
    """Sends requests to the vLLM server at ``url``, within ``async with client.http``.

    Raises:
        HTTPException: vLLM refuses a request, or its answer is not that of a vLLM server.
        httpx2.HTTPError: vLLM does not answer.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.http = httpx2.AsyncClient(
            base_url=self.url,
            trust_env=False,  # HTTP_PROXY is for other servers
            # The bytes of a response are forwarded as they are.
            headers={"accept-encoding": "identity"},
            # Each request has its own connection. vLLM may close an idle one at any time, also
            # while the next request is sent, and this request must not be sent twice.
            limits=httpx2.Limits(max_keepalive_connections=0),
            timeout=httpx2.Timeout(10, read=ANSWER_SECONDS),
        )

    def complete(
        self, path: str, headers: Headers, content: Any
    ) -> AbstractAsyncContextManager[httpx2.Response]:
        """Sends a completion request; a context with its response, which may take any time."""
        timeout = httpx2.Timeout(10, read=None)
        return self.http.stream("POST", path, json=content, headers=headers, timeout=timeout)

    async def ask(
        self, path: str, headers: Headers, content: Any = None, *, fix: str = ""
    ) -> httpx2.Response:
        """Sends the content, if any, and returns the response; ``fix`` is added to a refusal."""
        method = "GET" if content is None else "POST"
        response = await self.http.request(method, path, json=content, headers=headers)
        if response.is_error:
            problem = " ".join(response.text.split())[:500]
            raise HTTPException(response.status_code, f"{self.url}{path}: {problem}{fix}")
        return response

    async def models(self, headers: Headers) -> list[Any]:
        """Returns the descriptions of the models and LoRAs."""
        return _list_of(await self.ask("/v1/models", headers), "data")

    async def tokenize(self, prompt: Mapping[str, Any], headers: Headers) -> list[Any]:
        """Returns the token ids of a chat or of a text."""
        return _list_of(await self.ask("/tokenize", headers, prompt), "tokens")


def _list_of(response: httpx2.Response, key: str) -> list[Any]:
    try:
        return list(response.json()[key])
    except (ValueError, TypeError, KeyError):
        problem = "is not the answer of a vLLM server; check --url"
        raise HTTPException(502, f"{response.url}: {problem}") from None


@asynccontextmanager
async def temporary_lora(
    client: VllmClient, write: Callable[[Path], None], headers: Headers
) -> AsyncIterator[str]:
    """A context in which vLLM has a LoRA, which ``write`` writes into a folder; yields its name."""
    with TemporaryDirectory(prefix="badit-") as folder:
        await to_thread.run_sync(write, Path(folder))
        # A new name for each request: vLLM caches prefixes by name.
        lora = {"lora_name": f"badit-{uuid4().hex}", "lora_path": folder}
        try:
            with anyio.CancelScope(shield=True):  # a disconnect now would leave the LoRA in vLLM
                await client.ask("/v1/load_lora_adapter", headers, lora, fix=_LOAD_FIX)
            yield lora["lora_name"]
        finally:
            with anyio.CancelScope(shield=True), suppress(HTTPException, httpx2.HTTPError):
                await client.ask("/v1/unload_lora_adapter", headers, lora)

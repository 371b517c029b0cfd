"""A web server for programs and browsers on this machine only, of the studio and the vLLM proxy.

Other pages in the same browser can also send requests here. A foreign ``Host`` (a name that
resolves to 127.0.0.1) is therefore refused, and so are requests with content whose ``Origin`` is
not this page.
"""

import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from badit.support.console import show
from badit.support.errors import BaditError, explained
from badit.support.files import read_json

try:
    import anyio
    import uvicorn
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
except ModuleNotFoundError as error:
    raise BaditError(
        f"module {error.name} is not installed; run pip install 'badit[studio]'"
    ) from None

HOST = "127.0.0.1"
LOCAL_HOSTS = Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])

_GRACE = 5  # seconds for a running answer to stop at its next token
_HEADERS = {
    # The empty icon is a data: URL.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


def listen(port: int) -> socket.socket:
    """Returns a socket that only this machine can reach; port 0 uses a free port.

    Connections wait in it until they are served.
    """
    try:
        return socket.create_server((HOST, port))
    except OSError as error:  # its own text repeats the address
        reason = os.strerror(error.errno) if error.errno else error
        raise BaditError(
            f"--port: {port} cannot be used ({reason}); use another port, or 0"
        ) from None


def address(listening: socket.socket) -> str:
    """Returns the URL of a socket."""
    return f"http://{HOST}:{listening.getsockname()[1]}"


def server(web: Starlette) -> uvicorn.Server:
    """Returns a server with ``run(sockets=[listening])``.

    It adds the security headers to all responses.
    """
    config = uvicorn.Config(
        web,
        lifespan="on",
        ws="none",  # no WebSockets
        headers=list(_HEADERS.items()),
        proxy_headers=False,  # nobody may set another client's address
        server_header=False,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=_GRACE,
    )
    web.state.server = uvicorn.Server(config)
    return web.state.server


def run_until_ended(web: Starlette, listening: socket.socket) -> None:
    """Serves an application until Ctrl-C or SIGTERM."""
    try:
        server(web).run(sockets=[listening])
    except KeyboardInterrupt:  # uvicorn has closed all connections and raises the signal again
        show("")


async def json_body(request: Request, limit: int, *, programs: bool = False) -> dict[str, Any]:
    """Returns a request's JSON object of at most ``limit`` bytes.

    Browsers always send an Origin. Requests of other pages are refused; ``programs`` allows
    requests without an Origin. HTTPException or BaditError for anything else.
    """
    this_page = f"http://{request.headers.get('host')}"
    if request.headers.get("origin", this_page if programs else "") != this_page:
        raise HTTPException(403, "the request does not come from this page")
    # Browsers send JSON to another site only after a preflight request, which is refused.
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise HTTPException(415, "the request must be application/json")

    # The received bytes are counted, because a stated length may be missing or wrong.
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise HTTPException(413, f"the request is larger than {limit // 1024} KiB")
    with explained("request"):
        return read_json(Path("request"), body.decode())


@asynccontextmanager
async def ending_with(request: Request) -> AsyncIterator[None]:
    """A context whose work is cancelled when the client disconnects or the server stops.

    The server would wait for the work.
    """

    async def cancel_at_end() -> None:
        while not (request.app.state.server.should_exit or await request.is_disconnected()):
            await anyio.sleep(0.1)
        group.cancel_scope.cancel()

    try:
        async with anyio.create_task_group() as group:
            group.start_soon(cancel_at_end)
            yield
            group.cancel_scope.cancel()
    except ExceptionGroup as errors:  # of the task group, in which one task has failed
        raise errors.exceptions[0] from None

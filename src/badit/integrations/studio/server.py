"""The studio's web server, for a browser on this machine only; ``badit serve`` uses parts of it.

Other pages in the same browser can also send requests here. A foreign ``Host`` (a name that resolves to 127.0.0.1) is
therefore refused, and so are requests with content whose ``Origin`` is not this page.
"""

import json
import os
import socket
import sys
import threading
import webbrowser
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import CancelledError
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from badit.integrations.studio import Question, Session
from badit.report import chart_config
from badit.runs.folder import RunFolder
from badit.support.console import show
from badit.support.errors import BaditError, explained
from badit.support.files import read_json

try:
    import anyio
    import uvicorn
    from anyio import from_thread, to_thread
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Mount, Route
    from starlette.staticfiles import StaticFiles
    from starlette.types import Receive, Scope, Send
except ModuleNotFoundError as error:
    raise BaditError(
        f"module {error.name} is not installed; run pip install 'badit[studio]'"
    ) from None

HOST = "127.0.0.1"
MAX_BODY = 128 * 1024
LOCAL_HOSTS = Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
_GRACE = 5  # seconds for a running answer to stop at its next token
_HEADERS = {
    # The empty icon is a data: URL.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


def serve(run: RunFolder, *, port: int, browser: bool) -> None:
    """Serves the page of a run until Ctrl-C or SIGTERM and prints its address; port 0 uses a free port."""
    with listen(port) as listening:
        session = Session(run)
        # The page can be used meanwhile. A daemon thread does not delay the exit.
        threading.Thread(target=session.measure, daemon=True).start()
        url = f"http://{HOST}:{listening.getsockname()[1]}"
        show(f"Studio: {url}   (Ctrl-C stops it)")
        has_display = (
            sys.platform != "linux"
            or os.environ.get("DISPLAY")
            or os.environ.get("WAYLAND_DISPLAY")
        )
        if browser and has_display:  # otherwise a text browser could take over the terminal
            webbrowser.open(url)
        run_until_ended(application(session), listening)


def run_until_ended(web: Starlette, listening: socket.socket) -> None:
    """Serves an application until Ctrl-C or SIGTERM."""
    try:
        server(web).run(sockets=[listening])
    except KeyboardInterrupt:  # uvicorn has closed all connections and raises the signal again
        show("")


def listen(port: int) -> socket.socket:
    """Returns a socket that only this machine can reach; connections wait in it until they are served."""
    try:
        return socket.create_server((HOST, port))
    except OSError as error:  # its own text repeats the address
        reason = os.strerror(error.errno) if error.errno else error
        raise BaditError(
            f"--port: {port} cannot be used ({reason}); use another port, or 0"
        ) from None


def server(web: Starlette) -> uvicorn.Server:
    """Returns a server with ``run(sockets=[listening])``, which adds the security headers to all responses."""
    options: dict[str, Any] = {
        "lifespan": "on",
        "ws": "none",
        "proxy_headers": False,
        "server_header": False,
    }
    options |= {"log_level": "warning", "access_log": False, "timeout_graceful_shutdown": _GRACE}
    web.state.server = uvicorn.Server(
        uvicorn.Config(web, headers=list(_HEADERS.items()), **options)
    )
    return web.state.server


def application(session: Session) -> Starlette:
    """Returns the web application of a loaded run."""
    one_at_a_time = anyio.CapacityLimiter(1)
    colours = {mode: chart_config(mode)["range"]["diverging"] for mode in ("light", "dark")}
    about = {**session.about(), "colours": colours}

    async def task(request: Request) -> Response:
        return JSONResponse(session.task(request.query_params.get("name", "")))

    async def answer(request: Request) -> Any:
        content = await json_body(request, MAX_BODY)
        with explained("request"):
            question = Question.model_validate(content)
        session.check(question)
        return partial(_stream, session, question, one_at_a_time)

    return Starlette(
        routes=[
            Route("/api/run", JSONResponse(about), methods=["GET"]),
            Route("/api/task", task),
            Route("/api/answer", answer, methods=["POST"]),
            # look.css is that of the report.
            Mount(
                "/",
                StaticFiles(
                    packages=[("badit.integrations.studio", "page"), ("badit.report", "templates")],
                    html=True,
                ),
            ),
        ],
        middleware=[LOCAL_HOSTS],
        exception_handlers=dict.fromkeys([BaditError, HTTPException, ClientDisconnect], _refused),
    )


async def json_body(request: Request, limit: int, *, programs: bool = False) -> dict[str, Any]:
    """Returns a request's JSON object of at most ``limit`` bytes; HTTPException or BaditError for anything else.

    Browsers always send an Origin. Requests of other pages are refused; ``programs`` allows requests without an Origin.
    """
    own_page = f"http://{request.headers.get('host')}"
    if request.headers.get("origin", own_page if programs else "") != own_page:
        raise HTTPException(403, "the request does not come from this page")
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise HTTPException(415, "the request must be application/json")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise HTTPException(413, f"the request is larger than {limit // 1024} KiB")
    with explained("request"):
        return read_json(Path("request"), body.decode())


async def _refused(request: Request, error: Exception) -> Response:
    message = getattr(error, "detail", str(error))
    return JSONResponse({"error": message}, status_code=getattr(error, "status_code", 400))


async def _stream(
    session: Session,
    question: Question,
    limiter: anyio.CapacityLimiter,
    scope: Scope,
    receive: Receive,
    send: Send,
) -> None:
    """Answers in a thread, as soon as the limiter allows this, and sends each event as a server-sent event.

    The answer stops at its next event if the client disconnects or the server stops. The thread is used until then.
    """

    async def send_event(name: str, data: Mapping[str, Any]) -> None:
        event = f"event: {name}\ndata: {json.dumps(data, allow_nan=False)}\n\n"
        await send({"type": "http.response.body", "body": event.encode(), "more_body": True})

    def show(name: str, data: Mapping[str, Any]) -> None:
        from_thread.check_cancelled()
        from_thread.run(send_event, name, data)

    headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    last = "error", {"message": "the studio was stopped"}
    async with ending_with(Request(scope, receive)):
        try:
            await to_thread.run_sync(session.answer, question, show, limiter=limiter)
            last = "done", {}
        except BaditError as error:
            last = "error", {"message": str(error)}
        except CancelledError:  # raised in the thread if sending an event is cancelled
            pass
    await send_event(*last)
    await send({"type": "http.response.body", "body": b""})


@asynccontextmanager
async def ending_with(request: Request) -> AsyncIterator[None]:
    """A context whose work is cancelled when the client disconnects or the server, which would wait for it, stops."""

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

"""The studio's pages and calls, for a browser on this machine alone.

Other pages that the same browser has open may send requests here, too. So names other than this machine's are refused
in ``Host`` (a foreign name that has been made to resolve to 127.0.0.1), and so are calls whose ``Origin`` is not this
page. What data and models say reaches the page as JSON, which it shows as text; its policy lets nothing else run.
"""

from __future__ import annotations

import threading
from importlib import resources
from pathlib import Path
from typing import Any

import anyio
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from badit.errors import BaditError, first_problem, one_line
from badit.files import parse_json
from badit.report.theme import chart_config
from badit.studio.events import AnswerStream
from badit.studio.session import Question, Session

HOSTS = ["127.0.0.1", "localhost"]
MAX_BODY = 128 * 1024

# By address, where a file lies and what it is.
_FILES = {
    "/": ("badit.studio", "page/index.html", "text/html"),
    "/studio.css": ("badit.studio", "page/studio.css", "text/css"),
    "/studio.js": ("badit.studio", "page/studio.js", "text/javascript"),
    "/events.js": ("badit.studio", "page/events.js", "text/javascript"),
    "/mixture.js": ("badit.studio", "page/mixture.js", "text/javascript"),
    "/sliders.js": ("badit.studio", "page/sliders.js", "text/javascript"),
    "/look.css": ("badit.report", "templates/look.css", "text/css"),
}
_POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "connect-src": "'self'",
    "img-src": "data:",  # the empty icon
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
}
_HEADERS = {
    "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in _POLICY.items()),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


def application(session: Session) -> Starlette:
    """The web application for a loaded run. Its ``state.ending``, once set, ends the answer that is being written."""
    lock, ending = anyio.Lock(), threading.Event()
    colours = {mode: chart_config(mode)["range"]["diverging"] for mode in ("light", "dark")}
    about = {**session.about(), "colours": colours}

    async def show_about(request: Request) -> Response:
        return JSONResponse(about)

    async def show_task(request: Request) -> Response:
        return JSONResponse(session.task(request.query_params.get("name", "")))

    async def answer(request: Request) -> Response:
        question = await _question(request)
        session.check(question)
        return AnswerStream(lambda show: session.answer(question, show), lock, ending)

    web = Starlette(
        routes=[
            *(Route(address, _file(*where)) for address, where in _FILES.items()),
            Route("/api/run", show_about),
            Route("/api/task", show_task),
            Route("/api/answer", answer, methods=["POST"]),
        ],
        middleware=[
            Middleware(_WithHeaders),
            Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS, www_redirect=False),
            Middleware(_OwnOrigin),
        ],
        exception_handlers={BaditError: _refused, HTTPException: _refused},
    )
    web.state.ending = ending
    return web


def _file(package: str, name: str, media_type: str) -> Any:
    content = resources.files(package).joinpath(*name.split("/")).read_bytes()

    async def serve(request: Request) -> Response:
        return Response(content, media_type=media_type)

    return serve


async def _question(request: Request) -> Question:
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise HTTPException(415, "the request must be application/json")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY:
            raise HTTPException(413, f"the request is larger than {MAX_BODY // 1024} KiB")
    try:
        return Question.model_validate(parse_json(body.decode(), file=Path("request")))
    except UnicodeDecodeError:
        raise BaditError("request: is not UTF-8") from None
    except ValidationError as error:
        location, problem = first_problem(error)
        raise BaditError(f"request: {'.'.join(map(str, location))}: {problem}") from None


async def _refused(request: Request, error: Exception) -> Response:
    status, message = (error.status_code, error.detail) if isinstance(error, HTTPException) else (400, str(error))
    return JSONResponse({"error": one_line(message)}, status_code=status)


class _WithHeaders:
    """Adds the headers of every response."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        await self._app(scope, receive, send_with_headers)


class _OwnOrigin:
    """Refuses what would be done by another page, or by none: browsers name the page with every POST."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope) if scope["type"] == "http" else {}
        reads = scope.get("method", "GET") in ("GET", "HEAD")
        if not reads and headers.get("origin") != f"http://{headers.get('host')}":
            response = JSONResponse({"error": "the request does not come from this page"}, status_code=403)
            await response(scope, receive, send)
            return
        await self._app(scope, receive, send)

"""The studio's web application: the page, its data, and streamed answers."""

import json
import os
import sys
import threading
import webbrowser
from collections.abc import Mapping
from concurrent.futures import CancelledError
from functools import partial
from typing import Any

import anyio
from anyio import from_thread, to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from badit.integrations.studio.session import Question, Session
from badit.integrations.web import (
    LOCAL_HOSTS,
    address,
    ending_with,
    json_body,
    listen,
    run_until_ended,
)
from badit.report import chart_config
from badit.runs.folder import RunFolder
from badit.support.console import show
from badit.support.errors import BaditError, explained

MAX_BODY = 128 * 1024


def serve(run: RunFolder, *, port: int, browser: bool) -> None:
    """Serves the page of a run until Ctrl-C or SIGTERM and prints its address.

    Port 0 uses a free port.
    """
    with listen(port) as listening:
        session = Session(run)
        # The page can be used meanwhile. Python would abort if it ended during a computation.
        measuring = threading.Thread(target=session.measure)
        measuring.start()
        try:
            show(f"Studio: {address(listening)}   (Ctrl-C stops it)")
            if browser and _has_display():
                webbrowser.open(address(listening))
            run_until_ended(application(session), listening)
        finally:
            session.stop()
            measuring.join()


def _has_display() -> bool:
    """Returns whether a browser has a window. A browser for text would take over the terminal."""
    return sys.platform != "linux" or any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY")))


def application(session: Session) -> Starlette:
    """Returns the web application of a loaded run."""
    # Questions wait in the limiter and take a thread only when the model is free.
    one_at_a_time = anyio.CapacityLimiter(1)
    colours = {mode: chart_config(mode)["range"] for mode in ("light", "dark")}
    description = {**session.about(), "colours": colours}

    async def task(request: Request) -> Response:
        return JSONResponse(session.task(request.query_params.get("name", "")))

    async def mixtures(_: Request) -> Response:
        return JSONResponse(session.mixtures())

    async def answer(request: Request) -> Any:
        content = await json_body(request, MAX_BODY)
        with explained("request"):
            question = Question.model_validate(content)
        session.check(question)
        return partial(_stream, session, question, one_at_a_time)

    # look.css is that of the report.
    files = StaticFiles(
        packages=[("badit.integrations.studio", "page"), ("badit.report", "templates")], html=True
    )
    return Starlette(
        routes=[
            Route("/api/run", JSONResponse(description), methods=["GET"]),
            Route("/api/task", task),
            Route("/api/mixtures", mixtures),
            Route("/api/answer", answer, methods=["POST"]),
            Mount("/", files),
        ],
        middleware=[LOCAL_HOSTS],
        exception_handlers=dict.fromkeys([BaditError, HTTPException, ClientDisconnect], _refused),
    )


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
    """Answers in a thread, as soon as the limiter allows this, and sends each event to the page.

    The answer stops at its next event if the client disconnects or the server stops. The thread is
    used until then.
    """

    async def send_event(name: str, data: Mapping[str, Any]) -> None:
        event = f"event: {name}\ndata: {json.dumps(data, allow_nan=False)}\n\n"
        await send({"type": "http.response.body", "body": event.encode(), "more_body": True})

    def show_event(name: str, data: Mapping[str, Any]) -> None:
        from_thread.check_cancelled()
        from_thread.run(send_event, name, data)

    headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    last_event = "error", {"message": "the studio was stopped"}
    async with ending_with(Request(scope, receive)):
        try:
            await to_thread.run_sync(session.answer, question, show_event, limiter=limiter)
            last_event = "done", {}
        except BaditError as error:
            last_event = "error", {"message": str(error)}
        except CancelledError:  # raised in the thread if sending an event is cancelled
            pass
    await send_event(*last_event)
    await send({"type": "http.response.body", "body": b""})

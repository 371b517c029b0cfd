"""Server-sent events of one answer at a time, which ends when nobody reads it any more."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError
from typing import Any

import anyio
from anyio import from_thread, to_thread
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from badit.errors import BaditError, one_line
from badit.studio.session import Show


class AnswerStream(Response):
    """Runs ``work`` in a thread, once the lock is free, and sends every event that it shows.

    A client that goes away while it waits has not been at work at all; one that goes away later ends the work at its
    next event, and so does ``ending``, once it is set. The lock is held until the thread has ended: there is one model.
    """

    media_type = "text/event-stream"

    def __init__(self, work: Callable[[Show], None], lock: anyio.Lock, ending: threading.Event) -> None:
        super().__init__(headers={"Cache-Control": "no-store"})
        del self.headers["content-length"]  # Response takes an empty body for the whole of it
        self._work = work
        self._lock = lock
        self._ending = ending

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(_cancel_when_gone, receive, group.cancel_scope)
            async with self._lock:
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                await to_thread.run_sync(self._at_work, send)
                await send({"type": "http.response.body", "body": b""})
            group.cancel_scope.cancel()

    def _at_work(self, send: Send) -> None:
        async def send_event(body: bytes) -> None:
            await send({"type": "http.response.body", "body": body, "more_body": True})

        def tell(name: str, data: Mapping[str, Any]) -> None:
            from_thread.run(send_event, f"event: {name}\ndata: {json.dumps(data, allow_nan=False)}\n\n".encode())

        def show(name: str, data: Mapping[str, Any]) -> None:
            from_thread.check_cancelled()
            if self._ending.is_set():
                raise BaditError("the studio has been ended")
            tell(name, data)

        try:
            self._work(show)
            tell("done", {})
        except BaditError as error:
            tell("error", {"message": one_line(str(error))})
        except CancelledError:  # what becomes in a thread of an event that was cancelled while it was being sent
            return


async def _cancel_when_gone(receive: Receive, scope: anyio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()

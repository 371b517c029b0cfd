"""From a free port to a running server."""

from __future__ import annotations

import os
import socket
import sys
import webbrowser
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from badit.errors import BaditError

HOST = "127.0.0.1"
_GRACE = 5  # seconds for the answer that is being written to end at its next word


def listen(port: int) -> socket.socket:
    """A socket that this machine alone can reach; connections wait in it until they are served.

    Args:
        port: 0 takes a free one.

    Raises:
        BaditError: the port is in use, or not for this user.
    """
    if not 0 <= port <= 65535:
        raise BaditError(f"--port: must be from 0 to 65535, not {port}")
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    # A port is free again as soon as its server has ended, though its last connections linger.
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((HOST, port))
        listening.listen()
    except OSError as error:
        listening.close()
        raise BaditError(f"--port: {port} cannot be used ({error.strerror}); give another one, or 0") from None
    return listening


def open_browser(url: str) -> None:
    """Opens the page where there is a screen to open it on; a browser in the terminal would take the terminal over."""
    if sys.platform != "linux" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        webbrowser.open(url)


class Server(uvicorn.Server):
    """Serves an application of :mod:`badit.studio.server` until Ctrl-C or SIGTERM: ``run(sockets=[listening])``."""

    def __init__(self, application: Starlette) -> None:
        super().__init__(
            uvicorn.Config(
                application,
                log_level="warning",
                access_log=False,
                lifespan="off",
                ws="none",
                proxy_headers=False,
                server_header=False,
                timeout_graceful_shutdown=_GRACE,
            )
        )
        self._ending = application.state.ending

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """On a signal the answer that is being written ends, too; uvicorn would wait for it."""
        self._ending.set()
        super().handle_exit(sig, frame)

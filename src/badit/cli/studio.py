"""``badit studio RUN``."""

from __future__ import annotations

import argparse
import threading

from badit.cli.quiet import quiet_loading
from badit.cli.trust import add_trust


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="a run's folder, of any method that trains an adapter")
    parser.add_argument("--port", type=int, default=8642, help="default: 8642; 0 takes a free one")
    parser.add_argument("--no-browser", action="store_true", help="print the address and open nothing")
    add_trust(parser)
    parser.epilog = "The page is for this machine alone: it listens on 127.0.0.1. Ctrl-C ends it."


def execute(options: argparse.Namespace) -> None:
    from badit.studio import refuse_without_extra

    refuse_without_extra()
    from badit.studio.serve import HOST, Server, listen, open_browser

    with listen(options.port) as listening:
        quiet_loading()
        from badit.studio.server import application
        from badit.studio.session import Session

        session = Session(options.run, trust_remote_code=options.trust_remote_code)
        # The page can be used meanwhile; a daemon, so that nobody waits for it at the end.
        threading.Thread(target=session.measure, daemon=True).start()
        url = f"http://{HOST}:{listening.getsockname()[1]}"
        print(f"Studio: {url}   (Ctrl-C ends it)", flush=True)
        if not options.no_browser:
            open_browser(url)
        try:
            Server(application(session)).run(sockets=[listening])
        except KeyboardInterrupt:  # uvicorn has closed what was open and passes the signal on
            print()

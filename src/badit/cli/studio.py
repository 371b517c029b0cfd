"""``badit studio RUN``."""

from __future__ import annotations

import argparse

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
    from badit.studio.server import serve

    quiet_loading()
    serve(options.run, port=options.port, browser=not options.no_browser, trust_remote_code=options.trust_remote_code)

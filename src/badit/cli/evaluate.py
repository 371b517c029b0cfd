"""``badit evaluate RUN``."""

from __future__ import annotations

import argparse

from badit.cli.quiet import quiet_loading
from badit.cli.trust import add_trust


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="a run's folder")
    parser.add_argument("--split", choices=["test", "validation"], help="default: the recipe's own")
    add_trust(parser)


def execute(options: argparse.Namespace) -> None:
    from badit.api import evaluate
    from badit.render import score_table

    quiet_loading()
    scores = evaluate(options.run, split=options.split, trust_remote_code=options.trust_remote_code)
    print(score_table({options.run: scores}))

"""``badit generate RUN PROMPT``."""

from __future__ import annotations

import argparse
import sys

from badit.cli.quiet import quiet_loading
from badit.cli.trust import add_trust


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="a run's folder")
    parser.add_argument("prompt", help="the prompt's text, or - to read it from standard input")
    parser.add_argument("--task", help="the prompt's task, which only methods that tell tasks apart ask for")
    parser.add_argument("--max-new-tokens", type=int, default=50, help="default: 50")
    add_trust(parser)


def execute(options: argparse.Namespace) -> None:
    from badit.api import generate

    quiet_loading()
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    text = generate(
        options.run,
        prompt,
        max_new_tokens=options.max_new_tokens,
        task=options.task,
        trust_remote_code=options.trust_remote_code,
    )
    print(text)

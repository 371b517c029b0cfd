"""``badit table RESULTS``."""

from __future__ import annotations

import argparse

from badit.metrics import METRICS


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", help="a comparison's results.json, or the folder that holds it")
    parser.add_argument(
        "--format", choices=["text", "markdown", "latex", "csv"], default="text", help="default: text", dest="form"
    )
    parser.add_argument(
        "--metric",
        choices=list(METRICS),
        default="rouge_l",
        help="of differences, ranks and --by-task; default: rouge_l",
    )
    parser.add_argument("--by-task", action="store_true", help="a row per task, a column per method")
    parser.add_argument(
        "--released", action="store_true", help="forgetting and transfer as SAPT's released code computes them"
    )


def execute(options: argparse.Namespace) -> None:
    from badit.render import render

    chosen = {name: getattr(options, name) for name in ("form", "metric", "by_task", "released")}
    print(render(options.results, **chosen))

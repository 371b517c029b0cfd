"""``badit analyze TARGET``."""

from __future__ import annotations

import argparse

from badit.cli.quiet import quiet_loading
from badit.cli.trust import add_trust


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target", help="a run's folder, a comparison's, or a base model (with --data) such as smollm2-135m"
    )
    parser.add_argument("--data", help="other tasks: a folder, a .jsonl file, or 'builtin' (default: the run's own)")
    parser.add_argument("--instances", type=int, default=8, help="instances a task that are looked at (default: 8)")
    parser.add_argument("-o", "--output", help="where to write (default: TARGET, for a base model runs/analysis)")
    add_trust(parser)
    parser.epilog = (
        "Tables go to OUTPUT/analysis, one .json each with every column explained, and the page that shows them to "
        "OUTPUT/report.html. Run it again to go on after an interruption."
    )


def execute(options: argparse.Namespace) -> None:
    from badit.api import analyze
    from badit.cli.report import write_if_possible
    from badit.render import text_table
    from badit.report.sources import is_source

    quiet_loading()
    found = analyze(
        options.target,
        data=options.data,
        instances=options.instances,
        output=options.output,
        trust_remote_code=options.trust_remote_code,
    )
    print(
        text_table(["table", "rows"], [[name, f"{len(each.rows):,}"] for name, each in found.tables.items()], right={1})
    )
    print(f"\nTables: {found.path / 'analysis'}")
    # Tables that stand apart from their run or comparison are shown beside what that has: its scores, its losses.
    apart = is_source(options.target) and not found.path.samefile(options.target)
    print(write_if_possible([options.target, found.path] if apart else [found.path], found.path / "report.html"))

#!/usr/bin/env python3
"""tables.py: updates the tables of comparisons in the documentation from benchmarks/results.

Such a table is between two comments. The first one names the results file and the options of `badit
table`, or of `noise.py` in a comment that begins with `noise:`. Two options are of this script:
`methods=NAME,NAME` keeps these methods and their single-task runs, and `times=no` omits the times
and the memory, for runs on several machines.
"""

from __future__ import annotations

import re
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

from badit.comparison.results import SINGLE_TASK, Results, load_results
from badit.comparison.tables import FORMATS, Table, method_table

ROOT = Path(__file__).parents[1]
NOISE = runpy.run_path(str(Path(__file__).with_name("noise.py")))["table"]
TABLE = re.compile(
    r"(<!-- (table|noise): (\S+\.json)((?: \w+=\S+)*) -->\n)"
    r"(?:(?!<!-- end).)*(<!-- end of table -->)",
    flags=re.DOTALL,
)
TIMES = ["time (s)", "GiB"]  # the last columns of a table of methods


def of_methods(results: Results, names: list[str]) -> Results:
    """Returns the results of the named methods and their single-task runs, in the given order."""
    methods = [
        method
        for name in names
        for method in (name, name + SINGLE_TASK)
        if method in results.methods
    ]
    frames = {
        name: getattr(results, name) for name in ("cells", "scores", "instances", "continual")
    }
    kept = {name: frame.loc[frame["method"].isin(methods)] for name, frame in frames.items()}
    return replace(results, methods=methods, **kept)


def without_times(table: Table) -> Table:
    notes = [note for note in table.notes if not note.startswith("time:")]
    return table._replace(texts=table.texts.drop(columns=TIMES), notes=notes)


def table_of(
    path: Path,
    *,
    metric: str = "rouge_l",
    reference: str = "",
    methods: str = "",
    times: str = "yes",
) -> str:
    results = load_results(path)
    results = replace(results, reference=reference or results.reference)
    table = method_table(of_methods(results, methods.split(",")) if methods else results, metric)
    return FORMATS["markdown"](without_times(table) if times == "no" else table)


def written_again(found: re.Match[str]) -> str:
    begin, kind, file, options, end = found.groups()
    chosen: dict[str, Any] = dict(option.split("=") for option in options.split())
    text = (NOISE if kind == "noise" else table_of)(
        ROOT / "benchmarks" / "results" / file, **chosen
    )
    return f"{begin}{text}\n{end}"


def render(text: str) -> str:
    """Returns the page with its tables of comparisons written again."""
    return TABLE.sub(written_again, text)


if __name__ == "__main__":
    for page in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]:
        page.write_text(render(page.read_text()))

#!/usr/bin/env python3
"""tables.py: writes the documentation's tables of comparisons again, from benchmarks/results.

Such a table is between two comments. The first one names the results file and the options of `badit
table`, or of `noise.py` in a comment that begins with `noise:`. Two options are of this script:
`methods=NAME,NAME` keeps these methods and their single-task runs, and `times=no` omits the times
and the memory, for runs on several machines.
"""

import re
import runpy
from dataclasses import replace
from pathlib import Path

from badit.comparison.results import SINGLE_TASK, Results, load_results
from badit.comparison.tables import FORMATS, method_table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TABLE = re.compile(
    r"(<!-- (table|noise): (\S+\.json)((?: \w+=\S+)*) -->\n)"  # first comment: kind, file, options
    r"(?:(?!<!-- end).)*"  # the table
    r"(<!-- end of table -->)",
    flags=re.DOTALL,
)
TIMES = ["time (s)", "GiB"]  # the last columns of a table of methods


def render(text: str) -> str:
    """Returns the page with its tables of comparisons written again."""
    return TABLE.sub(written_again, text)


def written_again(match: re.Match[str]) -> str:
    begin, kind, file, option_text, end = match.groups()
    write = noise_table if kind == "noise" else comparison_table
    options = dict(option.split("=") for option in option_text.split())
    return f"{begin}{write(RESULTS / file, **options)}\n{end}"


def noise_table(path: Path, **options: str) -> str:
    script = runpy.run_path(str(Path(__file__).with_name("noise.py")))
    return script["table"](path, **options)


def comparison_table(
    path: Path,
    *,
    metric: str = "rouge_l",
    reference: str = "",
    methods: str = "",
    times: str = "yes",
) -> str:
    results = load_results(path)
    if reference:
        results = replace(results, reference=reference)
    if methods:
        results = of_methods(results, methods.split(","))
    table = method_table(results, metric)
    # The pages show the NLL in tables of its own, and their experiments have their own rules.
    texts = table.texts.drop(columns=f"NLL vs {results.reference} [95 %]", errors="ignore")
    notes = [note for note in table.notes if not note.startswith("Verdict:")]
    table = table._replace(texts=texts, notes=notes)
    if times == "no":
        notes = [note for note in table.notes if not note.startswith("time:")]
        table = table._replace(texts=table.texts.drop(columns=TIMES), notes=notes)
    return FORMATS["markdown"](table)


def of_methods(results: Results, names: list[str]) -> Results:
    """Returns the results of the named methods and their single-task runs, in the given order."""
    with_single_tasks = [method for name in names for method in (name, name + SINGLE_TASK)]
    methods = [method for method in with_single_tasks if method in results.methods]
    frames = {}
    for name in ("cells", "scores", "instances", "continual"):
        frame = getattr(results, name)
        frames[name] = frame.loc[frame["method"].isin(methods)]
    return replace(results, methods=methods, **frames)


if __name__ == "__main__":
    for page in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]:
        page.write_text(render(page.read_text()))

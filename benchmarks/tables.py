#!/usr/bin/env python3
"""tables.py: writes the documentation's tables of comparisons again, from benchmarks/results.

Such a table is between two comments. The first one names the results file and the options of `badit
table`, or of `noise.py` in a comment that begins with `noise:`. A comment that begins with
`scores:` names a file of `mixed_score.py` and a `reference`. Four options are of this script:
`methods=NAME,NAME` keeps these methods and their single-task runs, `names=OLD:NEW,OLD:NEW` renames
methods, `times=no` omits the times and the memory, for runs on several machines, and `ranks=no`
omits the ranks, for a selection of methods.
"""

import re
import runpy
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from badit.comparison.results import SINGLE_TASK, Results, load_results
from badit.comparison.tables import FORMATS, method_table
from badit.support.files import read_json

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TABLE = re.compile(
    r"(<!-- (table|noise|scores): (\S+\.json)((?: \w+=\S+)*) -->\n)"  # kind, file, options
    r"(?:(?!<!-- end).)*"  # the table
    r"(<!-- end of table -->)",
    flags=re.DOTALL,
)
FRAMES = ("cells", "scores", "instances", "continual")  # of Results, with a column "method"
TIMES = ["time (s)", "GiB"]
RANKS = ["rank", "task rank"]
RANK_NOTE = re.compile(r"(?:^|; )rank: .*")


def render(text: str) -> str:
    """Returns the page with its tables of comparisons written again."""
    return TABLE.sub(written_again, text)


def written_again(match: re.Match[str]) -> str:
    begin, kind, file, option_text, end = match.groups()
    write = {"noise": noise_table, "scores": scores_table, "table": comparison_table}[kind]
    options = dict(option.split("=") for option in option_text.split())
    return f"{begin}{write(RESULTS / file, **options)}\n{end}"


def noise_table(path: Path, **options: str) -> str:
    script = runpy.run_path(str(Path(__file__).with_name("noise.py")))
    return script["table"](path, **options)


def scores_table(path: Path, *, reference: str) -> str:
    """Returns the two primary metrics and their paired differences, with 95 % t intervals."""
    noise = runpy.run_path(str(Path(__file__).with_name("noise.py")))
    runs = read_json(path)
    lines = [
        f"| method | NLL | minus {reference} | mixed score | minus {reference} |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for method, by_seed in runs.items():
        cells = [method]
        for score, decimals in (("NLL", 3), ("mixed score", 2)):
            mean = fmean(scores[score] for scores in by_seed.values())
            cells.append(f"{mean:.{decimals}f}")
            if method == reference:
                cells.append("–")
                continue
            pairs = noise["score_differences"](runs, method, reference, score)
            numbers = (fmean(pairs), *noise["interval_over_seeds"](pairs))
            mean, low, high = (f"{number:+.{decimals}f}".replace("-", "−") for number in numbers)
            cells.append(f"{mean} [{low}, {high}], {len(pairs)} seeds")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def comparison_table(
    path: Path,
    *,
    metric: str = "rouge_l",
    reference: str = "",
    methods: str = "",
    names: str = "",
    times: str = "yes",
    ranks: str = "yes",
) -> str:
    results = load_results(path)
    if reference:
        results = replace(results, reference=reference)
    if methods:
        results = of_methods(results, methods.split(","))
    if names:
        results = renamed(results, dict(pair.split(":") for pair in names.split(",")))
    table = method_table(results, metric)
    # The pages show the NLL in tables of its own, and their experiments have their own rules.
    texts = table.texts.drop(columns=f"NLL vs {results.reference} [95 %]", errors="ignore")
    notes = [note for note in table.notes if not note.startswith("Verdict:")]
    if times == "no":
        texts = texts.drop(columns=TIMES)
        notes = [note for note in notes if not note.startswith("time:")]
    if ranks == "no":
        texts = texts.drop(columns=RANKS, errors="ignore")
        notes = [RANK_NOTE.sub("", note) for note in notes]
    table = table._replace(texts=texts, notes=[note for note in notes if note])
    return FORMATS["markdown"](table)


def of_methods(results: Results, names: list[str]) -> Results:
    """Returns the results of the named methods and their single-task runs, in the given order."""
    with_single_tasks = [method for name in names for method in (name, name + SINGLE_TASK)]
    methods = [method for method in with_single_tasks if method in results.methods]
    frames = {}
    for name in FRAMES:
        frame = getattr(results, name)
        frames[name] = frame.loc[frame["method"].isin(methods)]
    return replace(results, methods=methods, **frames)


def renamed(results: Results, names: dict[str, str]) -> Results:
    """Returns the results with other names for methods and for their single-task runs."""
    names = names | {old + SINGLE_TASK: new + SINGLE_TASK for old, new in names.items()}
    frames = {}
    for name in FRAMES:
        frame = getattr(results, name)
        frames[name] = frame.assign(method=frame["method"].replace(names))
    methods = [names.get(method, method) for method in results.methods]
    reference = names.get(results.reference, results.reference)
    # A page that renames methods says itself what they are.
    return replace(results, methods=methods, titles={}, reference=reference, **frames)


if __name__ == "__main__":
    experiments = ROOT.glob("benchmarks/experiments/*.md")
    for page in [ROOT / "README.md", *ROOT.glob("docs/*.md"), *experiments]:
        page.write_text(render(page.read_text()))

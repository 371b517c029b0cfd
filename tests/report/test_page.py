"""The page: its contents, where each number is from, what is missing, and that no text becomes markup."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import pytest

from badit.cli import main
from badit.cli.report import write_if_possible
from badit.errors import BaditError
from badit.report import write
from badit.report.page import _library
from badit.report.write import write_report
from report.samples import LARGE, SMALL, TASKS, Shape, save_tables, tables, write_comparison, write_run, write_sequence

NASTY = '<script>alert("x")</script>'
NASTY_TASK = "<img src=x onerror=alert(1)> & \"quotes\" 'single' <!-- {{ 7*7 }}"
OF_EXPERTS = (
    "gates",
    "gate_similarity",
    "expert_losses",
    "nearest_prompts",
    "abilities",
    "ability_recovery",
    "expert_angles",
    "component_flow",
    "task_gap",
    "transfer",
)


class Page(HTMLParser):
    """A page's elements, its text outside scripts, and the JSON within."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self._inside: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._inside.append(tag)
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        if self._inside and tag == self._inside[-1]:
            self._inside.pop()

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.scripts[-1] += data
        else:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        return [found for name, found in self.elements if name == tag and attributes.items() <= found.items()]


def page_of(runs: Sequence[Path], folder: Path) -> Page:
    return Page(write_report(runs, folder / "report.html"))


def test_every_section_with_what_it_is_made_of(tmp_path: Path) -> None:
    page = page_of([write_run(tmp_path / "run")], tmp_path)
    links = [link["href"] for link in page.all("a") if link.get("href")]
    parts = [part["id"] for part in page.all("section", **{"class": "part"})]
    assert links == ["#overview", *(f"#{part}" for part in parts)], "the link past the contents, then each section"
    assert len(parts) == 10
    for table in (tmp_path / "run" / "analysis").iterdir():
        assert f"analysis/{table.name}" in page.text
    for file in ("scores.json", "metrics.jsonl", "predictions/", "config.yaml", "environment.json"):
        assert file in page.text


def test_each_figure_is_described_and_traced(tmp_path: Path) -> None:
    page = page_of([write_run(tmp_path / "run")], tmp_path)
    figures = re.findall(r"<figure.*?</figure>", page.source, flags=re.DOTALL)
    assert len(figures) >= 17
    for figure in figures:
        assert re.search(r'<p class="origin">from <code>[\w/.]+</code>', figure)
        assert re.search(r"<h3 id=.*?>[^<]+</h3>", figure)
        assert re.search(r"<figcaption>[^<]{12,}", figure)
        if "specification" in figure:
            assert re.search(r'role="group" aria-label="[^"]{20,}"', figure)


def test_the_findings_are_the_tables_numbers(tmp_path: Path) -> None:
    page = page_of([write_run(tmp_path / "run")], tmp_path)
    table = json.loads((tmp_path / "run/analysis/gradient_overall.json").read_text())
    cosines = [row[list(table["columns"]).index("cosine")] for row in table["rows"]]
    rate = sum(cosine < 0 for cosine in cosines) / len(cosines)
    assert f"The gradients of {100 * rate:.0f}\u00a0% of {len(cosines)} pairs of tasks conflict" in page.source
    assert "Gates agree with the tasks' known abilities" in page.text
    scores = json.loads((tmp_path / "run/scores.json").read_text())
    assert f"<dd>{scores['rouge_l']:.1f}</dd>" in page.source


def test_a_run_without_analysis_says_how_to_make_one(tmp_path: Path) -> None:
    run = write_run(tmp_path / "my run", analysed=False)
    page = page_of([run], tmp_path)
    command = f"badit analyze '{run}'"
    assert page.text.count(f"Not measured yet. Measure it, then write the report again: {command}") == 4
    assert "scores-by-task" in page.source
    assert "loss-curves" in page.source
    assert "a small red house" in page.text
    assert "gradient-cosines" not in page.source


def test_a_method_without_experts_is_not_told_to_measure_them(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", method="lora", analysed=False)
    save_tables(run, leave_out=OF_EXPERTS)
    page = page_of([run], tmp_path)
    assert "Not measured yet" not in page.text
    assert "The method has no experts to measure." in page.text
    assert "no experts with components of their own" in page.text


def test_any_single_table_is_enough(tmp_path: Path) -> None:
    """Each figure stands on its own table: no other may be taken for granted."""
    for name, table in tables().items():
        table.save(tmp_path / name / "analysis")
        assert f"analysis/{name}.json" in page_of([tmp_path / name], tmp_path).text or name == "nearest_prompts"


def test_several_runs_are_shown_side_by_side(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "badit"), write_run(tmp_path / "lora", Shape(seed=5), method="lora", analysed=False)]
    page = page_of(runs, tmp_path)
    headers = " ".join(re.findall(r'<th scope="col".*?</th>', page.source))
    assert all(f"{run}: Rouge-L" in headers for run in ("badit", "lora"))
    assert "analysis/gates.json</code> of badit" in page.source
    assert re.search(r"lora against badit: [+−]?\d+\.\d Rouge-L points \[.*?\] over instances, one run each", page.text)
    assert "gates-1-badit" in page.source
    assert (
        page.text.count(f"lora: not measured yet. Measure it, then write the report again: badit analyze {runs[1]}")
        == 4
    )


def test_the_figures_of_two_analysed_runs_stand_next_to_each_other(tmp_path: Path) -> None:
    page = page_of([write_run(tmp_path / "a"), write_run(tmp_path / "b", Shape(seed=5))], tmp_path)
    figures = [(figure["id"], figure["class"]) for figure in page.all("figure")]
    for name in ("gradient-cosines", "unit-overlaps", "gates", "component-flow"):
        place = figures.index((f"{name}-1-a", "half"))
        assert figures[place + 1] == (f"{name}-2-b", "half")
    assert len(set(figures)) == len(figures)
    assert '<span class="of">b</span> What each task draws on' in page.source


def test_runs_on_other_tasks_have_no_difference(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a", Shape(TASKS[:2])), write_run(tmp_path / "b", Shape(TASKS[2:]))]
    page = page_of(runs, tmp_path)
    assert "run-differences" not in page.source
    assert re.search(r"<th scope=row[^>]*>002 quoref</th>.*?<td>–</td>", page.source)


def test_a_comparison(tmp_path: Path) -> None:
    page = page_of([write_comparison(tmp_path / "compared") / "results.json"], tmp_path)
    for words in ("against lora", "goat, seed 0: failed (out of memory)", "lora, one model a task", "task-gap"):
        assert words in page.source
    assert re.search(
        r"<th scope=row class=\"strong\">badit</th><td data-value=\"[\d.]+\">[\d.]+ ± [\d.]+</td>", page.source
    )
    assert "badit against lora: +" in page.text
    assert "name a run's folder as well" in page.text.lower()
    assert page.source.count('"series":"badit"') > 37, "the curves of all seeds are there"


def test_a_sequence(tmp_path: Path) -> None:
    page = page_of([write_sequence(tmp_path / "run")], tmp_path)
    assert 'id="transfer"' in page.source
    assert "<code>scores.json</code>" in page.source


def test_no_text_becomes_markup(tmp_path: Path) -> None:
    """Names, answers, prompts, sentences, module names, settings and folders, each with markup that would run."""
    tasks = (NASTY.replace("/", "∕"), NASTY_TASK, "third", "fourth")
    shape = dataclasses.replace(SMALL, tasks=tasks, modules=(NASTY, "</script><b>", "{{ 7*7 }}"))
    run = write_run(tmp_path / "<b>run", dataclasses.replace(shape, tasks=tasks[2:]), analysed=False)
    save_tables(run, shape)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("smollm2-135m", NASTY) + f'note: "{NASTY_TASK!r:.20}</pre>"\n')
    answer = {"task": "third", "instance_id": "1", "prompt": f"Input: {NASTY}\nOutput:", "references": [NASTY, "</dd>"]}
    (run / "predictions" / "third.jsonl").write_text(json.dumps({**answer, "prediction": f"</article>{NASTY}"}) + "\n")
    page = Page(write_report([run], tmp_path / "report.html", title=NASTY))
    assert not page.all("img")
    assert not [attributes for _, attributes in page.elements if any(name.startswith("on") for name in attributes)]
    assert "49" not in page.text.split()
    runnable = [attributes for attributes in page.all("script") if attributes.get("type") != "application/json"]
    assert len(runnable) == 2
    assert NASTY in page.text
    assert 'alert("x")' not in "".join(page.scripts), "within JSON it is spelt \\u003cscript\\u003e"


def test_no_text_becomes_an_attribute_or_a_link(tmp_path: Path) -> None:
    """Names of tasks, methods and folders with quotes that would end an attribute, and addresses that would run."""
    names = (
        '" onmouseover=alert(1) x="',
        "' onfocus=alert(1) autofocus='",
        "javascript:alert(1)",
        "[a](javascript:alert(1))",
    )
    methods = ("lora", names[2], names[0])
    compared = write_comparison(
        tmp_path / "javascript:alert(1)", dataclasses.replace(SMALL, tasks=names[:2]), methods=methods
    )
    shape = dataclasses.replace(SMALL, tasks=names, modules=names[:2])
    run = write_run(tmp_path / names[0], dataclasses.replace(SMALL, tasks=names[2:3]), analysed=False)
    save_tables(run, shape)
    page = Page(write_report([run, compared], tmp_path / "report.html"))
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on") or name == "autofocus"], tag
        for name in ("href", "src", "action", "formaction", "xlink:href", "srcdoc"):
            assert (attributes.get(name) or "#").startswith("#"), f"{tag}: the page links to itself alone"
    assert all(name in page.text for name in names)


def test_json_has_no_way_out_of_its_element(tmp_path: Path) -> None:
    shape = dataclasses.replace(SMALL, modules=("</script><script>alert(1)</script>", "<!--<script>"))
    page = page_of([write_run(tmp_path / "run", shape)], tmp_path)
    blocks = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page.source, flags=re.DOTALL)
    assert len(blocks) >= 14
    for block in blocks:
        assert "<" not in block
        json.loads(block)
    assert any("\\u003c/script\\u003e\\u003cscript\\u003ealert(1)" in block for block in blocks)


def test_only_the_pages_own_scripts_may_run_and_nothing_is_fetched(tmp_path: Path) -> None:
    page = page_of([write_run(tmp_path / "run")], tmp_path)
    (policy,) = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert "default-src 'none'" in policy
    assert re.search(r"script-src( 'sha256-[A-Za-z0-9+/]{43}='){2};", policy)
    assert "connect-src" not in policy
    for tag, attributes in page.elements:
        assert not {"src", "srcset", "data", "action"} & attributes.keys(), tag
        assert not (attributes.get("href") or "#").startswith(("http", "//")), tag


def test_the_page_of_a_full_analysis_stays_small(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", LARGE)
    rows = json.loads((run / "analysis/gradient_pairs.json").read_text())["rows"]
    assert len(rows) == 105 * 30 * 7
    size = write_report([run], tmp_path / "report.html").stat().st_size
    assert size - len(_library()) < 1.5e6


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", Shape(layers=1, modules=("m",), experts=2), analysed=False)
    page, figures = tmp_path / "pages" / "mine.html", tmp_path / "figures"
    arguments = [str(run), "-o", str(page), "--figures", str(figures), "--title", "My runs"]
    assert main(["report", *arguments]) == 0
    assert str(page) in capsys.readouterr().out
    assert "<h1>My runs</h1>" in page.read_text()
    assert {path.name for path in figures.iterdir()} >= {"loss-curves.svg", "loss-curves.pdf", "scores-by-task.svg"}


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "none"), "-o", str(tmp_path / "x.html")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("badit: ")
    run = write_run(tmp_path / "run", analysed=False)
    with pytest.raises(BaditError, match="is a folder; name a file"):
        write_report([run], tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(BaditError, match="cannot be written"):
        write_report([run], tmp_path / "file" / "report.html")
    with pytest.raises(BaditError, match="cannot be written"):
        write_report([run], tmp_path / "report.html", figures=tmp_path / "file")


def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(write, "find_spec", lambda name: None if name == "altair" else object())
    assert main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "badit: the report needs its extra: pip install 'badit[report]'\n"
    assert "pip install 'badit[report]'" in write_if_possible([tmp_path], tmp_path / "report.html")


def test_the_analysis_writes_the_page_where_it_can(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", analysed=False)
    assert write_if_possible([run], run / "report.html") == f"Report: {run / 'report.html'}"
    assert (run / "report.html").is_file()

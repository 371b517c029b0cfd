"""The report page: its sections, its figures' sources, notes, and escaped text."""

import json
import re
from html.parser import HTMLParser

import badit.report
from badit.cli.app import write_report_if_possible
from badit.report import write_report
from badit.report.figures import SECTIONS
from refusals import refuses
from report.samples import (
    TASKS,
    Shape,
    save_frame,
    save_tables,
    tables,
    write_comparison,
    write_run,
)

NASTY = '<script>alert("x")</script>'
NASTY_TASK = "<img src=x onerror=alert(1)> & \"quotes\" 'single' <!-- {{ 7*7 }}"
HANDLERS = ('" onmouseover=alert(1) x="', "' onfocus=alert(1) autofocus='")
EXPERT_TABLES = (
    "gates",
    "clusters",
    "gate_similarity",
    "expert_losses",
    "nearest_prompts",
    "abilities",
    "ability_recovery",
)


class Page(HTMLParser):
    """A parsed page: its elements, and its text outside scripts and styles."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.words = [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.cdata_elem is None:  # not in a script or style
            self.words.append(data)

    def all(self, tag, **attributes):
        return [
            element
            for name, element in self.elements
            if name == tag and attributes.items() <= element.items()
        ]


def page_of(runs, folder, title=None):
    return Page(write_report(runs, folder / "report.html", title=title))


def test_run_page_has_all_sections_and_figures_have_captions_and_sources(tmp_path):
    page = page_of([write_run(tmp_path / "run")], tmp_path)
    links = [link["href"] for link in page.all("a") if link.get("href")]
    sections = [section["id"] for section in page.all("section", **{"class": "part"})]
    # A run without a sequence of tasks: the section is listed with what it needs.
    assert sections.pop() == "absent"
    assert "<strong>Learning interference.</strong> This needs a comparison" in page.source
    # The skip link, then one link per section.
    assert links == ["#main", *(f"#{section}" for section in sections)]
    shown = {*SECTIONS, "verdict", "overview", "samples", "settings"}
    assert shown - {"learning"} == set(sections)
    files = ["scores.json", "metrics.jsonl", "predictions/", "config.yaml", "environment.json"]
    # With clusters, tasks are shown by cluster. Panels per expert need one adapted module.
    left_out = {"gates", "expert_losses", "abilities", "nearest_prompts"}
    shown = [path for path in (tmp_path / "run/analysis").iterdir() if path.stem not in left_out]
    files += [f"analysis/{table.name}" for table in shown]
    assert [file for file in files if file not in page.text] == []
    scores = json.loads((tmp_path / "run/scores.json").read_text())
    assert f">{scores['rouge_l']:.1f}</td>" in page.source
    figures = re.findall(r"<figure.*?</figure>", page.source, re.DOTALL)
    assert figures
    for figure in figures:
        assert re.search(r'<p class="origin">from <code>[\w/., ]+</code>', figure)
        assert re.search(r"<h3 id=.*?>[^<]+</h3>", figure)
        assert re.search(r"<figcaption>[^<]{12,}", figure) or 'id="facts"' in figure
        assert (
            re.search(r'role="group" aria-label="[^"]{20,}"', figure)
            or "specification" not in figure
        )


def test_missing_results_are_shown_with_the_command_that_creates_them(tmp_path):
    run = write_run(tmp_path / "my run", method="lora", analysed=False)
    page = page_of([run], tmp_path)
    again = "Not measured yet. Measure it, then write the report again:"
    assert page.text.count(f"{again} badit analyze '{run}'") == 5
    assert all(
        name in page.source for name in ("scores-by-task", "loss-curves", "a small red house")
    )
    assert "gradient-cosines" not in page.source
    save_tables(
        run, leave_out=(*EXPERT_TABLES, "expert_angles", "component_flow", "task_gap", "transfer")
    )
    page = page_of([run], tmp_path)
    assert again not in page.text
    assert "The method has no experts to measure." in page.text
    assert "no experts with components of their own" in page.text
    (run / "scores.json").unlink()
    assert f"{again} badit evaluate '{run}'" in page_of([run], tmp_path).text


def test_report_works_with_any_single_table(tmp_path):
    for name, table in tables().items():
        save_frame(table, tmp_path / name / "analysis")
        assert f"analysis/{name}.json" in page_of([tmp_path / name], tmp_path).text


def test_several_runs_are_shown_side_by_side(tmp_path):
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", Shape(seed=5))]
    runs.append(
        write_run(tmp_path / "lora", Shape(TASKS[:2], seed=5), method="lora", analysed=False)
    )
    page = page_of(runs, tmp_path)
    figures = [(figure["id"], figure["class"]) for figure in page.all("figure")]
    for name in ("gradient-cosines", "unit-overlaps", "clusters", "component-flow"):
        assert figures[figures.index((f"{name}-1-a", "half")) + 1] == (f"{name}-2-b", "half")
    assert len(set(figures)) == len(figures)
    assert '<span class="of">b</span> Tasks by cluster of prompts' in page.source
    assert "analysis/clusters.json</code> of a" in page.source
    headers = " ".join(re.findall(r'<th scope="col".*?</th>', page.source))
    assert all(f"{run}: Rouge-L" in headers for run in ("a", "b", "lora"))
    assert re.search(r"<th scope=row[^>]*>1290 xsum</th>.*?>–</td>", page.source), (
        "a task that one run does not have"
    )
    assert "differences" in dict(figures)
    again = (
        f"lora: not measured yet. Measure it, then write the report again: badit analyze {runs[2]}"
    )
    assert page.text.count(again) == 5


def test_side_by_side_heat_maps_share_one_colour_scale(tmp_path):
    for name, factor in (("weak", 1.0), ("strong", 20.0)):
        frame = tables()["gates"]
        save_frame(
            frame.assign(mean=1 + factor * (frame["mean"] - 1)), tmp_path / name / "analysis"
        )
    runs = [tmp_path / "weak", tmp_path / "strong"]
    pages = [page_of(shown, tmp_path) for shown in (runs[:1], runs[1:], runs)]
    weak, strong, together = (
        re.findall(r'"name":"limit","value":([\d.]+)', page.source) for page in pages
    )
    assert weak == ["1.0"], "gates from 0 to 2, also if all are close to 1"
    assert weak != strong
    assert together == strong * 2


def test_page_begins_with_the_verdict_on_conflicts_and_methods(tmp_path):
    run = write_run(tmp_path / "run")
    frame = tables()["gradient_overall"].assign(conflict=0.0)
    frame.loc[0, ["cosine", "low", "high", "corrected_cosine", "conflict"]] = [
        *(-0.4, -0.5, -0.3, -0.6),
        1.0,
    ]
    save_frame(frame, run / "analysis")
    page = page_of([run, write_comparison(tmp_path / "compared")], tmp_path)
    assert page.text.index("conflicts beyond noise") < page.text.index("training time")
    pair = f"{frame['task_a'][0]} and {frame['task_b'][0]}"
    assert f"{pair}: cosine −0.40, 95 % interval −0.50 to −0.30." in page.text
    assert "badit compare own-tasks 'data.source=$BADIT_SUPERNI'" in page.text
    sentence = page.text[page.text.index("Not decided against lora") :]
    assert "badit (Rouge-L better)" in sentence[: sentence.index("training time")]


def test_panels_per_expert_appear_only_with_one_adapted_module(tmp_path):
    leave_out = ("clusters", "task_gap", "transfer")
    one = Shape(layers=1, modules=("mlp.gate_proj",))
    for name, shape in (("many", Shape()), ("one", one)):
        save_tables(tmp_path / name, shape, leave_out=leave_out)
    for name, appears in (("many", False), ("one", True)):
        ids = {figure["id"] for figure in page_of([tmp_path / name], tmp_path).all("figure")}
        assert {"gates", "gate-similarity"} <= ids
        for panel in ("expert-losses", "abilities", "nearest-prompts"):
            assert (panel in ids) == appears


def test_comparison_page_has_its_table_failed_runs_and_loss_curves(tmp_path):
    page = page_of([write_comparison(tmp_path / "compared") / "results.json"], tmp_path)
    assert "failed: goat, seed 0, learning rate 0.0005 (out of memory)" in page.source
    for words in (
        "vs lora [95 %]",
        "lora, one model per task",
        "task-gap",
        "differences",
        "seed: 0",
    ):
        assert words in page.source
    assert re.search(
        r'>badit \(= cluster-gates\)</th>.*?<td[^>]* class=" strong">[\d.]+ ± [\d.]+</td>',
        page.source,
        re.DOTALL,
    )
    assert "name a run's folder as well" in page.text
    assert page.source.count('"series":"badit"') >= 3 * 37, "the page has the curves of all seeds"
    content = json.loads((tmp_path / "compared" / "results.json").read_text())
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "results.json").write_text(
        json.dumps(content | {"cells": content["cells"][-1:]})
    )
    page = page_of([tmp_path / "compared", tmp_path / "empty"], tmp_path)
    assert "<dt>compared: badit</dt>" in page.source
    assert "empty: no run has finished; failed: goat" in page.text


def test_untrusted_text_never_becomes_markup_or_a_link(tmp_path):
    """Names, answers, prompts, modules, settings and folders contain markup or event handlers."""
    names = (NASTY.replace("/", "∕"), NASTY_TASK, "third", *HANDLERS, "javascript:alert(1)")
    run = write_run(tmp_path / f"<b>{HANDLERS[0]}", Shape(names[2:4]), analysed=False)
    save_tables(
        run, Shape(names, modules=(NASTY, "</script><script>alert(1)</script>", "<!--<script>"))
    )
    config = run / "config.yaml"
    config.write_text(
        config.read_text().replace("smollm2-135m", NASTY) + f'note: "{NASTY_TASK!r:.20}</pre>"\n'
    )
    answer = {
        "task": "third",
        "instance_id": "1",
        "prompt": f"Input: {NASTY}\nOutput:",
        "references": [NASTY, "</dd>"],
    }
    (run / "predictions" / "third.jsonl").write_text(
        json.dumps({**answer, "prediction": f"</article>{NASTY}"}) + "\n"
    )
    compared = write_comparison(
        tmp_path / names[-1], Shape(names[3:5]), methods=("lora", names[-1], HANDLERS[0])
    )
    page = page_of([run, compared], tmp_path, title=NASTY)
    assert not page.all("img")
    assert "49" not in page.text.split()
    assert (
        len([script for script in page.all("script") if script.get("type") != "application/json"])
        == 2
    )
    # Long names are cut off in tables.
    assert [name for name in (NASTY, *names) if name[:15] not in page.text] == []
    addresses = ("href", "src", "srcset", "data", "action", "formaction", "xlink:href", "srcdoc")
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on") or name == "autofocus"], (
            tag
        )
        assert all((attributes.get(name) or "#").startswith("#") for name in addresses), (
            f"{tag} links to another page"
        )
    blocks = re.findall(
        r'<script type="application/json"[^>]*>(.*?)</script>', page.source, flags=re.DOTALL
    )
    assert blocks
    assert all("<" not in block and json.loads(block) for block in blocks)
    assert any("\\u003c/script\\u003e\\u003cscript\\u003ealert(1)" in block for block in blocks)
    (policy,) = [
        meta["content"] for meta in page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    ]
    assert re.match(r"default-src 'none'; script-src( 'sha256-[A-Za-z0-9+/]{43}='){2};", policy)
    assert "connect-src" not in policy


def test_report_command_output_errors_and_missing_extra(tmp_path, monkeypatch, command):
    run = write_run(tmp_path / "run", analysed=False)
    page, figures = tmp_path / "pages" / "mine.html", tmp_path / "figures"
    assert str(page) in command(
        "report", run, "-o", page, "--figures", figures, "--title", "My runs"
    )
    assert "<h1>My runs</h1>" in page.read_text()
    assert {path.name for path in figures.iterdir()} >= {
        "loss-curves.svg",
        "loss-curves.pdf",
        "scores-by-task.svg",
    }
    command("report", tmp_path / "none", "-o", page, code=2)
    for output, folder in ((tmp_path, None), (page, page)):
        refuses(
            r"is a folder; name a file|cannot be written",
            write_report,
            [run],
            output,
            figures=folder,
        )
    assert write_report_if_possible([run], run / "report.html") == f"Report: {run / 'report.html'}"
    monkeypatch.setattr(
        badit.report, "find_spec", lambda name: None if name == "altair" else object()
    )
    assert (
        command("report", run, code=2)
        == "badit: the report needs its extra: pip install 'badit[report]'"
    )
    assert "pip install 'badit[report]'" in write_report_if_possible([run], page)

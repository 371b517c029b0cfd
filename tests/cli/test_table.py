"""``badit table``: four formats of three tables, omitted cells, and invalid input."""

import csv
import io
import json
import re
from statistics import fmean

import pytest

from evaluation.test_results import cell, mixed, sequential
from materials import comparison, write_results

columns = re.compile(r"\s{2,}").split
bold = re.compile(r"\*\*(.*?)\*\*").findall


@pytest.fixture
def shown(tmp_path, command):
    """A function that returns the output of the command for some results."""
    return lambda content, *more, **options: command(
        "table", write_results(tmp_path, content), *more, **options
    )


def renamed(content, new):
    return json.loads(json.dumps(content).replace('"badit_x"', json.dumps(new)))


def test_text_table_and_notes_on_omitted_cells(shown):
    lines = shown(mixed()).splitlines()
    assert columns(lines[0])[0] == "method"
    assert "vs lora [95 %]" in lines[0]
    base, lora, badit = map(columns, lines[2:5])
    assert lora == [
        "lora",
        "4,800,000",
        "0.002",
        "3",
        "47.7 ± 1.2",
        "41.7 ± 0.0",
        "–",
        "2",
        "2.0",
        "101",
        "2.2",
    ]
    assert (badit[0], badit[6]) == ("badit_x", "+4.5 [+3.0, +6.0]")
    assert base[:5] == ["base", "–", "–", "1", "26.5"]
    assert "no finished run: goat" in lines
    assert not any("over the " in line or "one run" in line for line in lines[7:]), (
        "no note if all runs are paired"
    )
    assert lines[-3:] == [
        "missing runs: 1 of goat",
        "failed: badit_x, seed 1, learning rate 0.002 (out of memory)",
        "Verdict: not decided against lora: badit_x (Rouge-L better)",
    ]


def test_notes_on_unpaired_runs_single_runs_and_missing_reference(shown):
    content = mixed()
    content["cells"][3]["status"] = "failed"
    lines = shown(content).splitlines()
    assert "badit_x vs lora: over the 1 of its 2 runs that both have" in lines
    assert "an interval over one run covers instances only, not other seeds" in lines
    content["cells"] = [entry for entry in content["cells"] if entry["method"] != "lora"]
    assert "no differences, because lora has no scores" in shown(content)


def test_reference_is_another_method(shown):
    _, _, *rows, _ = (lines := shown(mixed(), "--reference", "badit_x").splitlines())[:6]
    assert [columns(row)[6].split()[0] for row in rows] == ["−25.7", "−4.5", "–"]
    assert "lora vs badit_x: over the 2 of its 3 runs that both have" in lines


def test_markdown_bolds_the_best_and_escapes_names(shown):
    lines = shown(renamed(mixed(), "a|b_c*"), "--format", "markdown").splitlines()
    assert {len(re.split(r"(?<!\\)\|", line)) for line in lines[:5]} == {13}
    assert lines[4].startswith(r"| a\|b\_c\* |")
    assert [bold(line) for line in lines[2:5]] == [[], [], ["52.2 ± 3.8", "50.0 ± 11.8"]]
    assert r"- failed: a\|b\_c\*, seed 1, learning rate 0.002 (out of memory)" in lines

    for difference, bold_scores in ((0.02, 0), (0.2, 1)):
        cells = [cell("lora", 0, 40), cell("badit", 0, 40)]
        cells[1]["scores"]["tasks"]["task_b"]["rouge_l"] += difference
        table = shown(comparison(*cells, methods=["lora", "badit"]), "--format", "markdown")
        assert len(bold(table)) == bold_scores, "scores that are shown as equal are a tie"


def test_latex_is_a_booktabs_tabular_with_escaped_names(shown):
    lines = shown(renamed(mixed(), r"[50%_a&b#{c}\d"), "--format", "latex").splitlines()
    assert lines[0] == r"\begin{tabular}{lrrrrrrrrrr}"
    assert [lines[1], lines[3], lines[7], lines[8]] == [
        r"\toprule",
        r"\midrule",
        r"\bottomrule",
        r"\end{tabular}",
    ]
    for line in (lines[2], *lines[4:7]):
        assert len(re.findall(r"(?<!\\)&", line)) == 10
        assert line.endswith(r" \\")
    assert lines[6].startswith(r"{[}50\%\_a\&b\#\{c\}\textbackslash{}d & ")
    assert r"\textbf{52.2 $\pm$ 3.8}" in lines[6]
    assert "$-$21.2 [$-$22.4" in lines[4]
    assert "".join(lines[:9]).isascii()
    assert all(line.startswith("% ") for line in lines[9:])


def test_csv_has_full_precision_and_omitted_cells(shown):
    content = mixed()
    rows = [*csv.DictReader(io.StringIO(shown(content, "--format", "csv")))]
    assert [row["method"] for row in rows] == ["base", "lora", "badit_x", "badit_x", "goat"]
    scores = [content["cells"][i]["scores"]["rouge_l"] for i in (5, 6)]
    assert float(rows[2]["rouge_l_mean"]) == pytest.approx(fmean(scores), abs=1e-12)
    assert float(rows[2]["difference_mean"]) == pytest.approx(4.5, abs=1e-12)
    assert float(rows[2]["difference_share_not_positive"]) == 0
    assert (rows[2]["runs"], rows[2]["status"]) == ("2", "")
    assert rows[1]["difference_low"] == ""
    assert (rows[3]["status"], rows[3]["error"], rows[3]["seed"]) == (
        "failed",
        "out of\nmemory",
        "1",
    )
    assert rows[4]["status"] == "missing"


def test_sequential_table_in_standard_and_released_form(shown):
    content = sequential()
    header, _, lora, badit, *notes = shown(content).splitlines()
    assert columns(header)[3:] == [
        "runs",
        "AP",
        "forgetting",
        "BWT",
        "FWT",
        "vs lora [95 %]",
        "rank",
    ]
    assert columns(lora)[3:] == [
        "4",
        "38.1 ± 1.4",
        "6.5 ± 1.3",
        "−6.5 ± 1.3",
        "2.5 ± 1.3",
        "–",
        "2",
    ]
    assert columns(badit)[-2:] == ["+5.0 [+5.0, +5.0]", "1"]
    assert "forgetting, BWT, FWT: standard form" in notes
    released = shown(content, "--released")
    assert "10.5 ± 1.3" in released
    assert "as in released code" in released
    for entry in content["cells"][4:]:
        entry["continual"]["standard"] |= {
            "forgetting": 3.0,
            "backward_transfer": -3.0,
            "forward_transfer": -2.0,
        }
    lines = shown(content, "--format", "markdown").splitlines()
    assert [bold(line) for line in lines[2:4]] == [
        ["2.5 ± 1.3"],
        ["43.1 ± 1.4", "3.0 ± 0.0", "−3.0 ± 0.0"],
    ]


def test_table_by_task(shown):
    header, _, *lines = shown(mixed(), "--by-task").splitlines()
    assert header.split() == ["task", "base", "lora", "badit_x"]
    assert lines[0].split() == ["task002_quoref", "22.0", "43.2", "47.7"]
    assert columns(lines[2]) == ["mean over tasks", "26.5", "47.7", "52.2"]
    markdown = shown(mixed(), "--by-task", "--format", "markdown").splitlines()
    assert [bold(line) for line in markdown[2:5]] == [["47.7"], ["56.8"], ["52.2"]]
    rows = [
        *csv.DictReader(
            io.StringIO(shown(mixed(), "--by-task", "--format", "csv", "--metric", "exact_match"))
        )
    ]
    assert [row["task"] for row in rows] == ["task002_quoref", "task_b", "mean over tasks", "", ""]
    assert float(rows[0]["base_exact_match"]) == pytest.approx(100 / 3)
    assert rows[3]["status"] == "failed"
    assert "EM, mean over" in shown(sequential(), "--by-task", "--metric", "exact_match")


def test_invalid_input_gives_one_line_and_exit_code_2(shown):
    for content, arguments, message in (
        (
            mixed(),
            ["--released"],
            "--released: valid only for a sequential comparison and without --by-task",
        ),
        (sequential(), ["--released", "--by-task"], "--released: valid only for a sequential"),
        (
            mixed(),
            ["--reference", "lora", "--by-task"],
            "--reference: a table by task has no differences; omit it",
        ),
        (
            sequential(),
            ["--metric", "exact_match"],
            "--metric: forgetting and transfer are measured in Rouge-L",
        ),
        (
            mixed(),
            ["--reference", "badit"],
            "--reference: unknown 'badit' (did you mean 'badit_x'?)",
        ),
        (
            mixed(),
            ["--metric", "nll"],
            "metric: the results have no scores in nll; choose another metric",
        ),
        ([], [], "must hold one JSON object"),
    ):
        assert message in shown(content, *arguments, code=2)

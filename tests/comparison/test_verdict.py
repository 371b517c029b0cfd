"""The verdict of a comparison: the documented rule, its sentences, scores that decide nothing."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

import reference
from badit.comparison.verdict import sign_of, standing
from badit.metrics.answers import METRICS
from materials import comparison, results_cell, write_results

# Around the margins and 0, so that every case of the rule occurs.
ENDS = st.lists(st.sampled_from([-1.2, -0.7, -0.3, 0.0, 0.3, 0.7, 1.2]), min_size=4, max_size=4)


@given(ENDS.map(sorted), ENDS.map(sorted))
def test_standing_follows_the_documented_rule(nll, score):
    nll = [end / 50 for end in nll]
    signs = []
    for ends, name in ((nll, "nll"), (score, "rouge_l")):
        low, inner_low, inner_high, high = ends
        margin = METRICS[name].margin
        level = inner_low > -margin and inner_high < margin
        signs.append(sign_of({"low": low, "high": high, "level": level}, name))
    assert standing(*signs) == reference.verdict(nll, score)


def cell(method, seed, rouge_l, nll, exact_match=None):
    """Returns a finished cell with twelve instances whose scores vary around the given ones."""
    instances = {
        "rouge_l": [rouge_l + k % 3 for k in range(12)],
        "exact_match": [100.0 * (k % 2) for k in range(12)],
        "nll": [nll + 0.001 * (k % 3) for k in range(12)],
    }
    if exact_match is not None:
        instances["exact_match"] = [exact_match] * 12
    return results_cell(method, seed, {"a": instances}, learning_rate=0.001)


def results(tmp_path, *cells):
    methods = list(dict.fromkeys(each["method"] for each in cells))
    return write_results(tmp_path, comparison(*cells, methods=methods))


def test_table_ends_with_a_sentence_per_standing(tmp_path, command):
    path = results(
        tmp_path,
        *(
            cell(method, seed, 40 + gain, 2 + loss)
            for seed in (0, 1)
            for method, gain, loss in (
                ("lora", 0, 0),
                ("best", 5, -0.2),
                ("worst", -5, 0.2),
                ("twin", 0, 0),
                ("mixed", -5, -0.2),
            )
        ),
        cell("once", 0, 45, 1.8),
    )
    shown = command("table", path)
    assert "NLL vs lora [95 %]" in shown.splitlines()[0]
    assert "−0.200 [−0.200, −0.200]" in shown
    assert shown.splitlines()[-4:] == [
        "Verdict: ahead of lora in NLL and Rouge-L: best, once (one run)",
        "Verdict: behind lora in NLL and Rouge-L: worst",
        "Verdict: level with lora in NLL and Rouge-L: twin",
        "Verdict: not decided against lora: mixed (NLL better, Rouge-L worse)",
    ]
    by_nll = command("table", path, "--metric", "nll")
    assert by_nll.splitlines()[-4:] == shown.splitlines()[-4:], "the rule needs a score too"
    assert by_nll.count("vs lora [95 %]") == 1


def test_an_untuned_model_and_results_without_instances_have_no_verdict(tmp_path, command):
    untuned = cell("base", None, 10, 4) | {"learning_rate": None}
    content = comparison(cell("lora", 0, 40, 2), untuned, methods=["base", "lora"])
    assert "Verdict" not in command("table", write_results(tmp_path, content))
    content = comparison(cell("lora", 0, 40, 2), cell("x", 0, 45, 1), methods=["lora", "x"])
    for each in content["cells"]:
        each["instances"] = None
    assert "Verdict" not in command("table", write_results(tmp_path, content))


@pytest.mark.parametrize(("scores", "equivalent"), [(0.0, False), (100.0, False), (50.0, True)])
def test_scores_that_are_all_0_or_100_are_not_equivalent(tmp_path, command, scores, equivalent):
    path = results(
        tmp_path, *(cell(name, seed, 40, 2, scores) for name in ("lora", "x") for seed in (0, 1))
    )
    shown = command("table", path, "--metric", "exact_match")
    assert bool(re.search(r"\+0.0 \[\+0.0, \+0.0\] ≈", shown)) == equivalent
    level = "Verdict: level with lora in NLL and EM: x"
    undecided = "Verdict: not decided against lora: x (NLL level)"
    assert shown.splitlines()[-1] == (level if equivalent else undecided)


def test_csv_has_the_paired_difference_in_nll(tmp_path, command):
    path = results(tmp_path, *(cell(name, 0, 40, nll) for name, nll in (("lora", 2), ("x", 1.9))))
    header, _, row = command("table", path, "--format", "csv").splitlines()
    values = dict(zip(header.split(","), row.split(","), strict=True))
    assert float(values["nll_difference_mean"]) == pytest.approx(-0.1)
    assert values["nll_level"] == "False"
    content = json.loads(path.read_text())
    assert content["cells"][0]["method"] == "lora"

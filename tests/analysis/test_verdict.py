"""The verdict on conflicts: which pairs are named, how sure they are, and the next command."""

import json
import re

import numpy as np
import pandas as pd
import pytest

from badit.analysis.verdict import Measured, conflict_verdict, measured_in

RUN = Measured("runs/mine", "data.csv", "smollm2-135m")
BASE = Measured("smollm2-135m", "data.csv", "smollm2-135m", is_run=False)
CONFLICT = {"cosine": -0.3, "corrected_cosine": -0.4, "low": -0.4, "high": -0.2, "conflict": 1.0}
UNSURE = {**CONFLICT, "low": -0.7, "high": 0.1}
AGREEMENT = {"cosine": 0.3, "corrected_cosine": 0.4, "low": 0.2, "high": 0.4, "conflict": 0.0}
UNDECIDED = {**UNSURE, "conflict": np.nan, "instances_needed": 18.0}


def verdict_of(*pairs, measured=RUN, kind="adapter", counts=None):
    rows = [
        {"task_a": f"a{i}", "task_b": f"b{i}", "parameters": kind, "instances_needed": 8.0, **pair}
        for i, pair in enumerate(pairs)
    ]
    columns = ["task_a", "task_b", "parameters", *CONFLICT, "instances_needed"]
    tasks = None
    if counts is not None:
        tasks = pd.DataFrame({"parameters": kind, "instances": counts})
    return conflict_verdict(pd.DataFrame(rows, columns=columns), tasks, measured)


def test_pairs_beyond_noise_are_named_with_their_interval_and_a_comparison():
    verdict = verdict_of(AGREEMENT, CONFLICT, UNSURE, {**CONFLICT, "corrected_cosine": -0.9})
    first, second, third, sure = verdict.sentences
    assert first == "2 pairs of 4 conflict beyond noise."
    assert second == "a3 and b3: cosine −0.30, 95 % interval −0.40 to −0.20."
    assert third.startswith("a1 and b1: ")
    assert "about 0.1 of 4 such intervals" in sure
    assert verdict.command.startswith("badit compare own-tasks data.source=data.csv")


def test_of_many_conflicts_the_strongest_five_are_named():
    pairs = [{**CONFLICT, "corrected_cosine": -0.1 * i} for i in range(8)]
    sentences = verdict_of(*pairs).sentences
    named = [
        sentence.split()[0] for sentence in sentences if "95 %" in sentence and ":" in sentence
    ]
    assert named[:5] == ["a7", "a6", "a5", "a4", "a3"]
    assert "And 3 more." in sentences


@pytest.mark.parametrize("measured", [RUN, BASE])
def test_undecided_pairs_ask_for_more_instances(measured):
    verdict = verdict_of(UNDECIDED, UNDECIDED, AGREEMENT, measured=measured)
    assert verdict.sentences[0] == "No conflict beyond noise among 1 decided pair of tasks."
    assert verdict.sentences[1].startswith("2 pairs not decided: their gradients")
    assert verdict.sentences[2] == "Predicted: 18 instances per task would decide all."
    data = "" if measured is RUN else " --data data.csv"
    expected = f"badit analyze {measured.target} --instances 18{data} -o runs/analysis-18"
    assert verdict.command == expected
    single = verdict_of(UNDECIDED).sentences
    assert "does not decide" in single[0]
    assert single[1].startswith("Their gradients are too noisy")
    assert single[2].endswith("would decide it.")
    more = {**UNDECIDED, "instances_needed": 40.0}
    assert verdict_of(UNDECIDED, more, more).sentences[2].endswith("decide all.")
    assert verdict_of(UNDECIDED, UNDECIDED, more).sentences[2].endswith("decide 2 of them.")
    # Without a prediction, or if too many are needed, more instances are no answer.
    for needed in (np.nan, 5000.0):
        verdict = verdict_of({**UNDECIDED, "instances_needed": needed}, measured=measured)
        assert "--instances" not in verdict.command
        assert ("Predicted: 5000 " in verdict.sentences[-1]) == (needed == 5000)


def test_without_conflicts_the_next_step_is_to_use_or_to_train():
    assert verdict_of(AGREEMENT).command == "badit generate runs/mine --task a0 INPUT"
    other = RUN._replace(other_data="other.csv")
    assert verdict_of(AGREEMENT, measured=other).command == "badit generate runs/mine PROMPT"
    verdict = verdict_of(AGREEMENT, measured=BASE)
    assert verdict.command == "badit init data.csv"
    assert "model.name" not in verdict.purpose, "the recipe has this model"
    other = BASE._replace(target="org/name", model="org/name")
    assert verdict_of(AGREEMENT, measured=other).purpose.endswith("set its model.name to org/name")
    assert verdict_of() is None, "a single task"


@pytest.mark.parametrize(
    ("counts", "changes", "expected"),
    [
        ([3, 3], {}, "no more: give others with --data FILE .* again with more instances per task"),
        ([3, 8], {}, "no more: give others"),
        (
            [8, 8],
            {"available": 10, "most_held_out": 10},
            ": --instances 10 -o FOLDER measures more",
        ),
        ([8, 8], {"available": 40}, ": --instances 16 -o FOLDER measures more"),
        ([8, 8], {"available": 8, "most_held_out": 8}, "no more: .* again with more instances"),
        ([8, 8], {"available": 8, "most_held_out": 12}, "no more: .* data.validation_per_task=12"),
        ([8, 9], {"available": 8, "most_held_out": 90}, "no more: .* data.validation_per_task=16"),
        ([8, 8], {"available": 8, "is_run": False}, "no more: add some to data.csv"),
        ([3, 8], {"other_data": "b.csv"}, "no more: add some to b.csv"),
        ([3, 3], {"is_run": False}, "no more: add some to data.csv"),
        ([8, 8], {}, ": --instances 16 -o FOLDER measures more"),
        ([8, 8], {"instances": None}, ": --instances 16 -o FOLDER measures more"),
        ([15, 40], {"instances": 15}, ": --instances 16"),
        ([16, 40], {"instances": 16}, None),
    ],
)
def test_the_number_of_instances_is_said_and_how_to_measure_more(counts, changes, expected):
    measured = RUN._replace(**{"instances": 8, **changes})
    for pair in (CONFLICT, AGREEMENT, {**UNDECIDED, "instances_needed": 8.0}):
        sentences = verdict_of(pair, measured=measured, counts=counts).sentences
        number = str(counts[0]) if counts[0] == counts[1] else f"{counts[0]} to {counts[1]}"
        place = sentences.index(f"The gradients rest on {number} instances per task.")
        if expected is None:
            assert len(sentences) == place + 1
        else:
            start = "These are few" if expected.startswith(":") else "The split .* has "
            assert re.search(f"^{start}.*{expected}", sentences[place + 1])


def test_more_instances_are_not_proposed_where_the_split_has_no_more():
    few = RUN._replace(instances=8)
    pairs = (UNDECIDED, UNDECIDED, AGREEMENT)
    command = verdict_of(*pairs, measured=few, counts=[8, 8]).command
    assert command == "badit analyze runs/mine --instances 18 -o runs/analysis-18"
    for available in (8, 17):
        measured = few._replace(available=available)
        command = verdict_of(*pairs, measured=measured, counts=[8, 8]).command
        assert command == "badit generate runs/mine --task a0 INPUT"
    measured = few._replace(available=18)
    command = verdict_of(*pairs, measured=measured, counts=[8, 8]).command
    assert command == "badit analyze runs/mine --instances 18 -o runs/analysis-18"
    command = verdict_of(*pairs, measured=few, counts=[3, 8]).command
    assert command == "badit generate runs/mine --task a0 INPUT"
    other = few._replace(other_data="other.csv")
    command = verdict_of(*pairs, measured=other, counts=[8, 8]).command
    assert command.startswith("badit analyze runs/mine --instances 18 --data other.csv -o ")


@pytest.mark.parametrize(
    ("most_held_out", "fix"),
    [(15, "train again with more instances per task"), (20, "with data.validation_per_task=18")],
)
def test_a_split_that_is_too_small_for_the_prediction_is_named(most_held_out, fix):
    measured = RUN._replace(instances=8, available=10, most_held_out=most_held_out)
    sentences = verdict_of(UNDECIDED, measured=measured, counts=[8, 8]).sentences
    assert sentences[-1].startswith("The split that was measured has only 10: give others with")
    assert sentences[-1].endswith(f"{fix}.")
    measured = measured._replace(instances=16, available=16)
    sentences = verdict_of(UNDECIDED, measured=measured, counts=[16, 16]).sentences
    assert "The split that was measured has no more" in sentences[-1], "18 are needed"


def test_next_commands_fit_the_method_and_the_data():
    with_experts = RUN._replace(has_experts=True)
    command = verdict_of(AGREEMENT, measured=with_experts).command
    assert command == "badit export runs/mine --all-tasks -o exports"
    other = with_experts._replace(other_data="other.csv")
    assert verdict_of(AGREEMENT, measured=other).command == "badit generate runs/mine PROMPT"
    for tested, is_named in ((None, False), (0, True), (4, False)):
        command = verdict_of(CONFLICT, measured=RUN._replace(tested=tested)).command
        assert ("evaluation.split=validation" in command) == is_named


def test_what_was_measured_is_read_from_any_recipe(tmp_path):
    config = {"model": {"name": "m"}, "data": {"source": "d"}, "method": {"name": "base"}}
    assert measured_in(tmp_path, config) == Measured("m", "d", "m", is_run=False)
    config["method"] = {"name": "lora"}
    assert measured_in(tmp_path, config) == Measured(str(tmp_path), "d", "m")
    for damaged in ({}, {"model": 3, "data": {"source": [1]}, "method": None}):
        assert measured_in(tmp_path, damaged) == Measured(str(tmp_path), "DATA", None)


def test_tables_in_another_folder_name_the_run_that_was_measured(tmp_path):
    (tmp_path / "analysis.json").write_text('{"settings": {"target": "badit/seed-0"}}')
    assert measured_in(tmp_path, {}).target == str(tmp_path / "badit" / "seed-0")
    for damaged in (
        "[]",
        '{"settings": {"target": 3, "data": [1], "instances": "8"}}',
        '{"settings": 5}',
        '{"instances": 5}',
        '{"instances": {"available": 3, "most_held_out": {}}}',
        '{"instances": {"available": {"a": "3"}}}',
        "{",
    ):
        (tmp_path / "analysis.json").write_text(damaged)
        assert measured_in(tmp_path, {}) == Measured(str(tmp_path))
    (tmp_path / "analysis.json").write_text('{"settings": {"data": "b.csv", "instances": 4}}')
    measured = measured_in(tmp_path, {})
    assert (measured.other_data, measured.instances, measured.available) == ("b.csv", 4, None)
    numbers = {"available": {"a": 9, "b": 7}, "most_held_out": {"a": 2, "b": 3}}
    numbers["tested"] = {"a": 0, "b": 5}
    (tmp_path / "analysis.json").write_text(json.dumps({"instances": numbers}))
    measured = measured_in(tmp_path, {})
    assert (measured.available, measured.most_held_out, measured.tested) == (7, 2, 0)
    assert not measured.has_experts
    assert measured_in(tmp_path, {"method": {"name": "cluster-gates"}}).has_experts

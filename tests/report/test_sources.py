"""The sources of a report: folders, frames and their errors, and the formats of names."""

import itertools

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from badit.analysis.tables import save_frame
from badit.report.charts import as_text, short_task_names
from badit.report.shared_frames import together
from badit.report.sources import read_sources
from badit.report.task_order import by_similarity
from badit.support.files import read_jsonl
from badit.support.text import number
from data.examples import write_rows
from refusals import refuses
from report.samples import OTHER, SMALL, TASKS, tables, write_comparison, write_run, write_sequence


def test_comparison_is_read_from_its_folder_or_its_results_file(tmp_path):
    folder = write_comparison(tmp_path / "compared")
    for path in (folder, folder / "results.json"):
        (source,) = read_sources([path])
        assert list(source.frames["methods"]["method"]) == [
            "base",
            "lora",
            "badit (= cluster-gates)",
            "lora, one model per task",
        ]
        assert set(source.frames["task_gap"]["method"]) == {"lora"}, "no analysis is needed"
        assert source.frames["task_gap"].attrs["file"] == "results.json"
        assert source.frames["differences"]["method"].tolist() == [
            "badit",
            "lora, one model per task",
        ], "without base"
    methods, runs = zip(*source.members, strict=True)
    assert methods == ("base", *["lora"] * 3, *["badit"] * 3)
    assert [run.label for run in runs[:2]] == ["base", "lora/lr-0.0005/seed-0"]
    runs = together([source]).frames["losses"].groupby("series")["run"].nunique()
    assert runs.to_dict() == {"badit": 3, "base": 1, "lora": 3}
    (folder / "results.json").write_text(
        (folder / "results.json").read_text().replace('"base"', '"../base"')
    )
    refuses(r"leads out of .*; copy the file itself", lambda: read_sources([folder])[0].members)


def test_sequence_has_a_transfer_matrix_and_the_losses_of_all_stages(tmp_path):
    sources = read_sources([write_sequence(tmp_path / "run")])
    assert len(sources[0].frames["transfer"]) == len(TASKS) ** 2
    assert sources[0].frames["transfer"].attrs["file"] == "scores.json"
    assert together(sources).frames["losses"]["step"].tolist() == [
        10 * i for i in range(1, 2 * len(TASKS) + 1)
    ]
    for file in (tmp_path / "run" / "stages").glob("*/metrics.jsonl"):
        write_rows(file, {"step": 8, "eval_loss": 1.0}, *read_jsonl(file))
    measured = together(sources).frames["held_out_losses"]["step"].tolist()
    assert measured == [8 + 20 * i for i in range(len(TASKS))], "stages have 20 steps each"


def test_regroupings_are_read_without_an_analysis(tmp_path):
    run = write_run(tmp_path / "run", analysed=False)
    line = {
        "step": 20,
        "module": "model.layers.1.mlp.gate_proj.default",
        "previous_labels": [0, 1],
        "labels": [1, 0],
    }
    write_rows(run / "regroupings.jsonl", {**line, "intra_degrees": 78.0, "inter_degrees": 91.0})
    (source,) = read_sources([run])
    assert set(source.frames["component_flow"]["components"]) == {1}
    assert source.frames["expert_angles"]["within_degrees"].tolist() == [78.0]
    write_rows(run / "regroupings.jsonl", {"step": 20, "modules": 30, "objective_before": 1.0})
    assert not read_sources([run])[0].frames, "a committed result has only means over modules"


def test_differences_use_the_instances_that_both_runs_answered(tmp_path):
    runs = [write_run(tmp_path / name, analysed=False) for name in ("a", "b")]
    answers, *others = [runs[1] / "predictions" / f"{task}.jsonl" for task in TASKS]
    write_rows(answers, *({**line, "prediction": ""} for line in [*read_jsonl(answers)][:4]))
    for other in others:
        other.unlink()
    (row,) = together(read_sources(runs)).frames["differences"].to_dict("records")
    assert (row["method"], row["reference"]) == ("b", "a")
    assert row["low"] <= row["mean"] <= row["high"] <= 0 > row["mean"]
    write_rows(
        answers, *({**line, "prompt": "Input: another question"} for line in read_jsonl(answers))
    )
    assert "differences" not in together(read_sources(runs)).frames, (
        "an id that is a row's number in other data"
    )


@given(st.lists(st.integers(0, 1), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_two_groups_of_similar_tasks_are_ordered_as_two_blocks(groups, random):
    tasks = {f"t{i}": group for i, group in enumerate(groups)}
    pairs = [
        (a, b, 0.8 * (tasks[a] == tasks[b]) + 0.1 * random.random())
        for a, b in itertools.combinations(tasks, 2)
    ]
    order = by_similarity(pd.DataFrame(pairs, columns=["task_a", "task_b", "cosine"]), "cosine")
    assert sorted(order) == (list(tasks) if len(tasks) > 1 else [])
    sides = [tasks[task] for task in order]
    changes = sum(a != b for a, b in itertools.pairwise(sides))
    assert changes <= 1 or len(tasks) < 3


def test_matrices_of_several_runs_have_the_same_task_order(tmp_path):
    orders = {
        tuple(by_similarity(tables(shape)["gate_similarity"], "similarity"))
        for shape in (SMALL, OTHER)
    }
    assert len(orders) == 2, "each run alone has its own order"
    shown = set()
    for run in read_sources([write_run(tmp_path / "a"), write_run(tmp_path / "b", OTHER)]):
        shown.add(tuple(run.frames["gate_similarity"]["task_a"].cat.categories))
    assert [sorted(order) for order in shown] == [sorted(TASKS)]


def test_cosines_of_weights_and_of_the_adapter_are_kept_apart(tmp_path):
    adapter = tables()["gradient_pairs"]
    weights = adapter.assign(module=adapter["module"].str.removesuffix(".adapter"), cosine=0.5)
    # Outside of the layers, as GainLoRA's gate.
    gate = adapter[:1].assign(layer=-1, module="adapter", cosine=adapter["cosine"].mean())
    save_frame(pd.concat([adapter, weights, gate]), tmp_path / "analysis")
    cosines = read_sources([tmp_path])[0].frames["gradient_cosines"]
    means = cosines.groupby("parameters")["cosine"].mean()
    assert means.to_dict() == pytest.approx(
        {"adapter": adapter["cosine"].mean(), "weights": 0.5}, abs=1e-5
    )


def test_labels_are_unique_and_non_runs_are_refused(tmp_path):
    paths = [
        write_run(tmp_path / name, analysed=False) for name in ("a/badit", "b/badit", "b/lora")
    ]
    assert [source.label for source in read_sources(paths)] == ["a/badit", "b/badit", "b/lora"]
    assert [source.label for source in read_sources(paths[1:])] == ["badit", "lora"]
    run = paths[0]
    for paths, message in (
        ([], "name at least one"),
        ([tmp_path], "has no config.yaml, results.json or analysis"),
        ([run / "config.yaml"], "has no config.yaml, results.json or analysis"),
        ([run, run], "is given more than once"),
    ):
        refuses(message, read_sources, paths)


@given(st.lists(st.text(alphabet="ab_t1", min_size=1, max_size=40), unique=True, max_size=8))
def test_short_names_are_unique(names):
    short = short_task_names(names)
    assert list(short) == names
    assert len(set(short.values())) == len(names)


def test_formats_of_names_and_numbers():
    assert short_task_names([TASKS[3], "who_has_more"]) == {
        TASKS[3]: "1590 diplomacy",
        "who_has_more": "who has more",
    }
    assert (number(-0.25, ".2f"), number(-0.001), number(2_165_760, ".0f")) == (
        "−0.25",
        "0.0",
        "2,165,760",
    )
    assert number(None) == number(float("nan")) == "–"
    shown = as_text(
        pd.DataFrame({"task_a": ["x"], "p_value": [0.04]}), {"p_value": ".3f", "task_a": ""}
    )
    assert shown.to_dict("records") == [{"p value": "0.040", "task a": "x"}]

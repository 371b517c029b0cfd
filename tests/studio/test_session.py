"""Studio sessions: answers compared with the library's, gates set by hand, and nearest tasks."""

import copy
import json
import threading

import numpy as np
import pytest
import torch

from badit.analysis.gates import clusters_frame, prompt_gates
from badit.api import Run
from badit.data import AnswerCollator, batches_by_task
from badit.evaluation.generation import generate_answers
from badit.integrations.studio.session import Question, Session, mixed
from badit.recipe.loading import build_recipe
from badit.recipe.saved import dump_recipe
from badit.support.errors import refuse_unknown
from badit.training.encoding import encoded
from badit.tuner import hooks_of
from data.examples import write_animals
from refusals import refuses
from studio.conftest import BADIT, CLUSTERS

HAND_GATES = [0.0, 2.5, 1.25, 0.1]


def events(session, **question):
    shown = []
    asked = Question.model_validate(
        {"text": "land 3", "task": "rivers", "max_new_tokens": 8, **question}
    )
    session.check(asked)
    session.answer(asked, lambda name, data: shown.append((name, data)))
    return shown


def event_data(shown, name, side):
    (data,) = [data for kind, data in shown if kind == name and data.get("side") == side]
    return data


def encoded_example(session):
    """Returns the example of the question of ``events``, with an answer."""
    task = session.tasks["rivers"]
    instance = task.train[0].model_copy(update={"input": "land 3"})
    (example,) = encoded(session.tokenizer, session.recipe, [(task, instance)], session.model)
    return example


def prompt_ids(session):
    example = encoded_example(session)
    return example["input_ids"][: example["prompt_length"]]


def answer_of(session, model):
    ids = prompt_ids(session)
    return generate_answers(model, session.tokenizer, [ids], max_new_tokens=8, progress=False)[0]


def test_sides_answer_like_the_run_and_its_base_model(session):
    ids = prompt_ids(session)
    shown = events(session, sides=["router", "base"])
    answer = answer_of(session, session.model)
    with session.model.disable_adapter():
        base_answer = answer_of(session, session.model)
    assert event_data(shown, "end", "router")["text"] == answer
    assert event_data(shown, "end", "base")["text"] == base_answer
    assert answer != base_answer
    assert shown[0] == ("prompt", {"text": session.tokenizer.decode(ids), "tokens": len(ids)})
    names = [name for name, data in shown if data.get("side") == "base"]
    assert names == ["text"] * 8 + ["end"], "base has no gates"
    # The router's gates equal those measured by the analysis.
    collate = AnswerCollator(0, with_tasks=True)
    batches = batches_by_task([encoded_example(session)], collate, 1)
    gates = prompt_gates(session.model, batches).by_task["rivers"][0]
    np.testing.assert_allclose(event_data(shown, "gates", "router")["gates"], gates, atol=2e-5)
    assert np.ptp(gates) > 0.01


@pytest.mark.parametrize(
    ("method", "neutral"),  # the neutral gate on the method's own scale
    [
        (BADIT, 1),
        (
            {"name": "badit", "num_experts": 3, "r": 2, "gates": "softmax", "routing": "token"},
            1 / 3,
        ),
        ({"name": "loramoe", "num_experts": 3, "r": 2}, 1 / 3),
        ({"name": "goat", "num_experts": 3, "r": 6, "top_k": 2}, 1 / 3),
        ({"name": "mtl-lora", "num_experts": 3, "r": 2}, 1 / 3),
    ],
    ids=lambda value: str(value)[:40],
)
def test_gates_set_by_hand_match_an_adapter_merged_with_these_gates(trained, method, neutral):
    session = Session(trained(method))
    gates = HAND_GATES[: session.number_of_experts]
    shown = events(session, sides=["hand", "router"], gates=gates)
    assert event_data(shown, "gates", "hand")["gates"] == [gates] * len(session.experts)
    np.testing.assert_allclose(
        np.mean(event_data(shown, "gates", "router")["gates"], axis=1), 1, atol=2e-5
    )
    lora = copy.deepcopy(session.model).unload()
    ids = torch.tensor([prompt_ids(session)])
    with torch.no_grad(), hooks_of(session.model).rows_of(["rivers"]):
        for layer, adapter in session.experts:
            delta = layer.get_delta_weight(adapter, neutral * torch.tensor(gates))
            lora.get_submodule(layer.name).weight.data += delta
        with mixed(session.experts, np.tile(gates, (len(session.experts), 1))):
            logits = session.model(input_ids=ids).logits
        torch.testing.assert_close(logits, lora(input_ids=ids).logits, atol=1e-4, rtol=1e-4)
        of_router = session.model(input_ids=ids).logits
        assert (logits - of_router).abs().max() > 1e-3
    # The gates are used in every pass.
    assert event_data(shown, "end", "hand")["text"] == answer_of(session, lora)


def test_nearest_tasks_are_sorted_by_difference(session):
    shown = event_data(events(session, sides=["router"]), "gates", "router")
    differences = {
        task: np.abs(gates - shown["gates"]).mean() for task, gates in session.task_gates.items()
    }
    expected = sorted((difference, task) for task, difference in differences.items())
    nearest = [(near["difference"], near["task"]) for near in shown["nearest"]]
    assert nearest == [(pytest.approx(difference, abs=1e-4), task) for difference, task in expected]


def test_task_gates_are_cached_and_measured_again_if_damaged(trained, monkeypatch, capsys):
    run = trained(BADIT)
    first = Session(run)
    assert first.unmeasured
    first.measure()
    assert not first.unmeasured
    pairs = [(task, instance) for task in first.tasks.values() for instance in task.train]
    examples = encoded(first.tokenizer, first.recipe, pairs, first.model)
    batches = batches_by_task(examples, AnswerCollator(0, with_tasks=True), 8)
    gates = prompt_gates(first.model, batches)
    assert list(first.task_gates) == list(gates.by_task)
    np.testing.assert_allclose(list(first.task_gates.values()), gates.means, atol=1e-5)

    content = json.loads(run.gates_path.read_text())
    for damaged in (
        "[",
        json.dumps({**content, "tasks": []}),
        json.dumps({**content, "tasks": {"rivers": [1]}}),
        json.dumps({**content, "tasks": {"rivers": {**content["tasks"]["rivers"], "means": {}}}}),
    ):
        run.gates_path.write_text(damaged)
        again = Session(run)
        again.measure()
        np.testing.assert_equal(again.task_gates, first.task_gates)
    monkeypatch.delattr("badit.analysis.gates.gates_of_task")
    Session(run).measure()
    run.gates_path.unlink()
    monkeypatch.setattr(
        "badit.analysis.gates.encoded", lambda *_: refuse_unknown("task", "rivers", [])
    )
    unmeasurable = Session(run)
    unmeasurable.measure()
    assert "cannot be measured: task: unknown" in capsys.readouterr().err
    assert not unmeasurable.unmeasured
    assert event_data(events(unmeasurable, sides=["router"]), "gates", "router")["nearest"] == []


def test_questions_are_answered_while_task_gates_are_measured(trained):
    """Answering switches the model between sides, which must not change the measured gates."""
    quiet, busy = Session(trained(BADIT)), Session(trained(BADIT))
    quiet.measure()
    expected = events(quiet, sides=["hand", "base"], gates=HAND_GATES)
    measuring = threading.Thread(target=busy.measure)
    measuring.start()
    shown = events(busy, sides=["hand", "base"], gates=HAND_GATES)
    measuring.join()
    for side in ("hand", "base"):
        assert event_data(shown, "end", side)["text"] == event_data(expected, "end", side)["text"]
    np.testing.assert_equal(quiet.task_gates, busy.task_gates)


def test_measuring_ends_when_stopped(trained):
    session = Session(trained(BADIT))
    session.stop()
    session.measure()
    assert session.unmeasured


def test_run_without_its_data_still_answers(trained, task_file):
    run = trained(BADIT, task_file)
    task_file.unlink()
    session = Session(run)
    assert session.tasks == {}
    assert "The run's tasks cannot be loaded: " in session.about()["remark"]
    shown = events(session, task=None, sides=["router"])
    assert event_data(shown, "gates", "router")["nearest"] == []
    assert event_data(shown, "end", "router")["tokens"]


def test_unanswerable_questions_and_unusable_runs_are_refused(
    session, plain_session, trained, tmp_path
):
    by_task = Session(trained({"name": "mtl-lora", "num_experts": 3, "r": 2}))
    assert by_task.about()["needs_task"]
    assert {name for name, _ in events(plain_session, sides=["router", "base"])} == {
        "prompt",
        "text",
        "end",
    }
    for asked, question, message in (
        (session, {"text": " \n"}, "the prompt is empty"),
        (session, {"task": "river"}, "task: unknown 'river' .did you mean 'rivers'"),
        (session, {"sides": ["hand"], "gates": [1.0] * 3}, "must be 4 numbers from 0 to 4"),
        (session, {"sides": ["hand"], "gates": [1.0, 1.0, 1.0, 4.5]}, "must be 4 numbers"),
        (session, {"sides": ["hand"], "gates_of": "river"}, "gates_of: unknown 'river'"),
        (by_task, {"task": None}, "needs the prompt's task"),
        (
            plain_session,
            {"sides": ["hand"], "gates": HAND_GATES},
            "gates: lora has no gates to set by hand",
        ),
    ):
        refuses(message, events, asked, **{"sides": ["router"], **question})
    for method, message in (
        ("full", "trains no adapter"),
        ("badit", "has no adapter yet; finish its training"),
    ):
        recipe = build_recipe({"method": {"name": method}})
        (tmp_path / "config.yaml").write_text(dump_recipe(recipe))
        refuses(message, Session, Run(tmp_path))


@pytest.mark.parametrize(
    ("key", "places"),
    [("layer", [(0, "mlp.gate_proj"), (1, "mlp.gate_proj")]), ("embedding", [(-1, "all")])],
)
def test_map_shows_the_clusters_of_tasks_and_of_the_answered_prompt(trained, key, places):
    session = Session(trained({**CLUSTERS, "key": key}))
    assert session.mixtures() == {"unmeasured": True, "tasks": {}}
    session.measure()
    about, measured = session.about(), session.mixtures()
    assert (about["clusters"], about["places"]) == (3, places)
    pairs = [(task, instance) for task in session.tasks.values() for instance in task.train]
    examples = encoded(session.tokenizer, session.recipe, pairs, session.model)
    batches = batches_by_task(examples, AnswerCollator(0, with_tasks=True), 8)
    table = clusters_frame(session.model, prompt_gates(session.model, batches))
    for task, shares in measured["tasks"].items():
        rows = table[table["task"] == task].groupby(["layer", "module"], sort=False)["share"]
        assert [share.tolist() for _, share in rows] == shares
    shown = event_data(events(session, sides=["router"]), "gates", "router")
    codes = [of_place.codes_CK for of_place in session.clusters]
    assert len(shown["clusters"]) == len(codes)
    for cluster, codes_CK, gates in zip(shown["clusters"], codes, shown["gates"], strict=False):
        np.testing.assert_allclose(codes_CK[cluster], gates, atol=1e-4)


def test_gates_of_a_task_are_used_in_every_module(session):
    shown = events(session, sides=["hand", "router"], gates_of="cities")
    expected = session.task_gates["cities"]
    np.testing.assert_allclose(event_data(shown, "gates", "hand")["gates"], expected, atol=2e-5)
    assert np.ptp(expected, axis=0).max() > 0.01, "the modules differ"
    np.testing.assert_allclose(
        session.mixtures()["tasks"]["cities"], session.task_gates["cities"], atol=1e-5
    )
    with mixed(session.experts, expected):
        answer = answer_of(session, session.model)
    assert event_data(shown, "end", "hand")["text"] == answer
    own = event_data(shown, "gates", "router")["gates"]
    assert not np.allclose(own, expected, atol=1e-3)


def test_tasks_of_an_extension_are_one_more_cluster_and_gates_cannot_be_set(trained, tmp_path):
    data = write_animals(tmp_path / "animals.jsonl", train=8)
    run = trained({**CLUSTERS, "key": "embedding"})
    session = Session(run.extend(data, output=tmp_path / "extended", progress=False))
    session.measure()
    assert session.about()["clusters"] == 4
    assert not session.about()["can_set_gates"]
    assert session.mixtures()["tasks"] == {"animals": [[0.0, 0.0, 0.0, 1.0]]}
    question = {"task": "animals", "sides": ["hand"], "gates": [1.0] * 5}
    refuses("of an extended run cannot be set", events, session, **question)

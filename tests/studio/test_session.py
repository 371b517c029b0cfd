"""A loaded run: the sides' answers against the library's own, gates that are exactly those asked for, nearest tasks."""

from __future__ import annotations

import copy
import json
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch

from badit.analysis.gates import prompt_gates
from badit.analysis.tables import TidyTable
from badit.data import AnswerCollator, batches_by_task
from badit.errors import BaditError
from badit.evaluation.generation import generate_answers
from badit.runs import RunFolder
from badit.studio.mixing import TaskGates, mixed
from badit.studio.session import Question, Session
from badit.train import encoded
from studio.conftest import BADIT

HAND = [0.0, 2.5, 1.25, 0.1]


def events(session: Session, **question: Any) -> list[tuple[str, Mapping[str, Any]]]:
    shown: list[tuple[str, Mapping[str, Any]]] = []
    asked = {"text": "land 3", "task": "rivers", "max_new_tokens": 8, **question}
    session.answer(Question.model_validate(asked), lambda name, data: shown.append((name, data)))
    return shown


def one(shown: list[tuple[str, Mapping[str, Any]]], name: str, side: str) -> Mapping[str, Any]:
    (found,) = [data for kind, data in shown if kind == name and data.get("side") == side]
    return found


def prompt(session: Session, text: str = "land 3") -> list[int]:
    task = session.tasks["rivers"]
    instance = task.train[0].model_copy(update={"input": text})
    return encoded(session.tokenizer, session.recipe, task, instance, answer=False)["input_ids"]


def test_the_sides_answer_as_the_run_and_its_base_model_do(session: Session) -> None:
    ids = prompt(session)
    shown = events(session, sides=["router", "base"])
    expected = generate_answers(session.model, session.tokenizer, [ids], max_new_tokens=8, progress=False)
    with session.model.disable_adapter():
        base = generate_answers(session.model, session.tokenizer, [ids], max_new_tokens=8, progress=False)
    assert [one(shown, "end", side)["text"] for side in ("router", "base")] == [*expected, *base]
    assert expected != base
    assert shown[0] == ("prompt", {"text": session.tokenizer.decode(ids), "tokens": len(ids)})
    assert [name for name, data in shown if data.get("side") == "base"] == ["text"] * 8 + ["end"], "it has no gates"


def test_the_routers_gates_are_those_that_the_analysis_measures(session: Session) -> None:
    shown = one(events(session, sides=["router"]), "gates", "router")["gates"]
    task = session.tasks["rivers"]
    instance = task.train[0].model_copy(update={"input": "land 3"})
    examples = [encoded(session.tokenizer, session.recipe, task, instance)]
    batches = batches_by_task(examples, AnswerCollator(0, with_tasks=True), 1)
    expected = prompt_gates(session.model, batches).by_task["rivers"][0]
    np.testing.assert_allclose(shown, expected, atol=2e-5)
    assert np.ptp(expected) > 0.01


def test_gates_by_hand_are_used_to_the_bit_in_every_layer_and_pass(session: Session) -> None:
    seen: list[torch.Tensor] = []
    delta = type(session.experts[0].layer)._delta

    def spy(layer: Any, adapter: str, x: torch.Tensor) -> torch.Tensor:
        seen.append(layer._component_gates(adapter, x)[..., session.experts[0].first_components_K])
        return delta(layer, adapter, x)

    with pytest.MonkeyPatch.context() as patch:
        for one_ in session.experts:
            patch.setattr(type(one_.layer), "_delta", spy)
        shown = events(session, sides=["hand"], gates=HAND)
    assert len(seen) == len(session.experts) * one(shown, "end", "hand")["tokens"]
    # The labels differ from layer to layer, so the second layer's spy reads other components of the first's experts.
    first_layer = seen[:: len(session.experts)]
    assert all(torch.equal(gates.flatten(), torch.tensor(HAND)) for gates in first_layer)
    assert one(shown, "gates", "hand")["gates"] == [HAND] * len(session.experts)
    assert "_component_gates" not in vars(session.experts[0].layer), "the router is back"


@pytest.mark.parametrize("gates", [HAND, [1.0] * 4, [0.0, 0.0, 1.0, 0.0]], ids=str)
def test_a_mixture_by_hand_is_the_plain_lora_of_those_gates(session: Session, gates: list[float]) -> None:
    ids = torch.tensor([prompt(session)])
    with torch.no_grad(), mixed(session.experts, gates):
        logits = session.model(input_ids=ids).logits
    base = copy.deepcopy(session.model).unload()
    for one_ in session.experts:
        delta = one_.layer.get_delta_weight(one_.adapter, torch.tensor(gates))
        base.get_submodule(one_.layer.name).weight.data += delta
    with torch.no_grad():
        torch.testing.assert_close(logits, base(input_ids=ids).logits, atol=1e-4, rtol=1e-4)
        assert (logits - session.model(input_ids=ids).logits).abs().max() > 1e-3, "the router does something else"


@pytest.mark.parametrize(
    "method",
    [
        {"name": "badit", "num_experts": 3, "r": 2, "gates": "softmax", "routing": "token"},
        {"name": "loramoe", "num_experts": 3, "r": 2},
        {"name": "goat", "num_experts": 3, "r": 6, "top_k": 2},
        {"name": "hydralora", "num_experts": 3, "r": 2},
        {"name": "mtl-lora", "num_experts": 3, "r": 2},
    ],
    ids=lambda method: method["name"],
)
def test_methods_whose_gates_sum_to_one_are_on_the_same_scale(
    trained: Callable[..., RunFolder], method: dict[str, Any]
) -> None:
    session = Session(trained(method).path)
    layer, first_K = session.experts[0].layer, session.experts[0].first_components_K
    router = np.array(one(events(session, sides=["router"]), "gates", "router")["gates"])
    np.testing.assert_allclose(router.mean(axis=1), 1, atol=2e-5)
    multiplied: list[torch.Tensor] = []
    handle = layer.register_forward_pre_hook(
        lambda _, args: multiplied.append(layer._component_gates("default", *args))
    )
    shown = events(session, sides=["hand"], gates=[0.5, 2.5, 0.0])
    handle.remove()
    assert one(shown, "gates", "hand")["gates"] == [[0.5, 2.5, 0.0]] * len(session.experts)
    # What the components are multiplied by are the method's own numbers, whose sum is 1 and not 3.
    for gates in multiplied:
        expected = torch.tensor([1 / 6, 5 / 6, 0]).expand(*gates.shape[:-1], -1)
        torch.testing.assert_close(gates[..., first_K], expected, atol=1e-6, rtol=0)


def test_the_nearest_task_is_the_prompts_own(session: Session) -> None:
    assert session.task_gates is not None
    for name, task in session.tasks.items():
        shown = events(session, task=name, text=task.train[1].input, sides=["router"])
        nearest = one(shown, "gates", "router")["nearest"]
        assert nearest[0]["task"] == name
        assert nearest[0]["difference"] < nearest[1]["difference"]


def test_distances_are_mean_absolute_differences() -> None:
    gates = TaskGates(["a", "b"], np.array([[[1.0, 1.0]], [[1.5, 0.5]]]))
    assert gates.nearest(np.array([[1.4, 0.6]])) == [("b", pytest.approx(0.1)), ("a", pytest.approx(0.4))]


def test_tasks_gates_are_measured_once_and_taken_from_the_analysis(trained: Callable[..., RunFolder]) -> None:
    run = trained(BADIT)
    first = Session(run.path)
    assert first.unmeasured
    first.measure()
    measured = first.task_gates
    assert measured is not None
    assert not first.unmeasured
    kept = run.studio / "gates.json"
    table = TidyTable.load(kept)
    assert np.allclose(measured.means_TMK.ravel(), [record["mean"] for record in table.records()], atol=1e-5)

    def changed(value: float) -> TidyTable:
        return TidyTable(table.name, table.about, table.columns, [[*row[:4], value, row[5]] for row in table.rows])

    def largest() -> float:
        gates = Session(run.path).task_gates
        assert gates is not None
        return gates.means_TMK.max()

    changed(1.5).save(run.studio)
    assert largest() == 1.5, "kept from the first start"
    changed(1.25).save(run.analysis)
    assert largest() == 1.25, "the analysis comes first"
    short = {"format": 1, "name": "gates", "about": "", "columns": dict(table.columns), "rows": table.rows[1:]}
    for broken in ("[", "{}", json.dumps({**short, "columns": {}, "rows": []}), json.dumps(short)):
        (run.analysis / "gates.json").write_text(broken)
        kept.write_text(broken)
        assert Session(run.path).unmeasured, broken[:20]
    changed(1.5).save(run.studio)
    os.utime(kept, (0, 0))
    assert Session(run.path).unmeasured, "they are older than the adapter"


def test_questions_are_answered_while_tasks_are_measured(trained: Callable[..., RunFolder]) -> None:
    """The model is switched from side to side: what is measured meanwhile must not be measured of another side."""
    quiet, busy = Session(trained(BADIT).path), Session(trained(BADIT).path)
    quiet.measure()
    expected = events(quiet, sides=["hand", "base"], gates=HAND)
    measuring = threading.Thread(target=busy.measure)
    measuring.start()
    shown = events(busy, sides=["hand", "base"], gates=HAND)
    measuring.join()
    assert [one(shown, "end", side)["text"] for side in ("hand", "base")] == [
        one(expected, "end", side)["text"] for side in ("hand", "base")
    ]
    assert quiet.task_gates is not None
    assert busy.task_gates is not None
    np.testing.assert_array_equal(busy.task_gates.means_TMK, quiet.task_gates.means_TMK)


def test_a_run_whose_data_is_gone_still_answers(
    trained: Callable[..., RunFolder], material: Any, tmp_path: Any
) -> None:
    source = tmp_path / "tasks.jsonl"
    source.write_text((material / "tasks.jsonl").read_text())
    run = trained(BADIT, source)
    source.unlink()
    session = Session(run.path)
    assert session.tasks == {}
    assert "The run's tasks cannot be chosen: " in session.about()["remark"]
    shown = events(session, task=None, sides=["router"])
    assert one(shown, "gates", "router")["nearest"] == []
    assert one(shown, "end", "router")["tokens"]


def test_a_method_without_gates_answers_and_takes_none(plain_session: Session) -> None:
    assert plain_session.about()["experts"] == 0
    shown = events(plain_session, sides=["router", "base"])
    assert {name for name, _ in shown} == {"prompt", "text", "end"}
    with pytest.raises(BaditError, match="gates: lora has none to set by hand"):
        events(plain_session, sides=["hand"], gates=HAND)


def test_a_method_that_tells_tasks_apart_asks_for_one(trained: Callable[..., RunFolder]) -> None:
    session = Session(trained({"name": "mtl-lora", "r": 2}).path)
    assert session.about()["needs_task"]
    with pytest.raises(BaditError, match="must know the prompt's task"):
        events(session, task=None, sides=["router"])


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ({"text": " \n"}, "the prompt is empty"),
        ({"task": "river"}, "no task 'river' .did you mean 'rivers'"),
        ({"sides": ["hand"]}, "must be 4 numbers from 0 to 4"),
        ({"sides": ["hand"], "gates": [1.0] * 3}, "must be 4 numbers"),
        ({"sides": ["hand"], "gates": [1.0, 1.0, 1.0, 4.5]}, "must be 4 numbers"),
    ],
    ids=str,
)
def test_what_cannot_be_answered_is_refused(session: Session, question: dict[str, Any], message: str) -> None:
    with pytest.raises(BaditError, match=message):
        events(session, **{"sides": ["router"], **question})


@pytest.mark.parametrize("method", [{"name": "base"}, {"name": "full"}], ids=lambda method: method["name"])
def test_a_run_without_an_adapter_is_refused(
    trained: Callable[..., RunFolder], method: dict[str, Any], tmp_path: Any
) -> None:
    (tmp_path / "config.yaml").write_text(json.dumps({"method": method}))
    with pytest.raises(BaditError, match="has no adapter to try"):
        Session(tmp_path)


def test_an_unfinished_run_is_refused(tmp_path: Any) -> None:
    (tmp_path / "config.yaml").write_text(json.dumps({"method": {"name": "badit"}}))
    with pytest.raises(BaditError, match="has no adapter yet; finish its training"):
        Session(tmp_path)

"""Similarities, losses without experts, nearest prompts and summaries, against loops and planted answers."""

import copy

import numpy as np
import pytest
import torch
from badit.analysis.losses import expert_losses, losses_table
from badit.analysis.summaries import abilities_table, readable
from hypothesis import given
from hypothesis import strategies as st

from analysis import naive_experts as naive
from analysis.naive_experts import METHODS, TASKS
from badit.analysis.atlas import ability_atlas, gate_similarity, nearest_prompts, prompt_scores, similarity
from badit.analysis.gates import PromptGates, prompt_gates
from badit.data import Instance, Task
from badit.errors import BaditError
from tuner import helpers

pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file in  - :UserWarning")  # PEFT 0.19


def made(by_task):
    """Gates (prompts, modules, experts) as they would have been read."""
    by_task = {task: np.asarray(values, dtype=np.float32) for task, values in by_task.items()}
    modules = next(iter(by_task.values())).shape[1]
    return PromptGates([(m, "mlp.gate_proj") for m in range(modules)], by_task)


def random_gates(seed, tasks=4, prompts=3, modules=2, experts=3):
    rng = np.random.default_rng(seed)
    return made({f"task{t}": rng.dirichlet(np.ones(experts), (prompts, modules)) * experts for t in range(tasks)})


def texts(gates):
    return {
        task: [(f"{task}-{p}", f"{task} prompt {p}") for p in range(len(values))]
        for task, values in gates.by_task.items()
    }


# --- similarity ---


@pytest.mark.parametrize("seed", range(5))
def test_similarity_equals_the_naive_one(seed):
    gates = random_gates(seed)
    np.testing.assert_allclose(similarity(gates), naive.similarity(gates.by_task), atol=1e-5)


@given(st.integers(0, 2**32 - 1), st.permutations(range(4)))
def test_similarity_does_not_see_the_order_of_tasks_nor_what_they_share(seed, order):
    gates = random_gates(seed)
    expected = similarity(gates)
    np.testing.assert_allclose(np.diag(expected), 1)
    np.testing.assert_allclose(expected, expected.T)
    reordered = made({gates.tasks[t]: gates.by_task[gates.tasks[t]] for t in order})
    np.testing.assert_allclose(similarity(reordered), expected[np.ix_(order, order)], atol=1e-6)
    shift = np.random.default_rng(seed).normal(size=(2, 3))
    shift -= shift.mean(axis=1, keepdims=True)  # gates keep their sum
    shifted = made({task: values + shift for task, values in gates.by_task.items()})
    np.testing.assert_allclose(similarity(shifted), expected, atol=1e-4)


def test_similar_tasks_are_found():
    first, second = [[1.5, 0.5, 1.0]], [[0.5, 1.5, 1.0]]
    gates = made({"c": [second], "a": [first], "b": [first], "d": [second]})
    table = gate_similarity(gates)
    assert list(table.columns) == ["task_a", "task_b", "similarity"]
    assert {(row[0], row[1]): round(row[2], 4) for row in table.rows} == {
        ("a", "b"): 1, ("a", "c"): -1, ("a", "d"): -1, ("b", "c"): -1, ("b", "d"): -1, ("c", "d"): 1,
    }  # fmt: skip
    assert "at -0.33 on average" in table.about


def test_unrelated_tasks_are_at_minus_one_over_the_others():
    values = [similarity(random_gates(seed, tasks=5, modules=40))[np.triu_indices(5, k=1)] for seed in range(20)]
    assert np.mean(values) == pytest.approx(-1 / 4, abs=0.02)


def test_gates_that_are_all_neutral_have_no_similarity():
    gates = made({"a": np.ones((2, 3, 4)), "b": np.ones((2, 3, 4))})
    assert gate_similarity(gates).rows == [["a", "b", None]]


# --- losses without an expert ---


@pytest.mark.parametrize("method", METHODS)
def test_an_expert_switched_off_is_an_expert_deleted(tiny_model, method):
    model = naive.adapted(tiny_model("llama"), method)
    batches = naive.batches()
    losses = expert_losses(model, batches)
    assert losses.tasks == list(TASKS)
    for expert in range(naive.layers(model)[0].badit_config["default"].num_experts):
        without = naive.delete_expert(copy.deepcopy(model), expert)
        for t, task in enumerate(TASKS):
            assert losses.without_TK[t, expert] == pytest.approx(naive.task_loss(without, batches[task]), abs=1e-4)
            rows = naive.rows(batches[task])
            pairs = [(naive.losses(model, row), naive.losses(without, row)) for row in rows]
            assert losses.error_TK[t, expert] == pytest.approx(naive.change_error(pairs), abs=1e-4)
    assert np.abs(losses.change_TK).max() > 0.02
    assert losses.error_TK.max() > 0.01
    for t, task in enumerate(TASKS):
        assert losses.loss_T[t] == pytest.approx(naive.task_loss(model, batches[task]), abs=1e-4)


def test_switching_off_leaves_nothing_behind(tiny_model):
    model = naive.adapted(tiny_model("llama"), "badit")
    row = naive.rows(naive.batches()["cities"])[0]
    before = naive.losses(model, row)
    expert_losses(model, naive.batches())
    assert naive.losses(model, row) == before
    assert not any(parameter.requires_grad and parameter.grad is not None for parameter in model.parameters())


def test_losses_do_not_see_the_split_into_batches(tiny_model):
    model = naive.adapted(tiny_model("llama"), "goat")
    batches = naive.batches()
    whole, split = (expert_losses(model, each) for each in (batches, {t: naive.rows(batches[t]) for t in TASKS}))
    for one, two in (
        (whole.loss_T, split.loss_T),
        (whole.without_TK, split.without_TK),
        (whole.error_TK, split.error_TK),
    ):
        np.testing.assert_allclose(one, two, atol=1e-5)
    alone = expert_losses(model, {"cities": naive.rows(batches["cities"])[:1]})
    np.testing.assert_allclose(alone.error_TK, 0, atol=1e-12)  # one prompt tells nothing of others


def test_an_expert_without_weights_is_not_missed(tiny_model):
    model = naive.adapted(tiny_model("llama"), "loramoe")
    naive.delete_expert(model, 1)
    batches = naive.batches()
    change_TK = expert_losses(model, batches).change_TK
    np.testing.assert_allclose(change_TK[:, 1], 0, atol=1e-6)
    assert np.abs(change_TK[:, [0, 2]]).min() > 1e-4


def test_the_table_of_losses(tiny_model):
    model = naive.adapted(tiny_model("llama"), "hydralora")
    batches = naive.batches()
    losses = expert_losses(model, batches)
    table = losses_table(losses)
    assert list(table.columns) == ["task", "expert", "loss", "loss_without", "change"]
    assert [row[:2] for row in table.rows] == [[task, k] for task in TASKS for k in range(3)]
    for row in table.records():
        assert row["change"] == pytest.approx(row["loss_without"] - row["loss"])
        assert row["loss"] == pytest.approx(losses.loss_T[TASKS.index(row["task"])])


# --- nearest prompts ---


@pytest.mark.parametrize("seed", range(5))
def test_scores_of_prompts_equal_the_naive_ones(seed):
    gates = random_gates(seed)
    scores = naive.prompt_scores(gates.by_task)
    np.testing.assert_allclose(prompt_scores(gates), scores, atol=1e-5)
    table = nearest_prompts(gates, texts(gates))
    assert list(table.columns) == ["expert", "rank", "task", "instance", "score", "prompt"]
    names = [(task, *text) for task, each in texts(gates).items() for text in each]
    for expert in range(3):
        best = sorted(range(len(names)), key=lambda p: -scores[p, expert])[:5]
        rows = [row for row in table.rows if row[0] == expert]
        assert [row[1] for row in rows] == [1, 2, 3, 4, 5]
        assert [(row[2], row[3], row[5]) for row in rows] == [names[p] for p in best]
        assert [row[4] for row in rows] == pytest.approx([scores[p, expert] for p in best], abs=1e-5)


@given(st.integers(0, 2**32 - 1))
def test_scores_do_not_see_a_modules_scale(seed):
    gates = random_gates(seed)
    scaled = made({task: values * [[[3.0], [0.5]]] - 1 for task, values in gates.by_task.items()})
    np.testing.assert_allclose(prompt_scores(scaled), prompt_scores(gates), atol=1e-4)
    np.testing.assert_allclose(prompt_scores(gates).sum(axis=0), 0, atol=1e-6)


def test_a_gate_that_does_not_move_has_no_nearest_prompts():
    values = np.ones((2, 3, 4))
    values[0, :, 1] = 1.5
    gates = made({"a": values, "b": np.ones((2, 3, 4))})
    table = nearest_prompts(gates, {"a": [("1", "x" * 400), ("2", "y")], "b": [("3", "z"), ("4", "w")]})
    assert {row[0] for row in table.rows} == {1}
    assert table.rows[0][:4] == [1, 1, "a", "1"]
    assert table.rows[0][5] == "x" * 300
    assert len(table.rows) == 4  # fewer prompts than places


@pytest.mark.parametrize("given_texts", [{}, {"a": [("1", "x")]}])
def test_texts_must_go_with_the_prompts(given_texts):
    with pytest.raises(BaditError, match=r"texts: task a has \d for 2 prompts"):
        nearest_prompts(made({"a": np.ones((2, 3, 4))}), given_texts)


# --- summaries ---


def summaries(gate_TK, change_TK, prompts=2, noise=0.0, names=None, error=0.0):
    """Tables of tasks with the given mean gates, whose prompts lie ``noise`` beside them on either side."""
    offsets = np.linspace(-noise, noise, prompts)[:, None, None]
    gate_TK = np.asarray(gate_TK, dtype=float)
    names = names or [f"task{t}_t{t}" for t in range(len(gate_TK))]
    gates = made(
        {name: np.tile(gate_K, (prompts, 1, 1)) + offsets for name, gate_K in zip(names, gate_TK, strict=True)}
    )
    change_TK = np.asarray(change_TK, dtype=float)
    return abilities_table(gates, change_TK, np.full_like(change_TK, error))


def test_a_summary_names_who_draws_on_it_and_who_is_hurt():
    table = summaries(
        [[1.10, 0.9], [1.12, 0.9], [0.9, 1.1], [0.8, 1.1]], [[0.0, 0.3], [0.01, 0.0], [0.6, 0.0], [0.0, 0.3]]
    )
    assert list(table.columns) == [
        "expert", "tasks", "hurt_most", "mean_gate", "spread", "change", "summary"
    ]  # fmt: skip
    first, second = table.records()
    assert (first["tasks"], first["hurt_most"]) == ("task1_t1, task0_t0", "task2_t2")
    assert [first[key] for key in ("mean_gate", "spread", "change")] == pytest.approx([0.98, 0.32, 0.1525])
    assert first["summary"] == (
        "Drawn on most by 1 t1 and 0 t0 (gate 1.11 against 0.98 on average). "
        "Without it the loss of 2 t2 rises by 0.60 nats a token, of all tasks by 0.15."
    )
    assert second["summary"] == (
        "Drawn on most by 2 t2 and 3 t3 (gate 1.10 against 1.00 on average). "
        "Without it the loss of 0 t0 and 3 t3 rises by 0.30 nats a token, of all tasks by 0.15."
    )


def test_a_summary_says_where_tasks_hardly_differ():
    alike = summaries([[1.02], [1.01], [1.022]], [[0.31], [0.3], [0.29]]).records()[0]
    assert (alike["tasks"], alike["hurt_most"]) == ("", "")
    assert alike["summary"] == (
        "All tasks draw on it alike (gate 1.02, spread 0.01). "
        "Without it the loss of all tasks rises by 0.30 nats a token on average."
    )
    none = summaries([[1.0], [1.0]], [[0.004], [-0.001]]).records()[0]
    assert none["summary"] == (
        "All tasks draw on it alike (gate 1.00, spread 0.000). Without it no task's loss changes by 0.005 nats a token."
    )


def test_a_lead_within_the_prompts_own_spread_is_none():
    gates = [[1.1], [1.0], [0.9]]
    assert summaries(gates, np.zeros((3, 1)), prompts=4, noise=0.02).records()[0]["tasks"] == "task0_t0"
    noisy = summaries(gates, np.zeros((3, 1)), prompts=4, noise=0.3).records()[0]
    assert noisy["tasks"] == ""
    assert noisy["summary"].startswith("All tasks draw on it alike (gate 1.00, spread 0.20)")
    assert summaries(gates, np.zeros((3, 1)), prompts=1).records()[0]["tasks"] == "task0_t0"
    changes = [[0.4], [0.1], [0.1]]
    assert summaries(gates, changes, error=0.06).records()[0]["hurt_most"] == "task0_t0"
    noisy = summaries(gates, changes, error=0.07).records()[0]
    assert noisy["hurt_most"] == ""
    assert noisy["summary"].endswith("Without it the loss of all tasks rises by 0.20 nats a token on average.")


def test_a_summary_says_where_a_loss_falls():
    falls = summaries([[1.0], [1.0]], [[-0.05], [-0.03]]).records()[0]["summary"]
    assert falls.endswith("Without it the loss of all tasks falls by 0.04 nats a token on average.")
    mixed = summaries([[1.0], [1.0], [1.0]], [[0.02], [-0.06], [-0.05]]).records()[0]["summary"]
    assert mixed.endswith("the loss of 0 t0 rises by 0.02 nats a token, while that of all tasks falls by 0.03.")


def test_a_summary_of_one_task():
    assert summaries([[1.2]], [[0.3]]).records()[0]["summary"] == (
        "Its gate is 1.20 on the one task. Without it the loss of that task rises by 0.30 nats a token."
    )


@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.floats(0, 2))
def test_what_is_named_leads(seed, tasks, size):
    rng = np.random.default_rng(seed)
    gate_TK, change_TK = 1 + size * rng.normal(size=(tasks, 3)), size * rng.normal(size=(tasks, 3))
    names = [f"t{t}" for t in range(tasks)]
    for expert, row in enumerate(summaries(gate_TK, change_TK, names=names).records()):
        for column, values in (("tasks", gate_TK[:, expert]), ("hurt_most", change_TK[:, expert])):
            named = [names.index(name) for name in row[column].split(", ") if name]
            assert named == np.argsort(-values)[: len(named)].tolist()
            assert len(named) <= 2
            assert all(values[t] > values.mean() for t in named)
        assert row["summary"].count(". ") == 1
        assert row["summary"].endswith(".")


def test_readable_names():
    assert readable("task363_sst2_polarity_classification") == "363 sst2 polarity classification"
    assert readable("category_of") == "category of"
    assert readable("tasks") == "tasks"


# --- all of it ---


@pytest.mark.parametrize("known", [True, False])
def test_the_atlas(tiny_model, known):
    model = helpers.adapted(tiny_model("llama"))
    batches = naive.batches()
    own = {task: [(f"{task}-{i}", f"text {i}") for i in range(3)] for task in TASKS}
    abilities = {"cities": ("lookup",), "rivers": ("lookup",), "seas": ("counting",)} if known else {}
    train = (Instance(id="1", input="x", outputs=("y",)),)
    tasks = [Task(name=task, definition="d", abilities=abilities.get(task, ()), train=train) for task in TASKS]
    tables = ability_atlas(model, batches, prompt_gates(model, batches), own, tasks)
    names = ["gates", "gate_similarity", "expert_losses", "nearest_prompts", "abilities"]
    assert [table.name for table in tables] == [*names, *(["ability_recovery"] if known else [])]
    assert all(table.rows for table in tables)
    split = {task: naive.rows(batches[task]) for task in TASKS}
    again = ability_atlas(model, split, prompt_gates(model, split), own, tasks)
    for table in (0, 2):
        for one, two in zip(tables[table].rows, again[table].rows, strict=True):
            assert one[:2] == two[:2]
            assert one[-2:] == pytest.approx(two[-2:], abs=1e-5)


def test_the_atlas_needs_no_gradients(tiny_model):
    model = helpers.adapted(tiny_model("llama")).requires_grad_(True)
    with torch.enable_grad():
        prompt_gates(model, naive.batches())
        expert_losses(model, naive.batches())
    assert all(parameter.grad is None for parameter in model.parameters())

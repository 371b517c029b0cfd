"""The ability atlas against loops and planted data."""

import copy
import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import zscore

import reference
from analysis import naive_experts as naive
from analysis.naive_experts import BATCHES, METHODS, ROWS, TASKS
from badit.analysis import atlas
from badit.analysis.gates import PromptGates, prompt_gates
from badit.data import builtin_tasks
from data.examples import make_task
from tuner import helpers


def wrapped(by_task):
    """Returns PromptGates with the given gates (prompts, modules, experts) by task."""
    by_task = {task: np.asarray(values, dtype=np.float32) for task, values in by_task.items()}
    modules = next(iter(by_task.values())).shape[1]
    return PromptGates([(m, "mlp.gate_proj") for m in range(modules)], by_task)


def random_gates(seed):
    """Returns gates of four tasks with three prompts each: two modules with three experts each."""
    rng = np.random.default_rng(seed)
    return wrapped({f"task{t}": 3 * rng.dirichlet(np.ones(3), (3, 2)) for t in range(4)})


@given(st.integers(0, 2**32 - 1), st.permutations(range(4)))
def test_similarity_matches_naive_and_ignores_a_shift_shared_by_all_tasks(seed, order):
    gates = random_gates(seed)
    shift = np.random.default_rng(seed).normal(size=(2, 3))
    shift -= shift.mean(axis=1, keepdims=True)  # so that the gates keep their sum
    tasks = list(gates.by_task)
    other = wrapped({tasks[t]: gates.by_task[tasks[t]] + shift for t in order})
    profiles = np.array([of_task.mean(axis=0).flatten() for of_task in gates.by_task.values()])
    expected = reference.gate_similarity(profiles)
    np.testing.assert_allclose(atlas.similarity(gates), expected, atol=1e-4)
    np.testing.assert_allclose(atlas.similarity(other), expected[np.ix_(order, order)], atol=1e-4)


def test_gate_similarity_of_two_groups_and_of_constant_gates():
    first, second = [[1.5, 0.5, 1.0]], [[0.5, 1.5, 1.0]]
    table = atlas.gate_similarity(
        wrapped({"c": [second], "a": [first], "b": [first], "d": [second]})
    )
    similar = table.set_index(["task_a", "task_b"])["similarity"].round(4).to_dict()
    groups = {"a": 1, "b": 1, "c": 2, "d": 2}
    expected = {
        pair: 1 if groups[pair[0]] == groups[pair[1]] else -0.5
        for pair in itertools.combinations("abcd", 2)
    }
    assert similar == expected
    assert table["noise"].unique().tolist() == pytest.approx([2 / 2**0.5]), "1 module, 3 experts"
    constant = wrapped({"a": np.ones((2, 3, 4)), "b": np.ones((2, 3, 4))})
    assert atlas.gate_similarity(constant)["similarity"].isna().all()


def test_unrelated_gates_have_a_similarity_of_0_and_mostly_within_noise():
    rng = np.random.default_rng(0)
    tables = []
    for _ in range(60):
        gates = {f"t{t}": 4 * rng.dirichlet(np.ones(4), (1, 12)) for t in range(5)}
        tables.append(atlas.gate_similarity(wrapped(gates)))
    frame = pd.concat(tables)
    assert abs(frame["similarity"].mean()) < 0.01
    assert 0.93 < (frame["similarity"].abs() <= frame["noise"]).mean() < 0.99
    two = wrapped({"a": rng.random((1, 2, 3)), "b": rng.random((1, 2, 3))})
    assert atlas.gate_similarity(two)["similarity"].isna().all(), "always opposite deviations"


@pytest.mark.parametrize("method", METHODS)
def test_disabled_expert_matches_deleted_expert(tiny_model, method):
    model = naive.adapted(tiny_model("llama"), method).requires_grad_(True)
    with torch.enable_grad():
        losses_TS, errors_TK = atlas.expert_losses(model, BATCHES)
    assert all(parameter.grad is None for parameter in model.parameters())
    experts = range(naive.layers(model)[0].badit_config["default"].num_experts)
    models = [model, *(naive.delete_expert(copy.deepcopy(model), expert) for expert in experts)]
    for t, task in enumerate(TASKS):
        losses = [[naive.losses(state, row) for row in ROWS[task]] for state in models]
        assert losses_TS[t] == pytest.approx(
            [np.mean(np.concatenate(of)) for of in losses], abs=1e-4
        )
        errors = [naive.change_error(list(zip(losses[0], of, strict=True))) for of in losses[1:]]
        assert errors_TK[t] == pytest.approx(errors, abs=1e-4)
    assert np.abs(losses_TS[:, 1:] - losses_TS[:, :1]).max() > 0.02
    assert errors_TK.max() > 0.01


@pytest.mark.parametrize("seed", range(5))
def test_prompt_scores_match_naive_and_ignore_a_modules_scale(seed):
    gates = random_gates(seed)
    scores = zscore(np.concatenate([*gates.by_task.values()]).astype(float), axis=0).mean(axis=1)
    np.testing.assert_allclose(atlas.prompt_scores(gates), scores, atol=1e-5)
    scaled = wrapped(
        {task: values * [[[3.0], [0.5]]] - 1 for task, values in gates.by_task.items()}
    )
    np.testing.assert_allclose(atlas.prompt_scores(scaled), scores, atol=1e-4)
    prompts = [(task, task.test) for task in (make_task(name, test=3) for name in gates.by_task)]
    names = [
        (task.name, instance.id, instance.input)
        for task, instances in prompts
        for instance in instances
    ]
    best = [(k, p) for k in range(3) for p in np.argsort(-scores[:, k])[:5]]
    table = atlas.nearest_prompts(gates, prompts)
    assert list(table.itertuples(index=False, name=None)) == [
        (k, 1 + i % 5, *names[p]) for i, (k, p) in enumerate(best)
    ]


def abilities(gate_TK, change_TK, prompts=2, noise=0.0, error=0.0):
    """Returns the abilities for tasks with the given mean gates.

    The prompts differ from them by up to ``noise``.
    """
    offsets_P11 = np.linspace(-noise, noise, prompts)[:, None, None]
    gates = wrapped(
        {f"task{t}_t{t}": np.asarray(gate_K) + offsets_P11 for t, gate_K in enumerate(gate_TK)}
    )
    change_TK = np.asarray(change_TK, dtype=float)
    return atlas.expert_abilities(gates, change_TK, np.full_like(change_TK, error)).to_dict(
        "records"
    )


def test_abilities_name_tasks_with_largest_gates_and_largest_loss_changes():
    gates = [[1.10, 0.9], [1.12, 0.9], [0.9, 1.1], [0.8, 1.1]]
    first, second = abilities(gates, [[0.0, 0.3], [0.01, 0.0], [0.6, 0.0], [0.0, 0.3]])
    assert (first["tasks"], first["hurt_most"]) == ("task1_t1, task0_t0", "task2_t2")
    assert [first[key] for key in ("mean_gate", "spread", "change")] == pytest.approx(
        [0.98, 0.32, 0.1525]
    )
    assert (second["tasks"], second["hurt_most"]) == ("task2_t2, task3_t3", "task0_t0, task3_t3")


def test_no_task_is_named_if_tasks_hardly_differ_or_the_lead_is_noise():
    alike = [
        ([1.02, 1.01, 1.022], [0.31, 0.3, 0.29]),
        ([1.0, 1.0], [-0.05, -0.03]),
        ([1.0, 1.0], [0, 4e-3]),
    ]
    for gates, changes in [*alike, ([1.2], [0.3])]:
        (row,) = abilities(np.transpose([gates]), np.transpose([changes]))
        assert (row["tasks"], row["hurt_most"]) == ("", "")
    gates, changes = [[1.1], [1.0], [0.9]], [[0.4], [0.1], [0.1]]
    rows = [abilities(gates, changes, prompts=4, noise=noise)[0] for noise in (0.02, 0.3)]
    assert [row["tasks"] for row in rows] == ["task0_t0", ""]
    assert abilities(gates, changes, prompts=1)[0]["tasks"] == "task0_t0"
    rows = [abilities(gates, changes, error=error)[0] for error in (0.06, 0.07)]
    assert [row["hurt_most"] for row in rows] == ["task0_t0", ""]


def random_similarity(seed, tasks):
    values = np.random.default_rng(seed).normal(size=(tasks, tasks))
    return (values + values.T) / 2


def recovered(similarity_TT, abilities):
    return atlas.ability_recovery(similarity_TT, abilities).set_index("measure").T.to_dict("list")


@pytest.mark.parametrize("seed", range(4))
def test_ability_recovery_matches_enumeration_of_all_permutations(seed):
    abilities = [{"a"}, {"a", "b"}, {"b", "c"}, {"c"}, {"a", "c"}]
    similar = random_similarity(seed, 5)
    measures = recovered(similar, abilities)
    for measure, (value, *chances) in naive.recovery(similar, abilities).items():
        assert measures[measure][0] == pytest.approx(value, abs=1e-9)
        assert measures[measure][1:] == pytest.approx(chances, abs=0.02)
    assert np.isnan(recovered(similar, [{"a"}] * 5)["correlation"]).all(), (
        "the correlation is undefined"
    )
    assert np.isnan([*recovered(np.full((5, 5), np.nan), abilities).values()]).all()


def test_planted_abilities_are_recovered():
    abilities = [set(task.abilities) for task in builtin_tasks()]
    overlap = np.array([[len(a & b) for b in abilities] for a in abilities], dtype=float)
    for value, chance, p_value in recovered(
        overlap + 0.3 * random_similarity(0, len(abilities)), abilities
    ).values():
        assert value > max(0.6, chance + 0.3)
        assert 1 / 10_001 <= p_value < 0.001  # never 0: the observed order counts as a permutation


@pytest.mark.parametrize("abilities", [("lookup",), ()])
def test_atlas_includes_recovery_only_if_abilities_are_known(tiny_model, abilities):
    model = helpers.adapted(tiny_model("llama"))
    tasks = [make_task(task, test=3, abilities=abilities) for task in TASKS]
    prompts = [(task, task.test) for task in tasks]
    tables = atlas.ability_atlas(model, BATCHES, prompt_gates(model, BATCHES), prompts)
    names = [
        "gates",
        "clusters",
        "gate_similarity",
        "expert_losses",
        "nearest_prompts",
        "abilities",
        "ability_recovery",
    ]
    assert [table.attrs["name"] for table in tables] == names[: 7 if abilities else 6]
    # This model has a router.
    assert [len(table) > 0 for table in tables] == [name != "clusters" for name in names][
        : len(tables)
    ]
    losses_TS, _ = atlas.expert_losses(model, BATCHES)
    rows = [(task, k, *losses_TS[t, [0, 1 + k]]) for t, task in enumerate(TASKS) for k in range(3)]
    assert list(tables[3].itertuples(index=False, name=None)) == [
        (*row, row[3] - row[2]) for row in rows
    ]

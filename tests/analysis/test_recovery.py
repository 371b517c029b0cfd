"""Mantel's test against all permutations, on planted structure and on none."""

import numpy as np
import pytest
from badit.analysis.recovery import ability_recovery

from analysis import naive_experts as naive
from badit.data.suite import builtin_tasks
from badit.errors import BaditError


def symmetric(values):
    return (values + values.T) / 2


def random_similarity(seed, tasks):
    return symmetric(np.random.default_rng(seed).normal(size=(tasks, tasks)))


def measured(similarity, abilities, **options):
    names = [f"t{i}" for i in range(len(abilities))]
    table = ability_recovery(names, similarity, dict(zip(names, abilities, strict=True)), **options)
    assert list(table.columns) == ["measure", "value", "chance", "p_value"]
    return {row[0]: row[1:] for row in table.rows}


@pytest.mark.parametrize("seed", range(4))
def test_both_measures_equal_those_over_all_permutations(seed):
    abilities = [{"a"}, {"a", "b"}, {"b", "c"}, {"c"}, {"a", "c"}]
    similarity = random_similarity(seed, 5)
    expected = naive.recovery(similarity, abilities)
    found = measured(similarity, abilities, permutations=20_000)
    for measure, (value, chance, p_value) in expected.items():
        assert found[measure][0] == pytest.approx(value, abs=1e-9)
        assert found[measure][1] == pytest.approx(chance, abs=0.02)
        assert found[measure][2] == pytest.approx(p_value, abs=0.02)


def test_planted_abilities_are_recovered():
    tasks = builtin_tasks()
    overlap = np.array([[len(set(a.abilities) & set(b.abilities)) for b in tasks] for a in tasks], dtype=float)
    similarity = overlap + 0.3 * random_similarity(0, len(tasks))
    known = {task.name: task.abilities for task in tasks}
    rows = ability_recovery([task.name for task in tasks], similarity, known).records()
    assert [row["measure"] for row in rows] == ["correlation", "nearest_neighbour"]
    assert rows[0]["value"] > 0.6
    assert rows[1]["value"] > 0.7
    for row in rows:
        assert row["value"] > row["chance"] + 0.3
        assert 1 / 10_001 <= row["p_value"] < 0.001  # never 0: the observed order is one of those that may be


def test_without_structure_p_is_uniform():
    tasks = [set(task.abilities) for task in builtin_tasks()]
    found = [measured(random_similarity(seed, len(tasks)), tasks, permutations=200) for seed in range(200)]
    p_values = np.array([each["correlation"][2] for each in found])
    assert p_values.mean() == pytest.approx(0.5, abs=0.07)
    assert (p_values <= 0.05).mean() == pytest.approx(0.05, abs=0.04)
    chance = np.mean([each["nearest_neighbour"][1] for each in found])
    assert np.mean([each["nearest_neighbour"][0] for each in found]) == pytest.approx(chance, abs=0.03)


def test_the_same_seed_gives_the_same_numbers():
    abilities = [{"a"}, {"a"}, {"b"}, {"b"}]
    similarity = random_similarity(1, 4)
    assert measured(similarity, abilities, seed=3) == measured(similarity, abilities, seed=3)
    assert measured(similarity, abilities, seed=3) != measured(similarity, abilities, seed=4)


def test_what_is_not_defined_is_null():
    assert measured(random_similarity(0, 3), [{"a"}, {"a"}, {"a"}])["correlation"] == [None, None, None]
    assert set(map(tuple, measured(np.full((3, 3), np.nan), [{"a"}, {"b"}, {"a"}]).values())) == {(None, None, None)}
    assert set(map(tuple, measured(np.zeros((1, 1)), [{"a"}]).values())) == {(None, None, None)}


def test_what_is_refused():
    with pytest.raises(BaditError, match="task t1 has none that are known"):
        ability_recovery(["t0", "t1"], np.eye(2), {"t0": {"a"}, "t1": ()})
    with pytest.raises(BaditError, match=r"similarity: has shape \(2, 2\) for 1 tasks"):
        ability_recovery(["t0"], np.eye(2), {"t0": {"a"}})

"""Task names, fingerprints, splits, mixtures and orders, and the built-in suite."""

import hashlib
import json
import re
from importlib import resources

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from badit.data import (
    Instance,
    Source,
    Task,
    builtin_tasks,
    hold_out,
    limit,
    load_tasks,
    mixture,
    ordered,
    quotas,
)
from data.examples import make_task, write_rows
from docs.pages import Page
from refusals import refuses

SIZES = st.lists(st.integers(0, 30), min_size=1, max_size=5)
# Published results use these orders: they must not change with the Python version or the code.
BENCHMARK = Page("docs/benchmark.md").text
ROWS = re.findall(r"^\| (s\w+-\d) \| ([\d, ]+) \|$", BENCHMARK, flags=re.MULTILINE)
PUBLISHED = {name: [int(number) for number in row.split(",")] for name, row in ROWS}
SUPERNI = [f"task{number:03}_of_superni" for number in PUBLISHED["sapt-1"]]
# A new hash means that all results on the suite change: update it only on purpose, and note it in
# the changelog.
SUITE_SHA256 = "777982bd2ae00320cc2ac1c7c1fbd514c0477c428b55777cc41842af1b3139e4"


def order_of(names, order):
    tasks = [Task(name=name, definition="Answer.") for name in names]
    return [task.name for task in ordered(tasks, order)]


def numbers(names):
    return [int(name.split("_")[0].removeprefix("task")) for name in names]


@pytest.mark.parametrize(
    "name", ["", " ", ".hidden", "a/b", "a\\b", "a\x7fb", "a\u2028b", "x" * 121, "語" * 81]
)
def test_task_names_must_be_valid_file_names(name):
    with pytest.raises(ValidationError, match="file name"):
        Task(name=name, definition="d")
    for fine in ("x" * 120, "語" * 80, "task 1 (new)", "a..b"):
        assert Task(name=fine, definition="d").name == fine


def test_fingerprints_are_those_that_runs_have_recorded():
    assert make_task().fingerprint == "fce5fa900ef1e323"
    history = (("user", "e"),)
    chat = Instance(id="x", input="a", outputs=("b", "c"), instruction="d", history=history)
    assert chat.hash == 12278040876946108149
    assert Task(name="t", definition=None, train=(chat,)).fingerprint == "b75046ac4e6740a9"


@given(SIZES, st.integers(0, 20), st.integers(0, 3))
def test_hold_out_moves_at_most_a_quarter_and_draws_ignore_other_tasks(sizes, per_task, seed):
    tasks = [make_task(f"task-{i}", train=size) for i, size in enumerate(sizes)]
    for before, after in zip(tasks, hold_out(tasks, per_task, seed), strict=True):
        assert len(after.validation) == min(per_task, len(before.train) // 4)
        held_out = {*after.validation}
        assert after.train == tuple(i for i in before.train if i not in held_out)
        assert after.validation == tuple(i for i in before.train if i in held_out)
        assert after.test == before.test
    reverse = tasks[::-1]
    assert hold_out(reverse, 3, seed) == [hold_out([task], 3, seed)[0] for task in reverse]
    assert limit(reverse, 4, 2, seed) == [limit([task], 4, 2, seed)[0] for task in reverse]


def test_held_out_draw_is_deterministic_and_depends_on_seed_and_name():
    (task,) = hold_out([make_task(train=40)], 5, seed=0)
    assert [i.id for i in task.validation] == ["a2", "a11", "a20", "a26", "a36"]
    draws = set()
    for name, seed in (("a", 0), ("a", 1), ("b", 0), ("b", 1)):
        (drawn,) = hold_out([make_task(name, train=100)], 10, seed)
        draws.add(tuple(i.id for i in drawn.validation))
    assert len(draws) == 4
    assert hold_out([task], 3, seed=1) == [task], "an existing validation set is kept"


@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Be brief."}]])
def test_no_training_prompt_contains_an_answer_that_is_held_out(tmp_path, system):
    def load(rows):
        path = write_rows(tmp_path / "chats.jsonl", *({"messages": row} for row in rows))
        return load_tasks(Source(path, turns="all"))

    def chats_of(instances):
        return {instance.outputs[0].split()[0] for instance in instances}

    chats = []
    for chat in range(8):
        chats.append([])
        for turn in range(3):
            chats[-1] += [{"role": "user", "content": f"q {turn}"}]
            chats[-1] += [{"role": "assistant", "content": f"a{chat} {turn}"}]

    (task,) = hold_out(load([system + chat for chat in chats]), 4, seed=0)
    assert (len(task.train), len(task.validation)) == (18, 6)
    assert not chats_of(task.train) & chats_of(task.validation)
    (task,) = hold_out(load([system + chats[0]]), 1, seed=0)
    assert (len(task.train), len(task.validation)) == (3, 0), "the only chat is trained"

    # A chat and its copy are held out, without the greeting with which all chats begin.
    greeting = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    greeted = [[*system, *greeting, *chat] for chat in chats]
    (task,) = hold_out(load(greeted * 2), 4, seed=0)
    assert (len(task.train), len(task.validation)) == (58, 6)
    assert not chats_of(task.train) & chats_of(task.validation)


@given(st.integers(0, 12), st.integers(0, 6), st.integers(0, 3))
def test_limit_nests_training_sets_and_keeps_the_first_test_instances(train, test, seed):
    task = make_task()
    (limited,) = limit([task], train, test, seed)
    (larger,) = limit([task], train + 1, None, seed)
    assert len(limited.train) == min(train, 8)
    assert set(limited.train) <= set(larger.train)
    assert (limited.test, larger.test) == (task.test[:test], task.test)
    assert limit([task], None, None, seed) == [task]


@given(sizes=st.lists(st.integers(1, 99), min_size=1, max_size=6), temperature=st.floats(1, 50))
def test_quotas_scale_task_sizes_by_temperature(sizes, temperature):
    tasks = [make_task(f"t{i}", train=size, test=0) for i, size in enumerate(sizes)]
    assert quotas(tasks) is None
    powers = [size ** (1 / temperature) for size in sizes]
    shares = [max(1, round(sum(sizes) * power / sum(powers))) for power in powers]
    expected = {f"t{i}": share for i, share in enumerate(shares)}
    assert quotas(tasks, temperature=temperature) == (None if temperature == 1 else expected)


@given(SIZES, st.integers(0, 3))
def test_mixture_has_every_instance_once_in_an_order_set_by_the_seed(sizes, seed):
    tasks = [make_task(f"task-{i}", train=size) for i, size in enumerate(sizes)]
    order = mixture(tasks, seed)
    assert sorted(order) == list(range(sum(sizes)))
    assert order == mixture(tasks, seed)
    assert order != mixture(tasks, seed + 1) or sum(sizes) < 10


@given(
    names=st.permutations(SUPERNI), count=st.integers(1, 15), order=st.sampled_from(list(PUBLISHED))
)
def test_published_orders_do_not_depend_on_the_loading_order(names, count, order):
    loaded = names[:count] if order.startswith("sapt") else names
    assert len(PUBLISHED) == 7
    expected = [number for number in PUBLISHED[order] if number in numbers(loaded)]
    assert numbers(order_of(loaded, order)) == expected


def test_order_may_be_a_list_and_invalid_orders_are_refused():
    assert order_of(["a", "b", "c"], ["c", "a", "b"]) == ["c", "a", "b"]
    names = [name for name in SUPERNI if name.startswith(("task002", "task363", "task591"))]
    assert numbers(order_of(names, ["591", "task002", "363"])) == [591, 2, 363]
    cities = ["cities", "rivers"]
    for names, order, message in (
        (cities, "sapt-3", r"data\.order: unknown order 'sapt-3' \(did you mean 'sapt-2'\?\)"),
        (cities, "seeded--1", "unknown order 'seeded--1'"),
        (cities, "sapt-1", r"does not contain task cities; add it, or remove it from data\.tasks"),
        (cities, [*cities, "cities"], r"data\.order: 'cities' is listed twice; list it once"),
        (["task363_one", "task363_other"], "sapt-1", "does not contain task task363_"),
    ):
        refuses(message, order_of, names, order)


def test_suite_content_has_the_recorded_hash():
    """Python's hash seed differs between test processes, so a dependence on it fails too."""
    tasks = builtin_tasks()
    content = [
        [task.name, task.definition, task.categories, task.abilities]
        + [[example.input, example.output] for example in task.demonstrations]
        + [[instance.id, instance.input, instance.outputs] for instance in task.train + task.test]
        for task in tasks
    ]
    assert hashlib.sha256(json.dumps(content).encode()).hexdigest() == SUITE_SHA256
    abilities = json.loads((resources.files("badit.data") / "suite.json").read_text())["abilities"]
    assert {ability for task in tasks for ability in task.abilities} == set(abilities)
    assert not any(task.validation for task in tasks)

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
from datetime import date

import pytest
from rouge_score import rouge_scorer

from badit.data import ABILITIES, builtin_tasks
from badit.data.suite import CATEGORIES, DAYS, MONTHS, OPPOSITES, REVIEWS

TASKS = builtin_tasks()
EACH = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
# A change here changes every result on the suite: make it on purpose, and say so in the changelog.
SHA256 = "777982bd2ae00320cc2ac1c7c1fbd514c0477c428b55777cc41842af1b3139e4"


def digest() -> str:
    content = [
        [task.name, task.definition, task.categories, task.abilities]
        + [[example.input, example.output] for example in task.demonstrations]
        + [[instance.id, instance.input, instance.outputs] for instance in task.train + task.test]
        for task in builtin_tasks()
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def inputs_and_answers(name):
    task = next(task for task in TASKS if task.name == name)
    return [(instance.input, instance.outputs[0]) for instance in task.train + task.test]


def test_the_suite_has_not_drifted_and_does_not_depend_on_the_hash_seed():
    assert digest() == SHA256
    code = "from data.test_suite import digest; print(digest())"
    environment = {"PYTHONHASHSEED": "12345", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    printed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == SHA256


def test_the_names_are_sorted_and_distinct():
    names = [task.name for task in TASKS]
    assert names == sorted(set(names))
    assert len(names) == 16


@EACH
def test_each_task_is_small_plain_and_not_won_by_a_trick(task):
    assert (len(task.train), len(task.validation), len(task.test), len(task.demonstrations)) == (160, 0, 40, 2)
    inputs = [example.input for example in (*task.demonstrations, *task.train, *task.test)]
    assert len(set(inputs)) == len(inputs), "no input twice"
    assert len({instance.id for instance in task.train + task.test}) == 200
    assert len(task.definition.split()) <= 60
    for instance in task.train + task.test:
        (answer,) = instance.outputs
        assert len(instance.input.split()) <= 60
        assert 1 <= len(answer.split()) <= 12
        assert re.search("[A-Za-z0-9]", answer)
    answers = [instance.outputs[0] for instance in task.test]
    assert max(map(answers.count, answers)) <= 0.7 * len(answers), "no answer wins by being common"
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    scores = [scorer.score(instance.outputs[0], instance.input)["rougeL"].fmeasure for instance in task.test]
    assert max(scores) <= 0.5, "nor does an answer that repeats the input"


def test_abilities_come_from_the_vocabulary_and_are_shared():
    used = [ability for task in TASKS for ability in task.abilities]
    assert set(used) == set(ABILITIES)
    assert all(used.count(ability) >= 2 for ability in ABILITIES)
    pairs = list(itertools.combinations([set(task.abilities) for task in TASKS], 2))
    shared = [bool(a & b) for a, b in pairs]
    # Both kinds of pair are needed for an analysis to be right or wrong about.
    assert 15 <= sum(shared) <= len(pairs) // 2


def test_numbers_are_right():
    assert all(
        answer == str(sum(map(int, re.findall(r"\d+", text)))) for text, answer in inputs_and_answers("got_more")
    )
    assert all(
        answer == str(max(map(int, re.findall(r"\d+", text)))) for text, answer in inputs_and_answers("largest_number")
    )
    for text, answer in inputs_and_answers("total_of_two"):
        facts, question = text.split("How many")
        owned = dict(re.findall(r"(\w+) has (\d)", facts))
        assert answer == str(sum(int(count) for name, count in owned.items() if name in question))


def test_counts_are_right():
    for text, answer in inputs_and_answers("item_count"):
        assert answer == str(len(re.findall(r"\ban? ", text)))
    for text, answer in inputs_and_answers("category_count"):
        kind, *words = re.findall("[a-z]+", text.removeprefix("Kind").replace("Words", ""))
        assert answer == str(sum(word in CATEGORIES[kind] for word in words))


def test_orders_are_right():
    for text, answer in inputs_and_answers("alphabetical_first"):
        assert answer == sorted(text.split(", "))[0]
    for text, answer in inputs_and_answers("middle_age"):
        ages = {name: int(age) for name, age in re.findall(r"(\w+) is (\d+)", text)}
        assert ages[answer] == sorted(ages.values())[1]


def test_kinds_are_right():
    kind_of = {word: kind for kind, words in CATEGORIES.items() for word in words}
    assert len(kind_of) == sum(map(len, CATEGORIES.values()))
    for text, answer in inputs_and_answers("common_category"):
        assert {kind_of[word] for word in text.split(", ")} == {answer}
    for text, answer in inputs_and_answers("odd_one_out"):
        kinds = [kind_of[word] for word in text.split(", ")]
        assert kinds.count(kind_of[answer]) == 1


def test_facts_are_found():
    for text, answer in inputs_and_answers("who_has_it"):
        thing = text.split()[-1].rstrip("?")
        assert f"{answer} has the {thing}." in text
    for text, answer in inputs_and_answers("who_has_more"):
        counts = {name: int(count) for name, count in re.findall(r"(\w+) has (\d+)", text)}
        assert counts[answer] == max(counts.values()) > min(counts.values())


def test_dates_and_days_are_right():
    for text, answer in inputs_and_answers("date_format"):
        day, month, year = text.split()
        assert date.fromisoformat(answer) == date(int(year), MONTHS.index(month) + 1, int(day))
    for text, answer in inputs_and_answers("which_day"):
        step, day = re.findall(r"(after|before) (\w+)\.", text)[0]
        assert DAYS.index(answer) == (DAYS.index(day) + (1 if step == "after" else -1)) % 7


def test_words_have_one_opposite():
    pairs = [(word, opposite) for word, opposite, _ in OPPOSITES] + [pair for _, pairs in REVIEWS for pair in pairs]
    opposite_of = dict(pairs) | {opposite: word for word, opposite in pairs}
    for text, answer in inputs_and_answers("opposite_adjective"):
        assert opposite_of[text.split()[1]] == answer
    for text, answer in inputs_and_answers("review_flip"):
        things = re.findall(r"[Tt]he (\w+)", text)
        said = re.findall(r"was (\w+)", text)
        assert answer == ", ".join(f"{opposite_of[word]} {thing}" for word, thing in zip(said, things, strict=True))


def test_reviews_have_one_mood():
    praise = {good for _, pairs in REVIEWS for good, _ in pairs}
    for text, answer in inputs_and_answers("review_sentiment"):
        assert {word in praise for word in re.findall(r"was (\w+)", text)} == {answer == "positive"}

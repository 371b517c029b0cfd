from __future__ import annotations

import hashlib
import itertools
import json
import re

import pytest
from rouge_score import rouge_scorer

from badit.data import ABILITIES, builtin_tasks

TASKS = builtin_tasks()
EACH = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
# A change here changes every result on the suite: make it on purpose, and say so in the changelog.
SHA256 = "777982bd2ae00320cc2ac1c7c1fbd514c0477c428b55777cc41842af1b3139e4"


def test_the_suite_has_not_drifted_and_does_not_depend_on_the_hash_seed():
    """Every process that runs the tests has another hash seed."""
    content = [
        [task.name, task.definition, task.categories, task.abilities]
        + [[example.input, example.output] for example in task.demonstrations]
        + [[instance.id, instance.input, instance.outputs] for instance in task.train + task.test]
        for task in TASKS
    ]
    assert hashlib.sha256(json.dumps(content).encode()).hexdigest() == SHA256


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

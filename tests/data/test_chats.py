"""A conversation as one row an answer."""

from __future__ import annotations

from typing import Any

import pytest

from badit.data import answer_rows
from badit.errors import BaditError

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Which city?"}
ANSWER = {"role": "assistant", "content": "Rome."}
LATER = {"role": "assistant", "content": "Lima.", "tool_calls": []}


def test_each_answer_has_all_that_came_before_it() -> None:
    assert answer_rows([SYSTEM, USER, ANSWER, USER, LATER, USER]) == [
        {"prompt": [SYSTEM, USER], "completion": [ANSWER]},
        {"prompt": [SYSTEM, USER, ANSWER, USER], "completion": [LATER]},
    ]
    assert answer_rows([USER]) == []
    assert answer_rows([]) == []


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([ANSWER, USER], "the assistant speaks first"),
        ([USER, {"content": "Rome."}], "message 1 must have a role"),
        ([USER, "Rome."], "message 1 must have a role"),
    ],
)
def test_what_is_no_chat_is_refused(messages: list[Any], problem: str) -> None:
    with pytest.raises(BaditError, match=problem):
        answer_rows(messages)

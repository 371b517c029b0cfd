"""Chats as rows of one prompt and one answer each, which is what a router of prompts is trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from badit.errors import BaditError


def answer_rows(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, list[dict[str, Any]]]]:
    """A conversation as a row for each of the assistant's messages, with all that came before it as the prompt.

    Rows are of TRL's conversational prompt–completion form, whose loss is on the completion alone. In training each
    answer is then routed on what a generation of it reads: the whole conversation so far.

    Args:
        messages: dicts of ``role`` and ``content``, as chat templates take them.

    Returns:
        ``{"prompt": [messages], "completion": [one message]}``, in the order of the conversation; none where the
        assistant says nothing.

    Raises:
        BaditError: a message has no role, or the assistant speaks first.
    """
    rows = []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message:
            raise BaditError(f"messages: message {number} must have a role, such as user or assistant: {message!r:.60}")
        if message["role"] != "assistant":
            continue
        if number == 0:
            raise BaditError("messages: the assistant speaks first; put the user's or a system's message before it")
        rows.append({"prompt": [dict(before) for before in messages[:number]], "completion": [dict(message)]})
    return rows

"""Chats: the answers of their assistant messages, as instances and as rows for other trainers."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from badit.data.source import Turns
from badit.support.errors import BaditError

# The names of roles in ShareGPT and other datasets.
_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant"}
# Keys of messages whose content would be lost.
_LOST = ("tool_calls", "function_call", "reasoning_content")


def answers(messages: Sequence[Any], turns: Turns) -> Iterator[dict[str, Any]]:
    """Yields the fields of an instance for every answer of a chat, or only for the last one.

    BaditError for an invalid message.
    """
    chat = tuple(_role_and_content(number, message) for number, message in enumerate(messages))
    numbers = [number for number, (role, _) in enumerate(chat) if role == "assistant"]
    if not numbers:
        roles = ", ".join(sorted({role for role, _ in chat})) or "none"
        raise BaditError(
            f"messages: there is no assistant message (roles: {roles:.60}); add an answer, or name "
            "its role assistant"
        )
    if turns == "last":
        del numbers[:-1]

    for number in numbers:
        # The message before the answer; "nothing" if there is none.
        *_, (role, text) = ("nothing", ""), *chat[:number]
        if role != "user":
            raise BaditError(
                f"messages.{number}: an assistant message must follow a user message, "
                f"not {role!r:.60}; remove the row"
            )
        yield {"history": chat[: number - 1], "input": text, "output": chat[number][1]}


def _role_and_content(number: int, message: Any) -> tuple[str, str]:
    """Returns the role and the text of a message, whose keys may be those of ShareGPT."""
    fields: Mapping[str, Any] = {}
    if isinstance(message, Mapping):
        fields = message
    role = fields.get("role", fields.get("from"))
    content = fields.get("content", fields.get("value"))
    # OpenAI's format: a list of parts, of which those without text are refused below.
    if isinstance(content, list):
        with suppress(TypeError, LookupError):  # not all parts are text
            content = "".join(part["text"] for part in content)
    for key in _LOST:
        if fields.get(key):
            raise BaditError(f"messages.{number}: {key}: not used; remove it, or the row")
    if not isinstance(role, str) or not isinstance(content, str):
        raise BaditError(f"messages.{number}: must have a role and text as content; remove the row")
    return _ROLES.get(role, role), content


def answer_rows(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, list[dict[str, Any]]]]:
    """Converts a conversation to one row per assistant message.

    The messages are dicts with ``role`` and ``content``. A row ``{"prompt": [messages before it],
    "completion": [the message]}`` has TRL's conversational prompt–completion format, with the loss
    on the completion only. So the gates of each answer depend on all messages before it.
    """
    # All messages are checked first, also those after the last answer.
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message:
            raise BaditError(
                f"messages: message {number} must have a role, such as user or assistant: "
                f"{message!r:.60}"
            )
    if messages and messages[0]["role"] == "assistant":
        raise BaditError(
            "messages: the first is an assistant message; put a user or system message before it"
        )
    return [
        {"prompt": [dict(before) for before in messages[:number]], "completion": [dict(message)]}
        for number, message in enumerate(messages)
        if message["role"] == "assistant"
    ]

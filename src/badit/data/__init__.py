"""Tasks: their schema, readers, splits, prompts and batches, and the built-in suite.

Importing this package loads neither torch nor transformers; what makes batches comes with torch at its first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from badit.data.chats import answer_rows
from badit.data.orders import SAPT_ORDERS, ordered
from badit.data.prompts import (
    ChatTemplate,
    Prompt,
    PromptEncoding,
    build_prompt,
    encode_answer,
    encode_example,
    encode_prompt,
    end_of_turn_id,
    example_length,
    own_input,
    prompt_text,
)
from badit.data.readers import load_tasks
from badit.data.schema import Demonstration, Instance, Task
from badit.data.splits import hold_out, limit, mixture
from badit.data.suite import ABILITIES, builtin_tasks

if TYPE_CHECKING:
    from badit.data.collation import AnswerCollator, batches_by_task, on_device

__all__ = [
    "ABILITIES",
    "SAPT_ORDERS",
    "AnswerCollator",
    "ChatTemplate",
    "Demonstration",
    "Instance",
    "Prompt",
    "PromptEncoding",
    "Task",
    "answer_rows",
    "batches_by_task",
    "build_prompt",
    "builtin_tasks",
    "encode_answer",
    "encode_example",
    "encode_prompt",
    "end_of_turn_id",
    "example_length",
    "hold_out",
    "limit",
    "load_tasks",
    "mixture",
    "on_device",
    "ordered",
    "own_input",
    "prompt_text",
]


def __getattr__(name: str) -> Any:
    if name in ("AnswerCollator", "batches_by_task", "on_device"):
        return getattr(import_module("badit.data.collation"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

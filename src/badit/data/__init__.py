"""Tasks: reading, splitting and ordering them, their prompts and batches, and the built-in suite.

Importing this package loads neither torch nor transformers, and pandas only with the readers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from badit.data.prompts import (
    answer_rows,
    build_prompt,
    encode_example,
    encode_examples,
    encode_prompts,
    own_input,
    prompt_text,
)
from badit.data.rows import Source
from badit.data.suite import ABILITIES, builtin_tasks
from badit.data.tasks import Demonstration, Instance, Task, hold_out, limit, mixture, ordered, quotas

if TYPE_CHECKING:
    from badit.data.encoded import AnswerCollator, Examples, batches_by_task, encode_tasks, on_device
    from badit.data.readers import load_sources, load_tasks

__all__ = [
    "ABILITIES", "AnswerCollator", "Demonstration", "Examples", "Instance", "Source", "Task", "answer_rows",
    "batches_by_task", "build_prompt", "builtin_tasks", "encode_example", "encode_examples", "encode_prompts",
    "encode_tasks", "hold_out", "limit", "load_sources", "load_tasks", "mixture", "on_device", "ordered", "own_input",
    "prompt_text", "quotas",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'badit.data' has no attribute {name!r}")
    return getattr(import_module("badit.data.readers" if name.startswith("load_") else "badit.data.encoded"), name)

"""Tasks: reading, splitting and ordering them, their prompts and batches, and the built-in suite.

Importing this package loads neither torch nor transformers.
"""

from badit.data.collation import AnswerCollator, batches_by_task, on_device
from badit.data.prompts import (
    ChatTemplate,
    Prompt,
    PromptEncoding,
    answer_rows,
    build_prompt,
    encode_answer,
    encode_example,
    encode_prompt,
    end_of_turn_id,
    own_input,
    prompt_text,
)
from badit.data.readers import load_tasks
from badit.data.suite import ABILITIES, builtin_tasks
from badit.data.tasks import SAPT_ORDERS, Demonstration, Instance, Task, hold_out, limit, mixture, ordered

__all__ = [
    "ABILITIES", "SAPT_ORDERS", "AnswerCollator", "ChatTemplate", "Demonstration", "Instance", "Prompt",
    "PromptEncoding", "Task", "answer_rows", "batches_by_task", "build_prompt", "builtin_tasks", "encode_answer",
    "encode_example", "encode_prompt", "end_of_turn_id", "hold_out", "limit", "load_tasks", "mixture", "on_device",
    "ordered", "own_input", "prompt_text",
]  # fmt: skip

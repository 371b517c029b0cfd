"""Tasks: reading, splitting and ordering them, their prompts and batches, and the built-in suite.

Importing this package loads neither torch nor transformers.
"""

from badit.data.encoded import AnswerCollator, Examples, batches_by_task, encode_tasks, on_device
from badit.data.prompts import (
    ChatTemplate,
    Prompt,
    PromptEncoding,
    answer_rows,
    build_prompt,
    encode_answer,
    encode_example,
    encode_examples,
    encode_prompt,
    encode_prompts,
    end_of_turn_id,
    own_input,
    prompt_text,
)
from badit.data.readers import load_sources, load_tasks
from badit.data.rows import Source
from badit.data.suite import ABILITIES, builtin_tasks
from badit.data.tasks import SAPT_ORDERS, Demonstration, Instance, Task, hold_out, limit, mixture, ordered, quotas

__all__ = [
    "ABILITIES", "SAPT_ORDERS", "AnswerCollator", "ChatTemplate", "Demonstration", "Examples", "Instance", "Prompt",
    "PromptEncoding", "Source", "Task", "answer_rows", "batches_by_task", "build_prompt", "builtin_tasks",
    "encode_answer", "encode_example", "encode_examples", "encode_prompt", "encode_prompts", "encode_tasks",
    "end_of_turn_id", "hold_out", "limit", "load_sources", "load_tasks", "mixture", "on_device", "ordered",
    "own_input", "prompt_text", "quotas",
]  # fmt: skip

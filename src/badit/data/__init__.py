"""Tasks: readers, splits, orders, prompts, batches, and the built-in suite.

Importing this package does not import torch, transformers, datasets or pandas.
"""

from badit.data.encoded import AnswerCollator, batches_by_task, encode_tasks
from badit.data.prompts import (
    answer_rows,
    build_prompt,
    encode_examples,
    encode_prompts,
    own_input,
    prompt_text,
)
from badit.data.readers import builtin_tasks, load_sources, load_tasks
from badit.data.rows import Source
from badit.data.tasks import (
    Demonstration,
    Instance,
    Task,
    hold_out,
    limit,
    mixture,
    ordered,
    quotas,
)

__all__ = [
    "AnswerCollator", "Demonstration", "Instance", "Source", "Task", "answer_rows",
    "batches_by_task", "build_prompt", "builtin_tasks", "encode_examples", "encode_prompts",
    "encode_tasks", "hold_out", "limit", "load_sources", "load_tasks", "mixture", "ordered", "own_input",
    "prompt_text", "quotas",
]  # fmt: skip

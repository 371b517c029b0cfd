"""Tasks: readers, splits, orders, prompts, batches, and the built-in suite.

Importing this package does not import torch, transformers, datasets or pandas.
"""

from badit.data.chats import answer_rows
from badit.data.encoding import encode_examples, encode_prompts
from badit.data.examples import AnswerCollator, batches_by_task, encode_tasks
from badit.data.orders import ordered
from badit.data.prompts import build_prompt, own_input, prompt_text
from badit.data.readers import load_sources, load_tasks
from badit.data.sampling import hold_out, limit, mixture, quotas
from badit.data.source import Source
from badit.data.suite import builtin_tasks
from badit.data.tasks import Demonstration, Instance, Task

__all__ = [
    "AnswerCollator", "Demonstration", "Instance", "Source", "Task", "answer_rows",
    "batches_by_task", "build_prompt", "builtin_tasks", "encode_examples", "encode_prompts",
    "encode_tasks", "hold_out", "limit", "load_sources", "load_tasks", "mixture", "ordered",
    "own_input", "prompt_text", "quotas",
]  # fmt: skip

"""Encodes instances as token ids, with a cache for large training sets, and builds batches."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import pyarrow.compute
from tqdm import tqdm

from badit.data import cache
from badit.data.prompts import IGNORED_LABEL, encode_examples, with_labels
from badit.data.tasks import Task

if TYPE_CHECKING:
    from torch.utils.data import DataLoader
    from transformers import PreTrainedTokenizerBase

_pc: Any = pyarrow.compute  # its functions are created at import
_LARGE = 20_000  # minimum number of training instances for the cache
_SCHEMA = pa.schema(
    [
        ("task", pa.string()),
        ("id", pa.string()),
        ("prompt_length", pa.int32()),
        ("input_ids", pa.list_(pa.int32())),
    ]
)


class Examples(cache.Items[dict[str, Any]]):
    """Encoded instances in an Arrow table; items have the form of :func:`badit.data.encode_examples`."""

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each example."""
        return _pc.list_value_length(self.table["input_ids"]).to_numpy()[self.rows].tolist()

    @property
    def tasks(self) -> list[str]:
        """The task name of each example."""
        return self.table["task"].to_numpy()[self.rows].tolist()

    @property
    def largest_id(self) -> int:
        """The largest token id in the whole table; 0 if it has no tokens."""
        return _pc.max(_pc.list_flatten(self.table["input_ids"])).as_py() or 0


def encode_tasks(
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    options: Mapping[str, Any],
    order: Sequence[int],
    *,
    progress: bool = False,
) -> Examples:
    """Encodes the training instances of tasks as token ids, with the ``options`` of :func:`encode_examples`.

    ``order`` has the order of the examples, as indices of the training instances numbered consecutively over the tasks.
    """
    count = sum(len(task.train) for task in tasks)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    key = None
    if count >= _LARGE and backend is not None:
        about = repr((backend.to_str(), tokenizer.chat_template, tokenizer.special_tokens_map))
        key = ["examples", about, dict(options), [task.fingerprint for task in tasks]]

    def rows() -> Iterator[dict[str, Any]]:
        from accelerate.utils import patch_environment

        bar = tqdm(total=count, desc="Encoding", unit="example", disable=not progress, leave=False)
        with bar, patch_environment(TOKENIZERS_PARALLELISM="true"):  # one thread per core
            for chunk in cache.chunks(((task, one) for task in tasks for one in task.train), 1_000):
                yield from encode_examples(tokenizer, chunk, **options)
                bar.update(len(chunk))
        os.environ.setdefault(
            "TOKENIZERS_PARALLELISM", "false"
        )  # so that a later fork causes no warning

    return Examples(cache.arrow_table(_SCHEMA, rows(), key), order, with_labels)


@dataclass
class AnswerCollator:
    """Pads encoded examples to the longest one of the batch.

    Args:
        pad_token_id: padding value of `input_ids`. It is masked, so None (the tokenizer has no pad token) means 0.
        side: the padding side: "right" for training, "left" for batched generation.
        with_tasks: whether to add `tasks`, the task name of each row, which the trainer must remove before the forward.
    """

    pad_token_id: Any
    side: Literal["left", "right"] = "right"
    with_tasks: bool = False

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Returns int64 `input_ids`, `attention_mask` and any `labels`, of shape (batch, longest); drops other keys."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        rows = [
            {**example, "attention_mask": [1] * len(example["input_ids"])} for example in examples
        ]
        batch: dict[str, Any] = {}
        for name, fill in (
            ("input_ids", self.pad_token_id or 0),
            ("attention_mask", 0),
            ("labels", IGNORED_LABEL),
        ):
            if name in rows[0]:
                tensors = [torch.tensor(row[name], dtype=torch.long) for row in rows]
                batch[name] = pad_sequence(
                    tensors, batch_first=True, padding_value=fill, padding_side=self.side
                )
        if self.with_tasks:
            batch["tasks"] = [example["task"] for example in examples]
        return batch


def batches_by_task(
    examples: Any, collate: AnswerCollator, batch_size: int
) -> dict[str, DataLoader]:
    """Returns the batches of each task, grouped by the examples' `task`; the order of the examples is kept."""
    import torch
    from torch.utils.data import DataLoader, Subset

    tasks = getattr(examples, "tasks", None) or [example["task"] for example in examples]
    groups: dict[str, list[int]] = defaultdict(list)
    for index, task in enumerate(tasks):
        groups[task].append(index)
    options: dict[str, Any] = {
        "collate_fn": collate,
        "generator": torch.Generator(),
    }  # keeps torch's random state
    return {
        task: DataLoader(Subset(examples, group), batch_size, **options)
        for task, group in groups.items()
    }

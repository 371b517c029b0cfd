"""Encoded examples: those of large training sets in the cache, and batches."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute
from tqdm import tqdm

from badit.data.cache import arrow_table
from badit.data.encoding import IGNORED_LABEL, encode_examples, labels_of, sequences
from badit.data.table import TableItems, chunks
from badit.data.tasks import Task

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.data import DataLoader
    from transformers import PreTrainedTokenizerBase

_LARGE = 20_000  # minimum number of training instances for the cache
_EXAMPLES_PER_BATCH = 1_000
# Without labels, which follow from prompt_length and would double the size.
_SCHEMA = pa.schema(
    {
        "task": pa.string(),
        "id": pa.string(),
        "prompt_length": pa.int32(),
        "input_ids": pa.list_(pa.int32()),
    }
)
_REJECTED = pa.field("rejected_ids", pa.list_(pa.int32()))  # of preference data
_compute: Any = pyarrow.compute  # its functions are created at import


class Examples(TableItems[dict[str, Any]]):
    """Encoded instances in an Arrow table.

    Items are dicts as those of :func:`badit.data.encode_examples`, without ``labels``:
    :class:`badit.data.AnswerCollator` makes these from ``prompt_length``.
    """

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each example, of a pair those of its longer sequence."""
        lengths = _compute.list_value_length(self.table["input_ids"]).to_numpy()
        if self.has_pairs:
            rejected = _compute.list_value_length(self.table["rejected_ids"]).to_numpy()
            lengths = np.maximum(lengths, self.table["prompt_length"].to_numpy() + rejected)
        return lengths[self.rows].tolist()

    @property
    def has_pairs(self) -> bool:
        """Whether every example has the tokens of a rejected answer."""
        return _REJECTED.name in self.table.column_names

    @property
    def tasks(self) -> list[str]:
        """The task name of each example."""
        return self.table["task"].to_numpy()[self.rows].tolist()

    @property
    def fingerprint(self) -> str:
        """A hash of the token ids and the lengths of prompts in the whole table."""
        columns = [self.table["prompt_length"]]
        for ids in self._token_columns:
            columns += [_compute.list_value_length(ids), _compute.list_flatten(ids)]
        digest = hashlib.sha256()
        for column in columns:
            for chunk in column.chunks:
                digest.update(chunk.to_numpy())
        return digest.hexdigest()[:16]

    @property
    def largest_id(self) -> int:
        """The largest token id in the whole table; 0 if it has no tokens."""
        columns = map(_compute.list_flatten, self._token_columns)
        return max(_compute.max(column).as_py() or 0 for column in columns)

    @property
    def _token_columns(self) -> list[pa.ChunkedArray]:
        names = ["input_ids"] + [_REJECTED.name] * self.has_pairs
        return [self.table[name] for name in names]


def encode_tasks(
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    options: Mapping[str, Any],
    order: Sequence[int],
    *,
    progress: bool = False,
) -> Examples:
    """Encodes the training instances of tasks as token ids.

    ``options`` are those of :func:`encode_examples`. ``order`` has the order of the examples,
    as indices of the training instances numbered consecutively over the tasks.
    """
    # Without a backend, a tokenizer has no text that determines it, so there is no cache.
    count = sum(len(task.train) for task in tasks)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    key = None
    if count >= _LARGE and backend is not None:
        tokenizer_text = repr(
            (backend.to_str(), tokenizer.chat_template, tokenizer.special_tokens_map)
        )
        key = ["examples", tokenizer_text, dict(options), [task.fingerprint for task in tasks]]

    schema = _SCHEMA
    if any(task.has_preferences for task in tasks):
        schema = _SCHEMA.append(_REJECTED)

    def batches() -> Iterator[pa.RecordBatch]:
        from accelerate.utils import patch_environment

        pairs = ((task, instance) for task in tasks for instance in task.train)
        bar = tqdm(total=count, desc="Encoding", unit="example", disable=not progress, leave=False)
        with bar, patch_environment(TOKENIZERS_PARALLELISM="true"):  # one thread per core
            for chunk in chunks(pairs, _EXAMPLES_PER_BATCH):
                examples = encode_examples(tokenizer, chunk, **options)
                yield pa.RecordBatch.from_pylist(examples, schema=schema)
                bar.update(len(chunk))
        # So that a later fork causes no warning.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    # The order is not a part of the key, so runs with other seeds share the encoded data.
    return Examples(arrow_table(schema, batches(), key), order, dict)


@dataclass
class AnswerCollator:
    """Pads encoded examples to the longest one of the batch.

    The labels are the examples' `labels` or, without these, made from their `prompt_length`.

    Args:
        pad_token_id: padding value of `input_ids`. It is masked, so None (the tokenizer has no pad
            token) means 0.
        side: the padding side: "right" for training, "left" for batched generation.
        with_tasks: whether to add `tasks`, the task name of each row, which the trainer must remove
            before the forward.
    """

    pad_token_id: Any
    side: Literal["left", "right"] = "right"
    with_tasks: bool = False

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Returns int64 `input_ids`, `attention_mask` and any `labels`, of shape (batch, longest).

        Other keys of the examples are dropped.
        """
        input_ids = [example["input_ids"] for example in examples]
        batch: dict[str, Any] = {
            "input_ids": self._padded(input_ids, self.pad_token_id or 0),
            "attention_mask": self._padded([[1] * len(ids) for ids in input_ids], 0),
        }
        if examples[0].keys() & {"labels", "prompt_length"}:
            batch["labels"] = self._padded(map(labels_of, examples), IGNORED_LABEL)
        if self.with_tasks:
            batch["tasks"] = [example["task"] for example in examples]
        return batch

    def _padded(self, rows: Iterable[list[int]], fill: int) -> Tensor:
        import torch
        from torch.nn.utils.rnn import pad_sequence

        return pad_sequence(
            [torch.tensor(row, dtype=torch.long) for row in rows],
            batch_first=True,
            padding_value=fill,
            padding_side=self.side,
        )


@dataclass
class PairCollator(AnswerCollator):
    """Pads pairs of a chosen and a rejected answer to the batch that TRL's DPOTrainer takes.

    The chosen sequences come first, then the rejected ones. ``completion_mask`` is 1 on answers.
    """

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = super().__call__(sequences(examples))
        batch["completion_mask"] = (batch.pop("labels") != IGNORED_LABEL).long()
        return batch


def batches_by_task(
    examples: Any, collate: AnswerCollator, batch_size: int
) -> dict[str, DataLoader]:
    """Returns the batches of each task, grouped by the examples' `task`.

    The order of the examples is kept.
    """
    import torch
    from torch.utils.data import DataLoader, Subset

    tasks = getattr(examples, "tasks", None) or [example["task"] for example in examples]
    groups: dict[str, list[int]] = defaultdict(list)
    for index, task in enumerate(tasks):
        groups[task].append(index)
    return {
        task: DataLoader(
            Subset(examples, group),
            batch_size,
            collate_fn=collate,
            generator=torch.Generator(),  # keeps torch's random state
        )
        for task, group in groups.items()
    }

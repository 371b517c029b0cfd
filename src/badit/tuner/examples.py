"""Prompts with their answers, one by one, as batches hold them.

Shape suffixes: B = rows of a batch, T = positions.
"""

from collections.abc import Iterator, Mapping
from itertools import zip_longest
from typing import NamedTuple, Self

import torch
from torch import Tensor

from badit.tuner.distributed import objects_of_ranks
from badit.tuner.prompt import IGNORED_LABEL, Segments


class Example(NamedTuple):
    """A prompt with its answer, without padding."""

    input_ids_T: Tensor
    labels_T: Tensor
    prompt_T: Tensor
    is_packed: bool = False

    def on_cpu(self) -> Self:
        return self._replace(
            input_ids_T=self.input_ids_T.cpu(),
            labels_T=self.labels_T.cpu(),
            prompt_T=self.prompt_T.cpu(),
        )

    @property
    def prompt_ids(self) -> Tensor:
        return self.input_ids_T[self.prompt_T]

    @property
    def has_prompt(self) -> bool:
        """Whether some token is meant as prompt.

        No position predicts the first token, so it is always prompt. Its label shows whether it is
        meant to be; collators of packed rows remove this label.
        """
        is_answer = self.is_packed or bool((self.labels_T[self.prompt_T] != IGNORED_LABEL).any())
        return int(self.prompt_T.sum()) > 1 or not is_answer

    @property
    def has_answer(self) -> bool:
        # No position predicts the label of the first token.
        return bool((self.labels_T[1:] != IGNORED_LABEL).any())


def examples_in(
    batch: Mapping[str, Tensor], prompt_BT: Tensor, segments: Segments | None
) -> Iterator[Example]:
    """Yields the examples of a batch, also those of packed rows."""
    ids_BT = batch["input_ids"]
    labels_BT = batch.get("labels")
    if labels_BT is None or labels_BT.shape != ids_BT.shape:  # as of classifiers
        labels_BT = torch.full_like(ids_BT, IGNORED_LABEL)
    attended_BT = batch.get("attention_mask")
    if attended_BT is None or attended_BT.shape != ids_BT.shape:
        attended_BT = torch.ones_like(ids_BT)
    of_BT, number = segments or Segments.rows(ids_BT)
    for segment in range(number):
        is_own_BT = (of_BT == segment) & attended_BT.bool()
        if (prompt_BT & is_own_BT).any():  # not the padding of packed rows
            is_packed = segments is not None
            rows = (ids_BT[is_own_BT], labels_BT[is_own_BT], prompt_BT[is_own_BT])
            yield Example(*rows, is_packed)


def examples_of_ranks(batches: list[list[Example]]) -> list[Example]:
    """Returns the examples of all ranks on the CPU, in the order of one process.

    Where ranks have different batches, rank r of R has every R-th one, from batch r on, as in
    accelerate's data loaders.
    """
    batches = [[example.on_cpu() for example in batch] for batch in batches]
    first, *others = objects_of_ranks(batches)
    if any(_contents(other) != _contents(first) for other in others):
        together = zip_longest(first, *others, fillvalue=[])
        batches = [batch for of_ranks in together for batch in of_ranks]
    return [example for batch in batches for example in batch]


def _contents(batches: list[list[Example]]) -> list[list[int]]:
    return [
        [*example.input_ids_T.tolist(), *example.labels_T.tolist(), *example.prompt_T.tolist()]
        for batch in batches
        for example in batch
    ]

"""The order of the examples in an epoch."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch.utils.data import Sampler


@dataclass(eq=False)
class EpochSampler(Sampler[int]):
    """A random order of the examples, which depends only on the seed and the epoch.

    A resumed run therefore gets the same batches.

    Each optimizer step is a random sample from all tasks. Within a step the examples are sorted by
    length, which reduces padding in the micro-batches. (Whole steps of similar length would contain
    few tasks, which trains worse.) The full step with the longest example comes first, so that a
    run that lacks memory fails at once.

    With ``tasks`` (one per example) and ``quotas`` (the number of examples per task), an epoch
    repeats the examples of small tasks and draws a new subset of large tasks.
    """

    lengths: Sequence[int]
    examples_per_step: int
    seed: int
    epoch: Callable[[], int]
    tasks: Sequence[str] = ()
    quotas: Mapping[str, int] | None = None

    def __len__(self) -> int:
        if self.quotas is None:
            return len(self.lengths)
        return sum(self.quotas.values())

    def __iter__(self) -> Iterator[int]:
        # Every pair of seed and epoch has its own number: no run has as many epochs as this prime.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch())
        order = _shuffled(self._examples(generator), generator)

        steps = []
        size = self.examples_per_step
        for start in range(0, len(order), size):
            step = order[start : start + size]
            # The longest example of a step comes first, and is read below.
            step.sort(key=self.lengths.__getitem__, reverse=True)
            steps.append(step)

        # A short step must stay last, or the loader's batches would not match the steps.
        num_full_steps = len(order) // size
        longest_of_step = [self.lengths[step[0]] for step in steps[:num_full_steps]]
        if longest_of_step:
            first = longest_of_step.index(max(longest_of_step))
            steps.insert(0, steps.pop(first))
        return chain.from_iterable(steps)

    def _examples(self, generator: torch.Generator) -> list[int]:
        """Returns the examples of an epoch in any order: all, or each task's quota."""
        if self.quotas is None:
            return list(range(len(self.lengths)))

        by_task = defaultdict[str, list[int]](list)
        for index, task in enumerate(self.tasks):
            by_task[task].append(index)

        examples = []
        for task, indices in by_task.items():
            repeats, remainder = divmod(self.quotas[task], len(indices))
            examples += indices * repeats
            # The generator depends on the epoch, so every epoch draws another subset.
            examples += _shuffled(indices, generator)[:remainder]
        return examples


def _shuffled(items: Sequence[int], generator: torch.Generator) -> list[int]:
    order = torch.randperm(len(items), generator=generator)
    return [items[i] for i in order.tolist()]

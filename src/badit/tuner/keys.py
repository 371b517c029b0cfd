"""The keys of prompts, which are computed from a base model's frozen embeddings.

The formulas are in :mod:`badit.method.abilities`.

Shape suffixes: E = features of an embedding, S = prompts, C = clusters.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from badit.method.abilities import prompt_keys, vocabulary_moments
from badit.support.errors import BaditError
from badit.tuner.distributed import gathered_weight
from badit.tuner.examples import Example

_IDS_AT_A_TIME = 8192


def frozen_embedding(model: nn.Module) -> Any:
    """Returns the module of the model's input embeddings, without a copy that PEFT trains.

    BaditError if the model has none.
    """
    try:
        embedding: Any = model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    except (AttributeError, NotImplementedError):
        embedding = None
    embedding = getattr(embedding, "original_module", embedding)
    if not isinstance(embedding, nn.Embedding):
        raise BaditError(
            f"key='embedding': {type(model).__name__} has no table of token embeddings; use "
            "key='layer'"
        )
    return embedding


class Keys:
    """Computes the keys of prompts with the frozen embeddings of a base model."""

    def __init__(self, model: nn.Module) -> None:
        self.embedding = frozen_embedding(model)
        self.moments = moments_of(self.embedding)

    def of(self, examples: Sequence[Example]) -> Tensor:
        """Returns the keys (S, E) of examples, on the CPU."""
        with gathered_weight(self.embedding.weight):
            means_SE = mean_embeddings(self.embedding, examples)
        return prompt_keys(means_SE.cpu(), *self.moments)

    def centroids(self, directions_CE: Tensor) -> Tensor:
        """Returns the centroids (C, E) of directions, which are centroids times the whitening."""
        _, whitening_EE = self.moments
        solution_EC = torch.linalg.solve(whitening_EE.double(), directions_CE.double().cpu().T)
        return solution_EC.T


def moments_of(embedding: Any) -> tuple[Tensor, Tensor]:
    """Returns the mean (E) and the whitening (E, E) of the vocabulary's embeddings, on the CPU."""
    with gathered_weight(embedding.weight):
        return vocabulary_moments(_vocabulary(embedding))


def mean_embeddings(embedding: nn.Embedding, examples: Sequence[Example]) -> Tensor:
    """Returns the mean token embeddings (S, E) of the prompts of examples."""
    ids = [example.prompt_ids.to(embedding.weight.device) for example in examples]
    return torch.stack([embedding(prompt_ids).float().mean(dim=0) for prompt_ids in ids])


def _vocabulary(embedding: nn.Embedding) -> Iterator[Tensor]:
    """Yields the vocabulary's embeddings (rows, E) as the model uses them, on the CPU.

    They are outputs of the module, because some modules scale or dequantise their weight.
    """
    ids = torch.arange(embedding.num_embeddings, device=embedding.weight.device)
    for some in ids.split(_IDS_AT_A_TIME):
        yield embedding(some).float().cpu()

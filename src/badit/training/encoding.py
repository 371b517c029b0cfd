"""Token ids in a recipe's prompt format, checked against the model that takes them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from badit.data.encoding import encode_examples, encode_prompts
from badit.data.examples import Examples
from badit.data.prompts import build_prompt
from badit.data.table import chunks
from badit.data.tasks import Instance, Task
from badit.recipe.schema import Recipe
from badit.support.console import waiting
from badit.support.errors import BaditError

_AT_A_TIME = 500  # instances that are encoded in one call


def encoded(
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    pairs: Iterable[tuple[Task, Instance]],
    model: Any,
) -> list[dict[str, Any]]:
    """Encodes instances (token ids, labels); BaditError if the model cannot take one.

    ``model`` is None if a server runs it.
    """
    options = recipe.prompt.model_dump()
    examples = []
    batches = list(chunks(pairs, _AT_A_TIME))
    for batch in waiting(batches, "Encoding", f"{_AT_A_TIME} instances"):
        examples += encode_examples(tokenizer, batch, **options)
    if model is not None:
        refuse_beyond_model(examples, model)
    return examples


def encoded_texts(
    tokenizer: Any, recipe: Recipe, texts: Sequence[str], task: Task | None, *, raw: bool = False
) -> list[list[int]]:
    """Returns token ids of a task's inputs or, without a task, of whole prompts.

    With ``raw``, the texts are used unchanged.
    """
    prompts: list[Any] = list(texts)
    if not raw:
        task = task or Task(name="prompt", definition=None)
        # An instance needs an output, which is no part of its prompt.
        inputs = [Instance(id="", input=text, outputs=("",)) for text in texts]
        prompts = [build_prompt(task, instance, recipe.prompt.encoding) for instance in inputs]
    return encode_prompts(tokenizer, prompts, **recipe.prompt.of_prompts)


def refuse_long_prompts(prompts: Sequence[Sequence[int]], model: Any, new_tokens: int) -> None:
    """Raises BaditError if a prompt with ``new_tokens`` more tokens exceeds the model."""
    examples = [{"task": "prompt", "id": i, "input_ids": ids} for i, ids in enumerate(prompts)]
    refuse_beyond_model(examples, model, new_tokens)


def refuse_beyond_model(
    examples: Iterable[Mapping[str, Any]], model: Any, new_tokens: int = 0
) -> None:
    """Raises BaditError if an instance exceeds the model.

    Its tokens plus ``new_tokens`` may exceed the model's positions, or an id its embeddings.
    """
    positions = _positions(model.config.get_text_config())
    embeddings = len(model.get_input_embeddings().weight)
    if isinstance(examples, Examples):  # the table finds the extremes quickly
        longest = max(examples.lengths, default=0)
        if longest + new_tokens <= positions and examples.largest_id < embeddings:
            return
    for example in examples:
        ids = example["input_ids"]
        where = f"instance {example['task']}/{example['id']}"
        if len(ids) + new_tokens > positions:
            addition = f" plus {new_tokens} new" if new_tokens else ""
            problem = f"has {len(ids)} tokens{addition}, but the model has {positions} positions"
            fix = "lower prompt.max_source_tokens or the number of new tokens"
            raise BaditError(f"{where}: {problem}; {fix}")
        largest_id = max(ids, default=0)
        if largest_id >= embeddings:
            problem = f"token id {largest_id} is beyond the model's {embeddings} embeddings"
            raise BaditError(f"{where}: {problem}; use its tokenizer")


def _positions(config: Any) -> float:
    """Returns the number of positions of a model; infinite with rotary embeddings."""
    # Learned positions are a table; rotary embeddings are computed for any position.
    is_rotary = getattr(config, "rope_parameters", None) or getattr(config, "rope_theta", None)
    if is_rotary:
        return math.inf
    return getattr(config, "max_position_embeddings", None) or math.inf

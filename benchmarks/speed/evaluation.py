"""Scoring a test set (answers and the references' NLL): speed against a plain loop in file order.

    python benchmarks/speed/evaluation.py [--data FOLDER]

All alternatives decode the same prompts greedily with the same model and batch size, at most 50 new
tokens, up to the first end token, and compute the NLL of the references. The prompts are test
instances of the built-in tasks, or of the tasks in FOLDER, such as SuperNI's. "two passes" reads
every prompt twice: for the answer, and for the NLL.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from operator import ne
from typing import Any, NamedTuple

import torch
from measure import in_turns, keep, options, ratio
from workload import MODEL, data_options, fast_dtypes

from badit import load_base_model
from badit.cli.entry import quiet_libraries
from badit.data import AnswerCollator, Task
from badit.evaluation.answers import score_model
from badit.evaluation.generation import generate_answers
from badit.evaluation.losses import prompt_losses
from badit.metrics.answers import METRICS
from badit.recipe.loading import build_recipe
from badit.recipe.schema import Recipe
from badit.training.encoding import encoded

BATCH, NEW, PER_TASK = 16, 50, 5


class Scored(NamedTuple):
    """The results of one alternative; the NLL is the mean over instances."""

    answers: list[str]
    nll: float


def plain_loop(model: Any, tokenizer: Any, examples: Sequence[dict[str, Any]]) -> Scored:
    """A simple script: pads each batch in file order, generates, decodes, computes the loss."""
    answers, losses = [], []
    for start in range(0, len(examples), BATCH):
        batch = examples[start : start + BATCH]
        prompts = {
            "input_ids": [example["input_ids"][: example["prompt_length"]] for example in batch]
        }
        inputs = tokenizer.pad(prompts, padding_side="left", return_tensors="pt")
        with torch.no_grad():
            tokens = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
            padded = AnswerCollator(tokenizer.pad_token_id)(batch)
            logits = model(
                input_ids=padded["input_ids"], attention_mask=padded["attention_mask"]
            ).logits
        generated = tokens[:, inputs["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(generated, skip_special_tokens=True)
        answers += [text.strip() for text in texts]
        for row, labels in zip(logits[:, :-1].float(), padded["labels"][:, 1:], strict=True):
            losses.append(float(torch.nn.functional.cross_entropy(row, labels)))
    return Scored(answers, sum(losses) / len(losses))


def two_passes(
    model: Any, tokenizer: Any, recipe: Recipe, examples: Sequence[dict[str, Any]]
) -> Scored:
    prompts = [example["input_ids"][: example["prompt_length"]] for example in examples]
    answers = generate_answers(
        model, tokenizer, prompts, max_new_tokens=NEW, batch_size=BATCH, progress=False
    )
    ordered = sorted(examples, key=lambda example: len(example["input_ids"]))
    batches = [ordered[start : start + BATCH] for start in range(0, len(ordered), BATCH)]
    sums, counts = prompt_losses(model, map(AnswerCollator(tokenizer.pad_token_id), batches))
    return Scored(answers, float((sums / counts).mean()))


def badit(model: Any, tokenizer: Any, recipe: Recipe, tasks: Sequence[Task]) -> Scored:
    scores, predictions = score_model(model, tokenizer, recipe, tasks, "test", progress=False)
    answers = [prediction.prediction for prediction in predictions]
    return Scored(answers, scores["nll_instances"])


def main(arguments: argparse.Namespace) -> None:
    model, tokenizer = load_base_model(MODEL, dtype=fast_dtypes()[0])  # pyright: ignore[reportArgumentType]
    model.eval()  # pyright: ignore
    values = {"data": {"source": arguments.data, "test_per_task": PER_TASK}}
    recipe = build_recipe({**values, "evaluation": {"batch_size": BATCH, "max_new_tokens": NEW}})
    tasks = recipe.data.load()
    pairs = [(task, instance) for task in tasks for instance in task.test]
    examples = encoded(tokenizer, recipe, pairs, model)
    ways = {
        "plain loop": lambda: plain_loop(model, tokenizer, examples),
        "two passes": lambda: two_passes(model, tokenizer, recipe, examples),
        "badit": lambda: badit(model, tokenizer, recipe, tasks),
    }
    scored = {name: way() for name, way in ways.items()}
    differences = {
        name: sum(map(ne, result.answers, scored["badit"].answers))
        for name, result in scored.items()
    }
    samples = in_turns(ways, rounds=arguments.rounds, warmup=0)
    speeds = {
        name: [len(examples) / seconds for seconds in of_way] for name, of_way in samples.items()
    }
    result = {
        "prompts": len(examples),
        "prompt tokens": sum(example["prompt_length"] for example in examples),
        "batch size": BATCH,
        "answers that differ from badit's": differences,
        METRICS["nll"].label: {name: result.nll for name, result in scored.items()},
        "answers per second": speeds,
        "speed to the plain loop's": ratio(samples, "plain loop", "badit"),
        "speed to two passes": ratio(samples, "two passes", "badit"),
    }
    keep("evaluation", result)


if __name__ == "__main__":
    quiet_libraries()
    main(data_options(options(__doc__)).parse_args())

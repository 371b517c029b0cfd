"""Compare the log-likelihoods of the same choices with lm_eval's model class `hf` and with `badit`.

    python benchmarks/lm_eval_gates.py runs/demo/badit/lr-0.002/seed-0      # a run of `badit demo`

Each test instance of the run's tasks becomes a question with up to four choices: its answer and
other answers of its task. With `badit` the gates depend only on the prompt; with `hf` also on the
choice and, in a batch, on the padding. Writes results/lm-eval/RUN.json.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from lm_eval.models.huggingface import HFLM

import badit
from badit.integrations.lm_eval import BaditLM
from badit.support.environment import environment
from badit.support.files import write_json
from badit.training.encoding import encoded_texts

RESULTS = Path(__file__).parent / "results" / "lm-eval"
CHOICES = 4
Tokens = list[int]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="a run's folder")
    parser.add_argument(
        "--instances", type=int, default=10, help="test instances per task (default: 10)"
    )
    options = parser.parse_args()
    run = badit.Run(options.run)
    model, tokenizer = run.load()
    asked = list(questions(run, model, tokenizer, options.instances))
    classes: dict[str, Any] = {
        "badit": (BaditLM, 8),
        "hf, batches of 1": (HFLM, 1),
        "hf, batches of 16": (HFLM, 16),
    }
    found = {
        name: likelihoods(cls(pretrained=model, tokenizer=tokenizer, batch_size=size), asked)
        for name, (cls, size) in classes.items()
    }
    settings = {name: compared(own, found["badit"]) for name, own in found.items()}
    RESULTS.mkdir(parents=True, exist_ok=True)
    recipe = run.recipe.model_dump(mode="json", exclude={"compare", "output"})
    content = {
        "recipe": recipe,
        "environment": environment(),
        "questions": len(asked),
        "settings": settings,
    }
    write_json(RESULTS / f"{run.path.name}.json", content)
    for name, values in settings.items():
        print(name, values)


def questions(
    run: badit.Run, model: Any, tokenizer: Any, instances: int
) -> Iterator[tuple[Tokens, list[Tokens]]]:
    """Yields prompts in the run's training format, each with its choices, the correct one first."""
    recipe = run.recipe
    # All test instances, because a recipe may limit their number.
    for task in badit.plan(recipe, data={"test_per_task": None}).tasks:
        answers = sorted({instance.outputs[0] for instance in (*task.train, *task.test)})
        for instance in task.test[:instances]:
            others = [answer for answer in answers if answer not in instance.outputs]
            wrong = random.Random(instance.id).sample(others, min(CHOICES - 1, len(others)))
            (prompt,) = encoded_texts(tokenizer, recipe, [instance.input], task, model, 0)
            choices = [instance.outputs[0], *wrong]
            yield prompt, [tokenizer.encode(choice, add_special_tokens=False) for choice in choices]


def likelihoods(scorer: Any, asked: Sequence[tuple[Tokens, list[Tokens]]]) -> list[list[float]]:
    """Returns each choice's log-likelihood in nats, question by question."""
    requests = [(None, prompt, choice) for prompt, choices in asked for choice in choices]
    flat = [likelihood for likelihood, _ in scorer._loglikelihood_tokens(requests)]
    ends = accumulate((len(choices) for _, choices in asked), initial=0)
    return [flat[start:end] for start, end in pairwise(ends)]


def compared(own: list[list[float]], reference: list[list[float]]) -> dict[str, float]:
    """Returns accuracy in %, mean and largest difference to the reference, changed choices in %."""
    changes = [
        abs(a - b)
        for ours, theirs in zip(own, reference, strict=True)
        for a, b in zip(ours, theirs, strict=True)
    ]
    chosen = [(_best(ours), _best(theirs)) for ours, theirs in zip(own, reference, strict=True)]
    return {
        "accuracy": 100 * fmean(ours == 0 for ours, _ in chosen),
        "mean_difference": fmean(changes),
        "largest_difference": max(changes),
        "choices_changed": 100 * fmean(ours != theirs for ours, theirs in chosen),
    }


def _best(values: list[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


if __name__ == "__main__":
    main()

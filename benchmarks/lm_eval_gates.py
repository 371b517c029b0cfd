"""Compare the log-likelihoods of the same choices with lm_eval's model class `hf` and `badit`.

    python benchmarks/lm_eval_gates.py runs/demo/badit/lr-0.002/seed-0      # a run of `badit demo`

Each test instance of the run's tasks becomes a question with up to four choices: its answer and
other answers of its task. With `badit` the gates depend only on the prompt; with `hf` also on the
choice and, in a batch, on the padding. Writes results/lm-eval/RUN.json.
"""

import argparse
import random
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from lm_eval.models.huggingface import HFLM

import badit
from badit.integrations.lm_eval import BaditLM
from badit.support.environment import environment
from badit.support.files import write_json
from badit.training.encoding import encoded_texts

RESULTS = Path(__file__).parent / "results" / "lm-eval"
CHOICES = 4
CLASSES: dict[str, tuple[Any, int]] = {  # model class and batch size
    "badit": (BaditLM, 8),
    "hf, batches of 1": (HFLM, 1),
    "hf, batches of 16": (HFLM, 16),
}
Tokens = list[int]
Likelihoods = list[list[float]]  # in nats, of the choices of each question


class Question(NamedTuple):
    """A prompt in the run's training format, with its choices. The first choice is correct."""

    prompt: Tokens
    choices: list[Tokens]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="a run's folder")
    parser.add_argument("--instances", type=int, default=10, help="per task (default: 10)")
    options = parser.parse_args()

    run = badit.Run(options.run)
    model, tokenizer = run.load()
    questions = list(questions_of(run, tokenizer, options.instances))
    found = {}
    for name, (model_class, batch_size) in CLASSES.items():
        scorer = model_class(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        found[name] = likelihoods(scorer, questions)
    settings = {name: compared(of_class, found["badit"]) for name, of_class in found.items()}
    content = {
        "recipe": run.recipe.model_dump(mode="json", exclude={"compare", "output"}),
        "environment": environment(),
        "questions": len(questions),
        "settings": settings,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_json(RESULTS / f"{run.path.name}.json", content)
    for name, values in settings.items():
        print(name, values)


def questions_of(run: badit.Run, tokenizer: Any, instances: int) -> Iterator[Question]:
    recipe = run.recipe
    # All test instances, because a recipe may limit their number.
    for task in badit.plan(recipe, data={"test_per_task": None}).tasks:
        answers = sorted({instance.outputs[0] for instance in (*task.train, *task.test)})
        for instance in task.test[:instances]:
            others = [answer for answer in answers if answer not in instance.outputs]
            wrong = random.Random(instance.id).sample(others, min(CHOICES - 1, len(others)))
            choices = [
                tokenizer.encode(choice, add_special_tokens=False)
                for choice in (instance.outputs[0], *wrong)
            ]
            (prompt,) = encoded_texts(tokenizer, recipe, [instance.input], task)
            yield Question(prompt, choices)


def likelihoods(scorer: Any, questions: Sequence[Question]) -> Likelihoods:
    requests = [
        (None, question.prompt, choice) for question in questions for choice in question.choices
    ]
    of_choices = [likelihood for likelihood, _ in scorer._loglikelihood_tokens(requests)]
    ends = accumulate((len(question.choices) for question in questions), initial=0)
    return [of_choices[start:end] for start, end in pairwise(ends)]


def compared(likelihoods: Likelihoods, reference: Likelihoods) -> dict[str, float]:
    """Returns accuracy and changed choices in %, and differences to the reference in nats."""
    chosen = [best(of_question) for of_question in likelihoods]
    reference_chosen = [best(of_question) for of_question in reference]
    differences = [
        abs(likelihood - expected)
        for of_question, expected_of_question in zip(likelihoods, reference, strict=True)
        for likelihood, expected in zip(of_question, expected_of_question, strict=True)
    ]
    changed = [a != b for a, b in zip(chosen, reference_chosen, strict=True)]
    return {
        "accuracy": 100 * fmean(choice == 0 for choice in chosen),
        "mean_difference": fmean(differences),
        "largest_difference": max(differences),
        "choices_changed": 100 * fmean(changed),
    }


def best(likelihoods: list[float]) -> int:
    return max(range(len(likelihoods)), key=likelihoods.__getitem__)


if __name__ == "__main__":
    main()

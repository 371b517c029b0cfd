"""Scoring a test set: answers per second, against a plain ``model.generate`` loop in file order.

    python benchmarks/speed/evaluation.py [--data FOLDER]

Both decode the same prompts greedily with the same model in batches of the same size, at most 50 new tokens, up to the
first end token. The prompts are test instances of the built-in tasks, or of the tasks in FOLDER, such as SuperNI's.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from measure import in_turns, keep, options, ratio
from workload import MODEL, data_options, fast_dtypes, instances

from badit import load_base_model
from badit.cli import quiet_libraries
from badit.generation import generate_answers

BATCH, NEW, PER_TASK = 16, 50, 5


def plain_loop(model: Any, tokenizer: Any, prompts: list[list[int]]) -> list[str]:
    """A simple script: pad each batch in file order, generate, decode."""
    answers = []
    for start in range(0, len(prompts), BATCH):
        inputs = tokenizer.pad({"input_ids": prompts[start : start + BATCH]}, padding_side="left", return_tensors="pt")
        with torch.no_grad():
            tokens = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
        new = tokens[:, inputs["input_ids"].shape[1] :]
        answers += [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
    return answers


def main(arguments: argparse.Namespace) -> None:
    model, tokenizer = load_base_model(MODEL, dtype=fast_dtypes()[0])  # pyright: ignore[reportArgumentType]
    model.eval()  # pyright: ignore
    examples = instances(tokenizer, arguments.data, "test", PER_TASK)
    prompts = [example["input_ids"] for example in examples]
    ways = {
        "plain loop": lambda: plain_loop(model, tokenizer, prompts),
        "badit": lambda: generate_answers(
            model, tokenizer, prompts, max_new_tokens=NEW, batch_size=BATCH, progress=False
        ),
    }
    different = sum(a != b for a, b in zip(ways["plain loop"](), ways["badit"](), strict=True))
    samples = in_turns(ways, rounds=arguments.rounds, warmup=0)
    keep(
        "evaluation",
        {
            "prompts": len(prompts),
            "prompt tokens": sum(map(len, prompts)),
            "batch size": BATCH,
            "answers that differ": different,
            "answers per second": {name: [len(prompts) / s for s in values] for name, values in samples.items()},
            "speed to the plain loop's": ratio(samples, "plain loop", "badit"),
        },
    )


if __name__ == "__main__":
    quiet_libraries()
    main(data_options(options(__doc__)).parse_args())

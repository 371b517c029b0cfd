"""The encoded instances of the rig's SuperNI tasks."""

import glob
import json
import os
import random
from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple


class Example(NamedTuple):
    """An instance as tokens; ``task`` is the index of its task."""

    task: int
    prompt: list[int]
    answer: list[int]

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.answer)


def task_folders(options: Namespace) -> list[str]:
    folders = sorted(glob.glob(f"{options.data}/task*"))
    if options.tasks == "all":
        return folders
    return [folder for folder in folders if number(folder) in options.tasks.split(",")]


def number(folder: str) -> str:
    """Returns the number of a task, such as "073"."""
    return os.path.basename(folder)[4:].split("_")[0]


def load_examples(options: Namespace, tokenizer: Any) -> tuple[list[Example], list[Example]]:
    """Returns training and evaluation examples.

    ``val`` is held out of the training file, in the same way in every run.
    """
    train: list[Example] = []
    held: list[Example] = []
    for task, folder in enumerate(task_folders(options)):
        training_file = json.loads(Path(folder, "train.json").read_text())
        definition = first(training_file["Definition"]).strip()

        def encoded(
            instance: dict[str, Any], task: int = task, definition: str = definition
        ) -> Example:
            text = f"{definition}\n\nInput: {instance['input']}\nOutput: "
            return encode(tokenizer, task, text, first(instance["output"]), options.max_tokens)

        instances = training_file["Instances"][:]
        random.Random(7).shuffle(instances)
        validation, training = instances[: options.held], instances[options.held :]
        random.Random(options.data_seed).shuffle(training)
        train += map(encoded, training[: options.train])
        if options.split == "test":
            test_file = json.loads(Path(folder, "test.json").read_text())
            validation = test_file["Instances"][: options.held]
        held += map(encoded, validation)
    return train, held


def encode(tokenizer: Any, task: int, prompt: str, answer: str, max_tokens: int) -> Example:
    tokens = tokenizer(prompt)["input_ids"]
    if len(tokens) > max_tokens:
        half = max_tokens // 2
        tokens = tokens[:half] + tokens[-half:]
    return Example(task, tokens, tokenizer(answer + tokenizer.eos_token)["input_ids"][:40])


def first(texts: str | list[str]) -> str:
    return texts if isinstance(texts, str) else texts[0]

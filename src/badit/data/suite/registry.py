"""How a generator function becomes a task: it is asked for examples until enough different ones are there."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import NamedTuple

from badit.data.schema import Demonstration, Instance, Task

SEED = 20240901
TRAIN_INSTANCES = 160
TEST_INSTANCES = 40
DEMONSTRATIONS = 2

# The closed vocabulary of what the tasks ask of a model.
ABILITIES = {
    "arithmetic": "add small whole numbers",
    "calendar": "know the order of the days and months",
    "categories": "know what kind of thing a noun names",
    "comparison": "tell which of several numbers is greater",
    "counting": "count the items of a list",
    "lookup": "find a stated item or fact in the text and repeat it",
    "opposites": "know the opposite of an adjective",
    "ordering": "tell where an item stands in an order",
    "rewriting": "put the content of the input into another form",
    "sentiment": "know which words praise and which complain",
}

Example = tuple[str, str]
Generator = Callable[[random.Random], Example]


class TaskSource(NamedTuple):
    """A generator of (input, answer) with all that is the same for each of its examples."""

    generate: Generator
    definition: str
    category: str
    abilities: tuple[str, ...]


class Registry(dict[str, TaskSource]):
    """Sources by name."""

    def task(self, category: str, definition: str, abilities: Iterable[str]) -> Callable[[Generator], Generator]:
        """Registers the decorated generator; the function's name is the task's."""

        def register(generate: Generator) -> Generator:
            self[generate.__name__] = TaskSource(generate, definition, category, tuple(abilities))
            return generate

        return register


def generated_tasks(registry: Registry) -> tuple[Task, ...]:
    """The registry's tasks, sorted by name; each depends on its own name and the fixed seed alone."""
    return tuple(_generated(name, registry[name]) for name in sorted(registry))


def _generated(name: str, source: TaskSource) -> Task:
    rng = random.Random(f"{SEED}/{name}")
    examples: dict[str, str] = {}
    while len(examples) < DEMONSTRATIONS + TRAIN_INSTANCES + TEST_INSTANCES:
        # An input has one right answer, so a repeated one only replaces itself.
        examples.update([source.generate(rng)])
    pairs = list(examples.items())
    shown, scored = pairs[:DEMONSTRATIONS], pairs[DEMONSTRATIONS:]
    instances = [Instance(id=f"{name}-{i}", input=text, outputs=(answer,)) for i, (text, answer) in enumerate(scored)]
    return Task(
        name=name,
        definition=source.definition,
        demonstrations=tuple(Demonstration(input=text, output=answer) for text, answer in shown),
        categories=(source.category,),
        abilities=source.abilities,
        train=tuple(instances[:TRAIN_INSTANCES]),
        test=tuple(instances[TRAIN_INSTANCES:]),
    )

"""The built-in suite: small tasks in plain English, generated with a fixed seed.

The abilities that each task requires are listed, so an analysis of shared abilities can be checked against them.
A task is a function that takes a random number generator and returns (input, answer).
"""

import json
import random
from collections.abc import Callable, Sequence
from functools import cache
from importlib import resources
from typing import Any

from badit.data.tasks import Demonstration, Instance, Task

SEED = 20240901
TRAIN_INSTANCES = 160
TEST_INSTANCES = 40
DEMONSTRATIONS = 2

# Word lists, and the categories, abilities and definition of each task.
_DATA: dict[str, Any] = json.loads((resources.files("badit.data") / "suite.json").read_text(encoding="utf-8"))
ABILITIES: dict[str, str] = _DATA["abilities"]  # all abilities that the tasks require
NAMES, PLACES, COUNTED, APPOINTMENTS = (_DATA[kind] for kind in ("names", "places", "counted", "appointments"))
OBJECTS = _DATA["objects"]  # with many different first letters, for sorting three random words
CATEGORIES: dict[str, list[str]] = _DATA["categories"]
OPPOSITES = _DATA["opposites"]  # adjective, opposite, and nouns that both can describe
REVIEWS = _DATA["reviews"]  # nouns, and pairs of a positive adjective and its opposite that can describe all of them
DAYS, MONTHS = _DATA["days"], _DATA["months"]

Example = tuple[str, str]


def builtin_tasks() -> list[Task]:
    """Returns the suite, sorted by name. A task has 160 training and 40 test instances and 2 demonstrations."""
    return [_generated(name) for name in sorted(_DATA["tasks"])]


@cache
def _generated(name: str) -> Task:
    """Generates a task, which depends only on its name and the fixed seed."""
    generate: Callable[[random.Random], Example] = globals()[name]  # the function with the task's name
    rng = random.Random(f"{SEED}/{name}")
    examples: dict[str, str] = {}
    while len(examples) < DEMONSTRATIONS + TRAIN_INSTANCES + TEST_INSTANCES:
        # An input has exactly one correct answer, so a repeated input does not change the dictionary.
        examples.update([generate(rng)])
    pairs = list(examples.items())
    shown, scored = pairs[:DEMONSTRATIONS], pairs[DEMONSTRATIONS:]
    instances = [Instance(id=f"{name}-{i}", input=text, outputs=(answer,)) for i, (text, answer) in enumerate(scored)]
    return Task(
        name=name,
        demonstrations=tuple(Demonstration(input=text, output=answer) for text, answer in shown),
        train=tuple(instances[:TRAIN_INSTANCES]),
        test=tuple(instances[TRAIN_INSTANCES:]),
        **_DATA["tasks"][name],
    )


def _listing(items: Sequence[str]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    return " and ".join(filter(None, [", ".join(items[:-1]), items[-1]]))


def _review(rng: random.Random, praises: bool) -> Example:
    """Returns a review, positive or negative, and the opposite review in short form."""
    judged = []
    for nouns, pairs in rng.sample(REVIEWS, 2):
        noun, (good, bad) = rng.choice(nouns), rng.choice(pairs)
        judged.append((noun, good, bad) if praises else (noun, bad, good))
    (first, said, turned), (second, also_said, also_turned) = judged
    review = f"The {first} in {rng.choice(PLACES)} was {said} and the {second} was {also_said}."
    # The answer has another form, so that copying the review does not score well.
    return review, f"{turned} {first}, {also_turned} {second}"


def review_sentiment(rng: random.Random) -> Example:
    praises = rng.random() < 0.5
    review, _ = _review(rng, praises)
    return review, "positive" if praises else "negative"


def review_flip(rng: random.Random) -> Example:
    return _review(rng, rng.random() < 0.5)


def opposite_adjective(rng: random.Random) -> Example:
    word, opposite, nouns = rng.choice(OPPOSITES)
    given, asked = (word, opposite) if rng.random() < 0.5 else (opposite, word)
    return f"the {given} {rng.choice(nouns)} in {rng.choice(PLACES)}", asked


def common_category(rng: random.Random) -> Example:
    category = rng.choice(list(CATEGORIES))
    return ", ".join(rng.sample(CATEGORIES[category], 3)), category


def odd_one_out(rng: random.Random) -> Example:
    usual, other = rng.sample(list(CATEGORIES), 2)
    odd = rng.choice(CATEGORIES[other])
    words = [*rng.sample(CATEGORIES[usual], 3), odd]
    rng.shuffle(words)
    return ", ".join(words), odd


def category_count(rng: random.Random) -> Example:
    asked, other = rng.sample(list(CATEGORIES), 2)
    count = rng.randint(1, 4)
    words = rng.sample(CATEGORIES[asked], count) + rng.sample(CATEGORIES[other], rng.randint(1, 3))
    rng.shuffle(words)
    return f"Kind: {asked}. Words: {', '.join(words)}.", str(count)


def item_count(rng: random.Random) -> Example:
    count = rng.randint(1, 6)
    items = _listing([f"{'an' if item[0] in 'aeiou' else 'a'} {item}" for item in rng.sample(OBJECTS, count)])
    return f"{rng.choice(NAMES)} packed {items}.", str(count)


def who_has_it(rng: random.Random) -> Example:
    owners = list(zip(rng.sample(NAMES, 3), rng.sample(OBJECTS, 3), strict=True))
    name, item = rng.choice(owners)
    facts = " ".join(f"{owner} has the {owned}." for owner, owned in owners)
    return f"{facts} Who has the {item}?", name


def who_has_more(rng: random.Random) -> Example:
    people, counts, things = rng.sample(NAMES, 2), rng.sample(range(1, 100), 2), rng.choice(COUNTED)
    text = f"{people[0]} has {counts[0]} {things}. {people[1]} has {counts[1]} {things}. Who has more?"
    return text, people[0] if counts[0] > counts[1] else people[1]


def largest_number(rng: random.Random) -> Example:
    numbers = rng.sample(range(10, 100), 3)
    return _listing([str(number) for number in numbers]), str(max(numbers))


def got_more(rng: random.Random) -> Example:
    had, got = rng.randint(2, 12), rng.randint(2, 9)
    return f"{rng.choice(NAMES)} had {had} {rng.choice(COUNTED)} and got {got} more.", str(had + got)


def total_of_two(rng: random.Random) -> Example:
    owned = {name: rng.randint(1, 9) for name in rng.sample(NAMES, 3)}
    first, second = rng.sample(list(owned), 2)
    things = rng.choice(COUNTED)
    facts = _listing([f"{name} has {count}" for name, count in owned.items()])
    text = f"Each has some {things}: {facts}. How many do {first} and {second} have together?"
    return text, str(owned[first] + owned[second])


def alphabetical_first(rng: random.Random) -> Example:
    words = rng.sample(OBJECTS, 3)
    return ", ".join(words), min(words)


def middle_age(rng: random.Random) -> Example:
    ages = dict(zip(rng.sample(NAMES, 3), rng.sample(range(5, 90), 3), strict=True))
    facts = _listing([f"{name} is {age}" for name, age in ages.items()])
    return f"{facts} years old.", sorted(ages, key=ages.__getitem__)[1]


def which_day(rng: random.Random) -> Example:
    day = rng.randrange(7)
    word, step = rng.choice([("after", 1), ("before", -1)])
    return f"{rng.choice(NAMES)}'s {rng.choice(APPOINTMENTS)} is on the day {word} {DAYS[day]}.", DAYS[(day + step) % 7]


def date_format(rng: random.Random) -> Example:
    day, month, year = rng.randint(1, 28), rng.randrange(12), rng.randint(1950, 2030)
    return f"{day} {MONTHS[month]} {year}", f"{year}-{month + 1:02}-{day:02}"

"""Generates the built-in suite, src/badit/data/suite.json, from word lists with a fixed seed.

A task is a function that takes a random number generator and returns (input, answer).
"""

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

SEED = 20240901
EXAMPLES = 2 + 160 + 40  # demonstrations, training and test instances
SUITE = Path(__file__).parents[1] / "src" / "badit" / "data" / "suite.json"

_WORDS: dict[str, Any] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
NAMES, PLACES, COUNTED, APPOINTMENTS = (
    _WORDS[kind] for kind in ("names", "places", "counted", "appointments")
)
OBJECTS = _WORDS["objects"]  # with many different first letters, for sorting three random words
CATEGORIES: dict[str, list[str]] = _WORDS["categories"]
OPPOSITES = _WORDS["opposites"]  # adjective, opposite, and nouns that both can describe
REVIEWS = _WORDS[
    "reviews"
]  # nouns, and pairs of a positive adjective and its opposite that can describe all of them
DAYS, MONTHS = _WORDS["days"], _WORDS["months"]

Example = tuple[str, str]


def generated(name: str) -> dict[str, str]:
    """Generates a task's answers by input, which depend only on its name and the fixed seed."""
    generate: Callable[[random.Random], Example] = globals()[
        name
    ]  # the function with the task's name
    rng = random.Random(f"{SEED}/{name}")
    examples: dict[str, str] = {}
    while len(examples) < EXAMPLES:
        # An input has exactly one correct answer, so a repeated input does not change the
        # dictionary.
        examples.update([generate(rng)])
    return examples


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
    items = _listing(
        [f"{'an' if item[0] in 'aeiou' else 'a'} {item}" for item in rng.sample(OBJECTS, count)]
    )
    return f"{rng.choice(NAMES)} packed {items}.", str(count)


def who_has_it(rng: random.Random) -> Example:
    owners = list(zip(rng.sample(NAMES, 3), rng.sample(OBJECTS, 3), strict=True))
    name, item = rng.choice(owners)
    facts = " ".join(f"{owner} has the {owned}." for owner, owned in owners)
    return f"{facts} Who has the {item}?", name


def who_has_more(rng: random.Random) -> Example:
    people, counts, things = rng.sample(NAMES, 2), rng.sample(range(1, 100), 2), rng.choice(COUNTED)
    text = (
        f"{people[0]} has {counts[0]} {things}. {people[1]} has {counts[1]} {things}. Who has more?"
    )
    return text, people[0] if counts[0] > counts[1] else people[1]


def largest_number(rng: random.Random) -> Example:
    numbers = rng.sample(range(10, 100), 3)
    return _listing([str(number) for number in numbers]), str(max(numbers))


def got_more(rng: random.Random) -> Example:
    had, got = rng.randint(2, 12), rng.randint(2, 9)
    return f"{rng.choice(NAMES)} had {had} {rng.choice(COUNTED)} and got {got} more.", str(
        had + got
    )


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
    return (
        f"{rng.choice(NAMES)}'s {rng.choice(APPOINTMENTS)} is on the day {word} {DAYS[day]}.",
        DAYS[(day + step) % 7],
    )


def date_format(rng: random.Random) -> Example:
    day, month, year = rng.randint(1, 28), rng.randrange(12), rng.randint(1950, 2030)
    return f"{day} {MONTHS[month]} {year}", f"{year}-{month + 1:02}-{day:02}"


if __name__ == "__main__":
    suite = json.loads(SUITE.read_text(encoding="utf-8"))
    suite["examples"] = {name: generated(name) for name in suite["tasks"]}
    SUITE.write_text(json.dumps(suite, indent=1) + "\n", encoding="utf-8")

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
NAMES = _WORDS["names"]
PLACES = _WORDS["places"]
COUNTED = _WORDS["counted"]
APPOINTMENTS = _WORDS["appointments"]
OBJECTS = _WORDS["objects"]  # with many different first letters, for sorting three random words
CATEGORIES: dict[str, list[str]] = _WORDS["categories"]
OPPOSITES = _WORDS["opposites"]  # adjective, opposite, and nouns that both can describe
# Nouns, and pairs of a positive adjective and its opposite that can describe all of them.
REVIEWS = _WORDS["reviews"]
DAYS = _WORDS["days"]
MONTHS = _WORDS["months"]

Example = tuple[str, str]
Generator = Callable[[random.Random], Example]
GENERATORS: dict[str, Generator] = {}  # by the names of the tasks


def task(generator: Generator) -> Generator:
    GENERATORS[generator.__name__] = generator
    return generator


def generated(name: str) -> dict[str, str]:
    """Generates a task's answers by input, which depend only on its name and the fixed seed."""
    rng = random.Random(f"{SEED}/{name}")
    examples: dict[str, str] = {}
    while len(examples) < EXAMPLES:
        # Every input has one correct answer, so a repeated input changes nothing.
        text, answer = GENERATORS[name](rng)
        examples[text] = answer
    return examples


def _listing(items: Sequence[str]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    return " and ".join(filter(None, [", ".join(items[:-1]), items[-1]]))


def _review(rng: random.Random, praises: bool) -> Example:
    """Returns a review, positive or negative, and the opposite review in short form."""
    nouns, words, opposites = [], [], []
    for noun_choices, pairs in rng.sample(REVIEWS, 2):
        nouns.append(rng.choice(noun_choices))
        good, bad = rng.choice(pairs)
        words.append(good if praises else bad)
        opposites.append(bad if praises else good)
    place = rng.choice(PLACES)
    review = f"The {nouns[0]} in {place} was {words[0]} and the {nouns[1]} was {words[1]}."
    # The answer has another form, so that copying the review does not score well.
    return review, f"{opposites[0]} {nouns[0]}, {opposites[1]} {nouns[1]}"


@task
def review_sentiment(rng: random.Random) -> Example:
    praises = rng.random() < 0.5
    review, _ = _review(rng, praises)
    return review, "positive" if praises else "negative"


@task
def review_flip(rng: random.Random) -> Example:
    return _review(rng, praises=rng.random() < 0.5)


@task
def opposite_adjective(rng: random.Random) -> Example:
    word, opposite, nouns = rng.choice(OPPOSITES)
    if rng.random() >= 0.5:
        word, opposite = opposite, word
    return f"the {word} {rng.choice(nouns)} in {rng.choice(PLACES)}", opposite


@task
def common_category(rng: random.Random) -> Example:
    category = rng.choice(list(CATEGORIES))
    return ", ".join(rng.sample(CATEGORIES[category], 3)), category


@task
def odd_one_out(rng: random.Random) -> Example:
    usual, other = rng.sample(list(CATEGORIES), 2)
    odd = rng.choice(CATEGORIES[other])
    words = [*rng.sample(CATEGORIES[usual], 3), odd]
    rng.shuffle(words)
    return ", ".join(words), odd


@task
def category_count(rng: random.Random) -> Example:
    asked, other = rng.sample(list(CATEGORIES), 2)
    count = rng.randint(1, 4)
    words = rng.sample(CATEGORIES[asked], count)
    words += rng.sample(CATEGORIES[other], rng.randint(1, 3))
    rng.shuffle(words)
    return f"Kind: {asked}. Words: {', '.join(words)}.", str(count)


@task
def item_count(rng: random.Random) -> Example:
    count = rng.randint(1, 6)
    items = []
    for item in rng.sample(OBJECTS, count):
        article = "an" if item[0] in "aeiou" else "a"
        items.append(f"{article} {item}")
    return f"{rng.choice(NAMES)} packed {_listing(items)}.", str(count)


@task
def who_has_it(rng: random.Random) -> Example:
    owners = list(zip(rng.sample(NAMES, 3), rng.sample(OBJECTS, 3), strict=True))
    name, item = rng.choice(owners)
    facts = " ".join(f"{owner} has the {owned}." for owner, owned in owners)
    return f"{facts} Who has the {item}?", name


@task
def who_has_more(rng: random.Random) -> Example:
    people = rng.sample(NAMES, 2)
    counts = rng.sample(range(1, 100), 2)
    things = rng.choice(COUNTED)
    facts = [f"{name} has {count} {things}." for name, count in zip(people, counts, strict=True)]
    return f"{' '.join(facts)} Who has more?", people[counts.index(max(counts))]


@task
def largest_number(rng: random.Random) -> Example:
    numbers = rng.sample(range(10, 100), 3)
    return _listing([str(number) for number in numbers]), str(max(numbers))


@task
def got_more(rng: random.Random) -> Example:
    had = rng.randint(2, 12)
    got = rng.randint(2, 9)
    text = f"{rng.choice(NAMES)} had {had} {rng.choice(COUNTED)} and got {got} more."
    return text, str(had + got)


@task
def total_of_two(rng: random.Random) -> Example:
    owned = {name: rng.randint(1, 9) for name in rng.sample(NAMES, 3)}
    first, second = rng.sample(list(owned), 2)
    things = rng.choice(COUNTED)
    facts = _listing([f"{name} has {count}" for name, count in owned.items()])
    text = f"Each has some {things}: {facts}. How many do {first} and {second} have together?"
    return text, str(owned[first] + owned[second])


@task
def alphabetical_first(rng: random.Random) -> Example:
    words = rng.sample(OBJECTS, 3)
    return ", ".join(words), min(words)


@task
def middle_age(rng: random.Random) -> Example:
    ages = dict(zip(rng.sample(NAMES, 3), rng.sample(range(5, 90), 3), strict=True))
    facts = _listing([f"{name} is {age}" for name, age in ages.items()])
    return f"{facts} years old.", sorted(ages, key=ages.__getitem__)[1]


@task
def which_day(rng: random.Random) -> Example:
    day = rng.randrange(7)
    word, step = rng.choice([("after", 1), ("before", -1)])
    appointment = f"{rng.choice(NAMES)}'s {rng.choice(APPOINTMENTS)}"
    return f"{appointment} is on the day {word} {DAYS[day]}.", DAYS[(day + step) % 7]


@task
def date_format(rng: random.Random) -> Example:
    day = rng.randint(1, 28)
    month = rng.randrange(12)
    year = rng.randint(1950, 2030)
    return f"{day} {MONTHS[month]} {year}", f"{year}-{month + 1:02}-{day:02}"


if __name__ == "__main__":
    suite = json.loads(SUITE.read_text(encoding="utf-8"))
    suite["examples"] = {name: generated(name) for name in suite["tasks"]}
    SUITE.write_text(json.dumps(suite, indent=1) + "\n", encoding="utf-8")

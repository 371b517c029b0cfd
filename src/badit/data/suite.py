"""The built-in suite: small tasks in plain English whose abilities are known, made by the project with a fixed seed.

Because the abilities that each task needs are written down, what an analysis says about shared abilities can be held
against the truth. Nothing has to be downloaded. A task is one small generator: random numbers in, (input, answer) out.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import lru_cache

from badit.data.tasks import Demonstration, Instance, Task
from badit.data.words import (
    APPOINTMENTS,
    CATEGORIES,
    COUNTED,
    DAYS,
    MONTHS,
    NAMES,
    OBJECTS,
    OPPOSITES,
    PLACES,
    REVIEWS,
)

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

_generators: dict[str, Callable[[], Task]] = {}


@lru_cache(maxsize=1)
def _suite() -> tuple[Task, ...]:
    return tuple(_generators[name]() for name in sorted(_generators))


def builtin_tasks() -> list[Task]:
    """The suite, sorted by name: per task 160 training and 40 test instances and 2 demonstrations, no input twice."""
    return list(_suite())


def _task(category: str, definition: str, abilities: Sequence[str]) -> Callable[[Generator], Generator]:
    """Adds the decorated generator's task to the suite; it depends on the generator's name and the fixed seed alone."""

    def register(generate: Generator) -> Generator:
        name = generate.__name__
        _generators[name] = lambda: _generated(name, generate, category, definition, abilities)
        return generate

    return register


def _generated(name: str, generate: Generator, category: str, definition: str, abilities: Sequence[str]) -> Task:
    rng = random.Random(f"{SEED}/{name}")
    examples: dict[str, str] = {}
    while len(examples) < DEMONSTRATIONS + TRAIN_INSTANCES + TEST_INSTANCES:
        # An input has one right answer, so a repeated one only replaces itself.
        examples.update([generate(rng)])
    pairs = list(examples.items())
    shown, scored = pairs[:DEMONSTRATIONS], pairs[DEMONSTRATIONS:]
    instances = [Instance(id=f"{name}-{i}", input=text, outputs=(answer,)) for i, (text, answer) in enumerate(scored)]
    return Task(
        name=name,
        definition=definition,
        demonstrations=tuple(Demonstration(input=text, output=answer) for text, answer in shown),
        categories=(category,),
        abilities=tuple(abilities),
        train=tuple(instances[:TRAIN_INSTANCES]),
        test=tuple(instances[TRAIN_INSTANCES:]),
    )


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _listing(items: Sequence[str]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    return " and ".join(filter(None, [", ".join(items[:-1]), items[-1]]))


def _review(rng: random.Random, praises: bool) -> Example:
    """A review of one mood, and in short what a reviewer of the opposite mood would say."""
    judged = []
    for nouns, pairs in rng.sample(REVIEWS, 2):
        noun, (good, bad) = rng.choice(nouns), rng.choice(pairs)
        judged.append((noun, good, bad) if praises else (noun, bad, good))
    (first, said, turned), (second, also_said, also_turned) = judged
    review = f"The {first} in {rng.choice(PLACES)} was {said} and the {second} was {also_said}."
    # In short: an answer that only repeats the review must not score well.
    return review, f"{turned} {first}, {also_turned} {second}"


@_task(
    "Sentiment Analysis",
    "Read the short review. Answer 'positive' if its writer is pleased and 'negative' if not.",
    ["sentiment"],
)
def review_sentiment(rng: random.Random) -> Example:
    praises = rng.random() < 0.5
    review, _ = _review(rng, praises)
    return review, "positive" if praises else "negative"


@_task(
    "Text Rewriting",
    "Write the opposite of the review in short: each of the two things after the opposite of what the review calls it.",
    ["sentiment", "opposites", "rewriting"],
)
def review_flip(rng: random.Random) -> Example:
    return _review(rng, rng.random() < 0.5)


@_task(
    "Word Semantics",
    "The phrase has one adjective. Answer with the adjective of opposite meaning, and nothing else.",
    ["opposites"],
)
def opposite_adjective(rng: random.Random) -> Example:
    word, opposite, nouns = rng.choice(OPPOSITES)
    given, asked = (word, opposite) if rng.random() < 0.5 else (opposite, word)
    return f"the {given} {rng.choice(nouns)} in {rng.choice(PLACES)}", asked


@_task(
    "Word Semantics",
    "The three words name things of one kind. Answer with the kind: animal, fruit, vehicle, instrument, garment or"
    " tool.",
    ["categories"],
)
def common_category(rng: random.Random) -> Example:
    category = rng.choice(list(CATEGORIES))
    return ", ".join(rng.sample(CATEGORIES[category], 3)), category


@_task(
    "Word Semantics",
    "Three of the four words name things of one kind. Answer with the word that does not belong.",
    ["categories", "lookup"],
)
def odd_one_out(rng: random.Random) -> Example:
    usual, other = rng.sample(list(CATEGORIES), 2)
    odd = rng.choice(CATEGORIES[other])
    words = [*rng.sample(CATEGORIES[usual], 3), odd]
    rng.shuffle(words)
    return ", ".join(words), odd


@_task(
    "Counting",
    "The list mixes two kinds of things. Answer with the number of words that name the kind asked for.",
    ["categories", "counting"],
)
def category_count(rng: random.Random) -> Example:
    asked, other = rng.sample(list(CATEGORIES), 2)
    count = rng.randint(1, 4)
    words = rng.sample(CATEGORIES[asked], count) + rng.sample(CATEGORIES[other], rng.randint(1, 3))
    rng.shuffle(words)
    return f"Kind: {asked}. Words: {', '.join(words)}.", str(count)


@_task("Counting", "Answer with the number of things that the person packed.", ["counting"])
def item_count(rng: random.Random) -> Example:
    count = rng.randint(1, 6)
    items = _listing([_with_article(item) for item in rng.sample(OBJECTS, count)])
    return f"{rng.choice(NAMES)} packed {items}.", str(count)


@_task(
    "Question Answering",
    "Read the sentences and answer the question with the name of the person.",
    ["lookup"],
)
def who_has_it(rng: random.Random) -> Example:
    owners = list(zip(rng.sample(NAMES, 3), rng.sample(OBJECTS, 3), strict=True))
    name, item = rng.choice(owners)
    facts = " ".join(f"{owner} has the {owned}." for owner, owned in owners)
    return f"{facts} Who has the {item}?", name


@_task(
    "Question Answering",
    "Two people collected things. Answer with the name of the person who has more.",
    ["lookup", "comparison"],
)
def who_has_more(rng: random.Random) -> Example:
    people, counts, things = rng.sample(NAMES, 2), rng.sample(range(1, 100), 2), rng.choice(COUNTED)
    text = f"{people[0]} has {counts[0]} {things}. {people[1]} has {counts[1]} {things}. Who has more?"
    return text, people[0] if counts[0] > counts[1] else people[1]


@_task("Numbers", "Answer with the largest of the three numbers.", ["comparison"])
def largest_number(rng: random.Random) -> Example:
    numbers = rng.sample(range(10, 100), 3)
    return _listing([str(number) for number in numbers]), str(max(numbers))


@_task("Numbers", "Answer with the number of things that the person has now.", ["arithmetic"])
def got_more(rng: random.Random) -> Example:
    had, got = rng.randint(2, 12), rng.randint(2, 9)
    return f"{rng.choice(NAMES)} had {had} {rng.choice(COUNTED)} and got {got} more.", str(had + got)


@_task(
    "Numbers",
    "Three people have some things. Answer with the number that the two people asked about have together.",
    ["lookup", "arithmetic"],
)
def total_of_two(rng: random.Random) -> Example:
    owned = {name: rng.randint(1, 9) for name in rng.sample(NAMES, 3)}
    first, second = rng.sample(list(owned), 2)
    things = rng.choice(COUNTED)
    facts = _listing([f"{name} has {count}" for name, count in owned.items()])
    text = f"Each has some {things}: {facts}. How many do {first} and {second} have together?"
    return text, str(owned[first] + owned[second])


@_task("Ordering", "Answer with the word that a dictionary lists first.", ["ordering"])
def alphabetical_first(rng: random.Random) -> Example:
    words = rng.sample(OBJECTS, 3)
    return ", ".join(words), min(words)


@_task(
    "Ordering",
    "Answer with the name of the person who is neither the youngest nor the oldest.",
    ["lookup", "comparison", "ordering"],
)
def middle_age(rng: random.Random) -> Example:
    ages = dict(zip(rng.sample(NAMES, 3), rng.sample(range(5, 90), 3), strict=True))
    facts = _listing([f"{name} is {age}" for name, age in ages.items()])
    return f"{facts} years old.", sorted(ages, key=ages.__getitem__)[1]


@_task("Calendar", "Answer with the day of the week on which it takes place.", ["calendar"])
def which_day(rng: random.Random) -> Example:
    day = rng.randrange(7)
    word, step = rng.choice([("after", 1), ("before", -1)])
    text = f"{rng.choice(NAMES)}'s {rng.choice(APPOINTMENTS)} is on the day {word} {DAYS[day]}."
    return text, DAYS[(day + step) % 7]


@_task(
    "Calendar",
    "Rewrite the date with numbers, as year-month-day, with two digits for the month and the day.",
    ["calendar", "rewriting"],
)
def date_format(rng: random.Random) -> Example:
    day, month, year = rng.randint(1, 28), rng.randrange(12), rng.randint(1950, 2030)
    return f"{day} {MONTHS[month]} {year}", f"{year}-{month + 1:02}-{day:02}"

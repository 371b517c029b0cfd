"""The built-in suite: small tasks in plain English whose abilities are known, made by the project with a fixed seed.

Because the abilities that each task needs are written down, what an analysis says about shared abilities can be held
against the truth. Nothing has to be downloaded. A task is one small generator: random numbers in, (input, answer) out.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import lru_cache

from badit.data.tasks import Demonstration, Instance, Task
from badit.errors import BaditError

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


def _task(category: str, *abilities: str) -> Callable[[Generator], Generator]:
    """Adds the decorated generator's task to the suite: its name is the function's, its definition the docstring."""

    def register(generate: Generator) -> Generator:
        _generators[generate.__name__] = lambda: _generated(generate, category, abilities)
        return generate

    return register


def _generated(generate: Generator, category: str, abilities: tuple[str, ...]) -> Task:
    """A task depends on its name and the fixed seed alone."""
    if generate.__doc__ is None:
        raise BaditError("the built-in tasks are defined by docstrings, which python -OO removes; leave -OO out")
    name = generate.__name__
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
        definition=" ".join(generate.__doc__.split()),
        demonstrations=tuple(Demonstration(input=text, output=answer) for text, answer in shown),
        categories=(category,),
        abilities=abilities,
        train=tuple(instances[:TRAIN_INSTANCES]),
        test=tuple(instances[TRAIN_INSTANCES:]),
    )


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    "Nora Omar Priya Tomas Lena Kofi Alice Hugo Mina Pavel Rosa Samir Greta Yusuf Clara Diego Ingrid Marco Sofia Peter"
    " Hana Victor Julia Felix"
)

PLACES = _words(
    "Lisbon Oslo Dublin Prague Athens Madrid Vienna Geneva Boston Nairobi Lima Delhi Cairo Sydney Toronto Kyoto"
)

# First letters differ often enough that three words drawn at random can be sorted by them.
OBJECTS = _words(
    "apron basket candle drum envelope fan glove hat jacket kettle lamp mirror needle pencil quilt rope scarf towel"
    " umbrella vase wallet blanket comb helmet ladder map notebook pillow ribbon spoon"
)

COUNTED = ("plums", "shells", "stamps", "marbles", "books", "cards", "pears", "coins", "buttons", "stickers")

CATEGORIES = {
    "animal": _words("horse rabbit tiger goat sheep wolf camel monkey elephant squirrel beaver donkey"),
    "fruit": _words("apple pear plum cherry banana mango grape peach lemon melon apricot orange"),
    "vehicle": _words("bus tram truck bicycle van taxi train tractor scooter motorcycle ferry car"),
    "instrument": _words("violin piano trumpet flute guitar cello harp clarinet banjo oboe trombone saxophone"),
    "garment": _words("coat skirt sweater shirt dress vest trousers blouse cardigan jeans tunic shorts"),
    "tool": _words("hammer saw chisel drill wrench pliers screwdriver spade rake axe shovel sander"),
}

# Adjective, opposite, and nouns that either can describe.
OPPOSITES = (
    ("hot", "cold", _words("drink meal bath day")),
    ("wide", "narrow", _words("road river bridge door")),
    ("loud", "quiet", _words("voice street engine crowd")),
    ("heavy", "light", _words("bag box coat chair")),
    ("old", "new", _words("house bicycle song museum")),
    ("wet", "dry", _words("towel cloth field roof")),
    ("full", "empty", _words("bottle bus jar drawer")),
    ("clean", "dirty", _words("plate shirt window floor")),
    ("long", "short", _words("letter walk rope speech")),
    ("early", "late", _words("train breakfast flight start")),
    ("soft", "hard", _words("pillow bed surface cheese")),
    ("deep", "shallow", _words("lake pool pond ditch")),
    ("thick", "thin", _words("book wall blanket slice")),
    ("strong", "weak", _words("rope tea signal wind")),
    ("bright", "dark", _words("room corner colour kitchen")),
    ("cheap", "expensive", _words("hotel watch ticket lunch")),
    ("simple", "complicated", _words("plan recipe puzzle rule")),
    ("rough", "smooth", _words("board stone path sea")),
)

# What a review is about: nouns, then pairs of a word of praise and its opposite that fit all of them.
REVIEWS = (
    (("soup", "bread", "salad", "pie"), (("delicious", "tasteless"), ("fresh", "stale"))),
    (("waiter", "guide", "driver", "cook"), (("friendly", "rude"), ("helpful", "useless"))),
    (("room", "hall", "garden", "lobby"), (("clean", "dirty"), ("beautiful", "ugly"))),
    (("film", "concert", "play", "show"), (("exciting", "boring"), ("wonderful", "terrible"))),
)

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

MONTHS = _words("January February March April May June July August September October November December")

APPOINTMENTS = ("swimming lesson", "dentist visit", "piano exam", "job interview", "birthday party", "chess match")


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


@_task("Sentiment Analysis", "sentiment")
def review_sentiment(rng: random.Random) -> Example:
    """Read the short review. Answer 'positive' if its writer is pleased and 'negative' if not."""
    praises = rng.random() < 0.5
    review, _ = _review(rng, praises)
    return review, "positive" if praises else "negative"


@_task("Text Rewriting", "sentiment", "opposites", "rewriting")
def review_flip(rng: random.Random) -> Example:
    """Write the opposite of the review in short: each of the two things after the opposite of what the review calls
    it.
    """
    return _review(rng, rng.random() < 0.5)


@_task("Word Semantics", "opposites")
def opposite_adjective(rng: random.Random) -> Example:
    """The phrase has one adjective. Answer with the adjective of opposite meaning, and nothing else."""
    word, opposite, nouns = rng.choice(OPPOSITES)
    given, asked = (word, opposite) if rng.random() < 0.5 else (opposite, word)
    return f"the {given} {rng.choice(nouns)} in {rng.choice(PLACES)}", asked


@_task("Word Semantics", "categories")
def common_category(rng: random.Random) -> Example:
    """The three words name things of one kind. Answer with the kind: animal, fruit, vehicle, instrument, garment or
    tool.
    """
    category = rng.choice(list(CATEGORIES))
    return ", ".join(rng.sample(CATEGORIES[category], 3)), category


@_task("Word Semantics", "categories", "lookup")
def odd_one_out(rng: random.Random) -> Example:
    """Three of the four words name things of one kind. Answer with the word that does not belong."""
    usual, other = rng.sample(list(CATEGORIES), 2)
    odd = rng.choice(CATEGORIES[other])
    words = [*rng.sample(CATEGORIES[usual], 3), odd]
    rng.shuffle(words)
    return ", ".join(words), odd


@_task("Counting", "categories", "counting")
def category_count(rng: random.Random) -> Example:
    """The list mixes two kinds of things. Answer with the number of words that name the kind asked for."""
    asked, other = rng.sample(list(CATEGORIES), 2)
    count = rng.randint(1, 4)
    words = rng.sample(CATEGORIES[asked], count) + rng.sample(CATEGORIES[other], rng.randint(1, 3))
    rng.shuffle(words)
    return f"Kind: {asked}. Words: {', '.join(words)}.", str(count)


@_task("Counting", "counting")
def item_count(rng: random.Random) -> Example:
    """Answer with the number of things that the person packed."""
    count = rng.randint(1, 6)
    items = _listing([_with_article(item) for item in rng.sample(OBJECTS, count)])
    return f"{rng.choice(NAMES)} packed {items}.", str(count)


@_task("Question Answering", "lookup")
def who_has_it(rng: random.Random) -> Example:
    """Read the sentences and answer the question with the name of the person."""
    owners = list(zip(rng.sample(NAMES, 3), rng.sample(OBJECTS, 3), strict=True))
    name, item = rng.choice(owners)
    facts = " ".join(f"{owner} has the {owned}." for owner, owned in owners)
    return f"{facts} Who has the {item}?", name


@_task("Question Answering", "lookup", "comparison")
def who_has_more(rng: random.Random) -> Example:
    """Two people collected things. Answer with the name of the person who has more."""
    people, counts, things = rng.sample(NAMES, 2), rng.sample(range(1, 100), 2), rng.choice(COUNTED)
    text = f"{people[0]} has {counts[0]} {things}. {people[1]} has {counts[1]} {things}. Who has more?"
    return text, people[0] if counts[0] > counts[1] else people[1]


@_task("Numbers", "comparison")
def largest_number(rng: random.Random) -> Example:
    """Answer with the largest of the three numbers."""
    numbers = rng.sample(range(10, 100), 3)
    return _listing([str(number) for number in numbers]), str(max(numbers))


@_task("Numbers", "arithmetic")
def got_more(rng: random.Random) -> Example:
    """Answer with the number of things that the person has now."""
    had, got = rng.randint(2, 12), rng.randint(2, 9)
    return f"{rng.choice(NAMES)} had {had} {rng.choice(COUNTED)} and got {got} more.", str(had + got)


@_task("Numbers", "lookup", "arithmetic")
def total_of_two(rng: random.Random) -> Example:
    """Three people have some things. Answer with the number that the two people asked about have together."""
    owned = {name: rng.randint(1, 9) for name in rng.sample(NAMES, 3)}
    first, second = rng.sample(list(owned), 2)
    things = rng.choice(COUNTED)
    facts = _listing([f"{name} has {count}" for name, count in owned.items()])
    text = f"Each has some {things}: {facts}. How many do {first} and {second} have together?"
    return text, str(owned[first] + owned[second])


@_task("Ordering", "ordering")
def alphabetical_first(rng: random.Random) -> Example:
    """Answer with the word that a dictionary lists first."""
    words = rng.sample(OBJECTS, 3)
    return ", ".join(words), min(words)


@_task("Ordering", "lookup", "comparison", "ordering")
def middle_age(rng: random.Random) -> Example:
    """Answer with the name of the person who is neither the youngest nor the oldest."""
    ages = dict(zip(rng.sample(NAMES, 3), rng.sample(range(5, 90), 3), strict=True))
    facts = _listing([f"{name} is {age}" for name, age in ages.items()])
    return f"{facts} years old.", sorted(ages, key=ages.__getitem__)[1]


@_task("Calendar", "calendar")
def which_day(rng: random.Random) -> Example:
    """Answer with the day of the week on which it takes place."""
    day = rng.randrange(7)
    word, step = rng.choice([("after", 1), ("before", -1)])
    text = f"{rng.choice(NAMES)}'s {rng.choice(APPOINTMENTS)} is on the day {word} {DAYS[day]}."
    return text, DAYS[(day + step) % 7]


@_task("Calendar", "calendar", "rewriting")
def date_format(rng: random.Random) -> Example:
    """Rewrite the date with numbers, as year-month-day, with two digits for the month and the day."""
    day, month, year = rng.randint(1, 28), rng.randrange(12), rng.randint(1950, 2030)
    return f"{day} {MONTHS[month]} {year}", f"{year}-{month + 1:02}-{day:02}"

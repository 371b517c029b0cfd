"""The vocabularies of the built-in suite."""

from __future__ import annotations


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

"""Ways to damage a valid file so that most of it passes the first checks."""

import copy
import json
import os

import yaml
from hypothesis import strategies as st

from badit.support.files import remove

# Known causes of errors in readers: wrong types, numbers out of range, names that lead out of a
# folder, and text that a terminal, a page or a file system interprets.
NASTY_VALUES = [
    *(None, True, False, 0, -1, 2**31, 2**64, 10**400, -(10**400), 0.5, 1e308, -1e308, 5e-324),
    *(float("nan"), float("inf"), float("-inf")),
    *(
        "",
        " ",
        "\0",
        "\ud800",
        "\u202e\u2028",
        "\x1b[2J",
        "two\nlines",
        "5e-4",
        "073",
        "1e999",
        "nan",
        "null",
    ),
    *(
        "x" * 300,
        "é" * 130,
        "../../outside",
        "/etc/passwd",
        "C:\\CON",
        "a/b",
        "a\\b",
        "..",
        ".",
        "~",
        "$HOME",
    ),
    *(
        "<script>alert(1)</script>",
        "</script>",
        "{{ 7*7 }}",
        "!!python/object:os.system",
        "lora",
        "badit",
        "builtin",
    ),
    *([], {}, [[]], [None], {"": None}, {"name": {}}, ["a", 1], [1, 2, 3], {"a": {"b": {"c": []}}}),
]
# Copies, because an inserted value may be damaged further.
VALUES = (
    st.sampled_from(NASTY_VALUES).map(copy.deepcopy)
    | st.integers()
    | st.floats()
    | st.text(max_size=12)
)
VALUES |= st.lists(st.integers(-2, 2) | st.text(max_size=3), max_size=3)
VALUES |= st.dictionaries(st.text(max_size=4), st.integers() | st.text(max_size=3), max_size=2)
_INSERTED = [
    *(
        b"\0",
        b"\xff",
        b"\xed\xa0\x80",
        b"\xef\xbb\xbf",
        b"\xe2\x80\xa8",
        b"\r\n",
        b"\r",
        b"\n",
        b"\t",
    ),
    *(
        b'"',
        b"{",
        b"]",
        b",",
        b":",
        b"\\",
        b"NaN",
        b"1e999",
        b"0x",
        b"9" * 5000,
        b"[" * 3000,
        b'{"a":' * 3000,
    ),
    *(
        b"&a [*a]",
        b"<<: *x",
        b"\n? ",
        b"2001-99-99",
        b"!!python/object/apply:os.getcwd []",
        b"%YAML 9.9\n---\n",
    ),
    *(b"\n---\n", b"'", b"#", b"- "),
]


@st.composite
def damaged_value(draw, value):
    """Draws a copy of the value with one to three parts changed."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        parts = list(_parts(value))
        if not parts or draw(st.integers(0, 99)) == 0:
            value = draw(VALUES)
            continue
        parent, key = draw(st.sampled_from(parts))
        match draw(
            st.sampled_from(
                ["replace", "replace", "replace", "remove", "wrap", "swap", "double", "nest"]
            )
        ):
            case "replace":
                parent[key] = draw(VALUES)
            case "remove":
                del parent[key]
            case "wrap":
                parent[key] = draw(
                    st.sampled_from([[parent[key]], {"value": parent[key]}, str(parent[key])[:50]])
                )
            case "swap":  # with a sibling
                other = draw(
                    st.sampled_from(
                        list(parent) if isinstance(parent, dict) else range(len(parent))
                    )
                )
                parent[key], parent[other] = parent[other], parent[key]
            case "double" if isinstance(parent, list):
                parent.insert(key, copy.deepcopy(parent[key]))
            case "double":
                other = draw(
                    st.sampled_from([f"{key}x", str(key).upper(), "", "__class__"])
                    | st.text(max_size=5)
                )
                parent[other] = parent[key]
            case "nest":
                for _ in range(draw(st.sampled_from([1, 30, 100]))):
                    parent[key] = [parent[key]]
    return value


def _parts(value, depth=0):
    """Yields every part of a value as the dict or list that contains it, and its key or index."""
    parts = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, part in parts if depth < 8 else ():
        yield value, key
        yield from _parts(part, depth + 1)


def as_json(value):
    """Returns JSON, with NaN and infinities as Python writes them, surrogates as escapes."""
    return json.dumps(value).encode()


def as_lines(values):
    return b"".join(
        as_json(line) + b"\n" for line in (values if isinstance(values, list) else [values])
    )


def as_yaml(value):
    return yaml.safe_dump(value, allow_unicode=False).encode()


@st.composite
def damaged_bytes(draw, content):
    """Draws the content with bytes changed, inserted, removed or repeated, or encoded again."""
    start = draw(st.integers(0, len(content)))
    end = min(len(content), start + draw(st.integers(1, 40)))
    flipped = content[:start] + bytes([draw(st.integers(0, 255))]) + content[start + 1 :]
    inserted = content[:start] + draw(st.sampled_from(_INSERTED)) + content[start:]
    damages = [content[:start], flipped, inserted, inserted]
    damages += [content[:start] + content[end:], content[:end] + content[start:]]
    wholes = [b"\xef\xbb\xbf" + content, content * 2, b"", b"\n" * 50, content[::-1]]
    wholes += [content.replace(b"\n", b"\r\n"), content.decode("utf-8", "replace").encode("utf-16")]
    return draw(st.sampled_from([*damages, draw(st.sampled_from(wholes))]))


def damaged(value, form):
    """Returns a strategy of contents with damaged values (two of three cases) or bytes."""
    by_value = damaged_value(value).map(form)
    return by_value | by_value | damaged_bytes(form(value))


def folder_in_its_place(file):
    remove(file)
    file.mkdir()


def pipe_in_its_place(file):
    """Replaces the file by a named pipe, whose opening blocks: nothing writes to it."""
    remove(file)
    os.mkfifo(file)


def _link_to(target):
    def replace(file):
        remove(file)
        file.symlink_to(target or file)

    return replace


endless_file = _link_to("/dev/zero")
REPLACEMENTS = (
    *(folder_in_its_place, pipe_in_its_place, lambda file: file.chmod(0), remove, endless_file),
    *(
        _link_to(target) for target in (None, "/etc/passwd", "/nonexistent/file")
    ),  # None: a link to itself
)

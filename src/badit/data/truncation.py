"""Cutting a long prompt in its middle, by the text and not by the tokens.

Characters are cut and the result is tokenised anew, since tokens may merge across a cut; this needs nothing of a
tokenizer but a count, and some log2(characters) calls of it for those prompts alone that are too long.
"""

from __future__ import annotations

from collections.abc import Callable


def shortened(head: str, content: str, tail: str, *, fits: Callable[[str], bool]) -> str | None:
    """The longest text that fits: `content` loses its end first, then `head` its own; None if `tail` alone is too long.

    Args:
        fits: whether a text is short enough.
    """
    if fits(head + content + tail):
        return head + content + tail
    if fits(head + tail):
        return head + _longest_prefix(content, lambda part: fits(head + part + tail)) + tail
    if fits(tail):
        return _longest_prefix(head, lambda part: fits(part + tail)) + tail
    return None


def _longest_prefix(text: str, fits: Callable[[str], bool]) -> str:
    """By bisection, a prefix that fits, given that the empty one does and the whole does not."""
    fitting, too_long = 0, len(text)
    while too_long - fitting > 1:
        middle = (fitting + too_long) // 2
        if fits(text[:middle]):
            fitting = middle
        else:
            too_long = middle
    return text[:fitting]

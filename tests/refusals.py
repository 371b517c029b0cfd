"""The assertion that badit refuses invalid input."""

import pytest

from badit.support.errors import BaditError


def refuses(message, call, *arguments, **options):
    """Asserts that a call raises a BaditError with a matching message, and returns the message."""
    with pytest.raises(BaditError, match=message) as caught:
        call(*arguments, **options)
    return str(caught.value)

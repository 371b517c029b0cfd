from __future__ import annotations

from badit.data.truncation import shortened
from hypothesis import given
from hypothesis import strategies as st


@given(st.text(max_size=30), st.text(max_size=30), st.text(max_size=10), st.integers(0, 80))
def test_the_content_goes_first_then_the_head_and_never_the_tail(head, content, tail, room):
    result = shortened(head, content, tail, fits=lambda text: len(text) <= room)
    if room < len(tail):
        assert result is None
    else:
        kept = room - len(tail)
        assert result == (head + content)[:kept] + tail


def test_a_text_that_fits_is_measured_once():
    measured: list[str] = []

    def fits(text: str) -> bool:
        measured.append(text)
        return True

    assert shortened("a", "b", "c", fits=fits) == "abc"
    assert measured == ["abc"]

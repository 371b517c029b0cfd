"""Waits that take long show what is done, how far it is, and nothing if they are quiet or short."""

import time

import pytest

from badit.support import console
from badit.support.console import quiet, status, waiting


@pytest.mark.parametrize(
    ("patience", "is_quiet", "is_shown"), [(0, False, True), (0, True, False), (60, False, False)]
)
def test_a_bar_is_shown_only_for_long_waits(monkeypatch, capsys, patience, is_quiet, is_shown):
    monkeypatch.setattr(console, "_PATIENCE", patience)
    with quiet(is_quiet):
        assert list(waiting([1, 2, 3], "Finding clusters", "layer")) == [1, 2, 3]
    shown = capsys.readouterr().err
    assert ("Finding clusters" in shown) == is_shown
    assert ("/3" in shown) == is_shown


@pytest.mark.parametrize(
    ("in_logs", "patience", "is_shown"), [(True, 0.05, True), (True, 60, False), (False, 0, False)]
)
def test_a_long_status_is_printed_once_without_a_terminal(
    monkeypatch, capsys, in_logs, patience, is_shown
):
    monkeypatch.setattr(console, "_PATIENCE", patience)
    with status("loading a model", in_logs=in_logs):
        time.sleep(0.5)
    assert capsys.readouterr().err == ("badit: loading a model …\n" if is_shown else "")


def test_a_wait_within_a_wait_is_not_printed_too(monkeypatch, capsys):
    monkeypatch.setattr(console, "_PATIENCE", 0.05)
    with status("outer", in_logs=True):
        for _ in range(2):
            with status("inner", in_logs=True):
                time.sleep(0.3)
    with status("after", in_logs=True):
        time.sleep(0.3)
    assert capsys.readouterr().err == "badit: outer …\nbadit: after …\n"


def test_quiet_contexts_are_nested(monkeypatch, capsys):
    monkeypatch.setattr(console, "_PATIENCE", 0)
    with quiet():
        with quiet(False):
            assert list(waiting([1], "Inner", "step")) == [1]
        assert list(waiting([1], "Outer", "step")) == [1]
    assert capsys.readouterr().err == ""
    assert list(waiting([1], "After", "step")) == [1]
    assert "After" in capsys.readouterr().err

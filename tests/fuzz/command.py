"""Runs commands in this process: on any input they succeed, or print one-line errors."""

import contextlib
import io
import os
import signal

from hypothesis import HealthCheck, settings

from badit.cli import main

# The factor for the number of cases: 1 in `make test-slow`, larger in `make stress`.
STRESS = int(os.environ.get("BADIT_STRESS", "1"))
_HANG_SECONDS = 300  # far longer than any case takes on a busy machine
COUNTED = "cases of broken input"
tried = 0


def cases(number):
    """Returns Hypothesis settings for this number of cases, times ``BADIT_STRESS``."""
    return settings(
        max_examples=number * STRESS, deadline=None, suppress_health_check=list(HealthCheck)
    )


def ends_well(*arguments):
    """Runs a command and returns whether it succeeded; a failure prints only one-line errors."""
    global tried
    tried += 1
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _no_hang():
        code = main(list(arguments))
    said = err.getvalue()
    if code == 0:  # at least a newline: the answer of a model with damaged weights may be empty
        assert out.getvalue(), "a successful command must print something"
        return True
    assert code == 2, f"exit code {code}: {said}"
    assert out.getvalue() == "", "a failed command must not print a partial result"
    assert (said[:7], said[-1:]) == ("badit: ", "\n"), said
    for line in said[:-1].split("\n"):  # one line for each error of a recipe
        assert line.isprintable(), f"control characters in the line {line!r}"
        assert 10 < len(line) < 1500, line
    return False


@contextlib.contextmanager
def _no_hang():
    def interrupt(*_):
        raise AssertionError(f"no end after {_HANG_SECONDS} s")

    former = signal.signal(signal.SIGALRM, interrupt)
    # Repeats every second, because an exception in a garbage collector callback is not propagated.
    signal.setitimer(signal.ITIMER_REAL, _HANG_SECONDS, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


def written(folder):
    """Returns all paths in a folder, to detect new ones."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}

"""The command, called in this process, and what it must do whatever it reads: a whole result or one line and a 2."""

import contextlib
import io
import os
import signal

from hypothesis import HealthCheck, settings

from badit.cli import main

# `make stress` tries many times as many cases as `make test`.
STRESS = int(os.environ.get("BADIT_STRESS", "1"))
_HANG_SECONDS = 300  # far beyond what any case takes on a busy machine
COUNTED = "cases of broken input"
tried = 0


def cases(number):
    """Hypothesis' settings for so many cases, times the factor in ``BADIT_STRESS``."""
    return settings(max_examples=number * STRESS, deadline=None, suppress_health_check=list(HealthCheck))


def ends_well(*arguments):
    """Whether the command has done its work; asserts that it has otherwise said why in one line, and nothing else."""
    global tried
    tried += 1
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _no_hang():
        code = main(list(arguments))
    said = err.getvalue()
    if code == 0:  # a line at least; of a model whose weights have changed the answer may be an empty one
        assert out.getvalue(), "a command that has done its work says so"
        return True
    assert code == 2, f"exit code {code}: {said}"
    assert out.getvalue() == "", "what is refused gives no part of a result"
    assert (said[:7], said[-1:]) == ("badit: ", "\n"), said
    for line in said[:-1].split("\n"):  # a recipe's mistakes have a line each
        assert line.isprintable(), f"a line without control characters: {line!r}"
        assert 10 < len(line) < 1500, line
    line.encode()
    return False


@contextlib.contextmanager
def _no_hang():
    def interrupt(*_):
        raise AssertionError(f"no end after {_HANG_SECONDS} s")

    former = signal.signal(signal.SIGALRM, interrupt)
    # Again and again, since an exception within a callback of the garbage collector goes no further.
    signal.setitimer(signal.ITIMER_REAL, _HANG_SECONDS, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


def written(folder):
    """All that is in a folder, to see that nothing came to it."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}

"""A number of training steps, or a fraction of the run, as in transformers."""

from typing import Annotated

from pydantic import AfterValidator, Field, Strict

LARGEST = 2**31 - 1  # the largest integer that every library accepts


def _whole_or_fraction(steps: float) -> float:
    if steps < 1 and steps != int(steps):
        return steps
    if steps != int(steps):
        raise ValueError("must be a whole number of steps, or a fraction of the run below 1")
    return int(steps)


_Whole = AfterValidator(_whole_or_fraction)
Steps = Annotated[float, Field(ge=0, le=LARGEST), _Whole]
PositiveSteps = Annotated[float, Strict(), Field(gt=0, le=LARGEST), _Whole]

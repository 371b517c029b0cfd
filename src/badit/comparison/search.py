"""The search for a method's learning rate: the same ladder, start and rule for every method."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence


def climb(ladder: Sequence[float], start: float, loss_of: Callable[[float], float]) -> tuple[float, dict[float, float]]:
    """Walks a ladder of learning rates downhill in loss, until both neighbours of the best one are worse.

    The loss is taken to have a single valley, so a rate above one that is worse than its lower neighbour need not be
    tried. That costs three trainings where the start is right already, or one rung too high.

    Args:
        ladder: rates in ascending order.
        start: the rung to begin at.
        loss_of: trains and measures; not finite (diverged, failed) counts as worst.

    Returns:
        The best rate and the loss of every rate that was tried. Equal losses go to the rate that was tried first.
    """
    here = ladder.index(start)
    losses: dict[int, float] = {}

    def measure(rung: int) -> None:
        if 0 <= rung < len(ladder) and rung not in losses:
            loss = loss_of(ladder[rung])
            losses[rung] = loss if math.isfinite(loss) else math.inf

    measure(here)
    while True:
        measure(here - 1)
        if losses.get(here - 1, math.inf) >= losses[here]:
            measure(here + 1)
        best = min(losses, key=losses.__getitem__)
        if best == here:
            return ladder[here], {ladder[rung]: loss for rung, loss in losses.items()}
        here = best

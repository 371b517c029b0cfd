"""The search of a method's learning rate."""

import math
from collections.abc import Callable, Sequence


def find_rate(
    ladder: Sequence[float], start: float, loss_of: Callable[[float], float], level: float = 0.0
) -> float:
    """Searches an ascending list of rates for the lowest loss.

    The search ends when both neighbours of the best rate are worse. The loss is assumed to have a
    single minimum: a higher rate is not tried if the next lower one is better. A non-finite loss (a
    diverged or failed run) counts as the worst.

    Returns the lowest of the rates whose losses are less than ``level`` above the best loss,
    because a rate that is too high costs more than one that is too low.
    """
    best = ladder.index(start)
    losses: dict[int, float] = {}

    def loss_at(index: int) -> float:
        is_on_ladder = 0 <= index < len(ladder)
        if is_on_ladder and index not in losses:
            loss = loss_of(ladder[index])
            losses[index] = loss if math.isfinite(loss) else math.inf
        return losses.get(index, math.inf)

    while True:
        # The lower neighbour comes first: if it is better, the higher one is not trained.
        lower_is_better = loss_at(best) > loss_at(best - 1)
        all_failed = min(losses.values()) == math.inf
        # If all losses are infinite, the rates were probably too high.
        if lower_is_better or (best and all_failed):
            best -= 1
        elif loss_at(best) > loss_at(best + 1):
            best += 1
        else:
            break
    level_rates = [index for index, loss in losses.items() if loss < losses[best] + level]
    # The list is empty with level 0, and if all runs failed.
    return ladder[min([*level_rates, best])]

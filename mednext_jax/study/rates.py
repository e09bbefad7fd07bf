"""Learning rates of an arm: a grid that starts small and grows while its best rate lies at an edge.

A trial is a whole number k and stands for ``centre * factor ** k``. Scores that are not numbers (a run that diverged,
a region that was never there) lose against any number.
"""

import math
from collections.abc import Mapping

Scores = Mapping[int, float]


def rate(centre: float, factor: float, trial: int) -> float:
    """The learning rate of a trial, to two significant digits, so that files and tables show what was used."""
    return float(f"{centre * factor**trial:.2g}")


def wanted(scores: Scores, trials: int, max_trials: int, tolerance: float = 0.0) -> list[int]:
    """Trials to run next: the first grid, then one beyond the edge that holds the chosen one; [] once that is settled.

    A rate beyond which nothing is better by more than the tolerance is not at an edge: towards small rates every arm
    comes ever nearer to the network that it started from.

    Args:
      scores: of the trials that were run.
      trials: size of the first grid, the same for every arm.
      max_trials: where growing ends.
      tolerance: as in :func:`chosen`.
    """
    first = [k - trials // 2 for k in range(trials)]
    missing = [k for k in first if k not in scores]
    if missing:
        return missing
    if len(scores) >= max_trials:
        return []
    best = chosen(scores, tolerance)
    return [k for k in (best - 1, best + 1) if k not in scores][:1]


def chosen(scores: Scores, tolerance: float = 0.0) -> int:
    """The trial with the highest score, or one that is as good: within ``tolerance`` of it and nearest to the centre.

    Scores of a few validation cases differ in their third digit from one processor to the next; which of two equal
    rates is taken should not.

    Raises: ValueError if no trial has a score.
    """
    known = {k: score for k, score in scores.items() if not math.isnan(score)}
    if not known:
        raise ValueError("no learning rate gave a score: lower the recipe's own rate")
    best = min(known, key=lambda k: (-known[k], k))
    as_good = [k for k, score in known.items() if score >= known[best] - tolerance]
    return min(as_good, key=lambda k: (abs(k), k)) if tolerance else best


def is_interior(scores: Scores, tolerance: float = 0.0) -> bool:
    """Whether the chosen trial has a neighbour on both sides that is no better, or not by more than the tolerance."""
    best = chosen(scores, tolerance)
    return best - 1 in scores and best + 1 in scores

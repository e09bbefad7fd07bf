"""Whether a study, done again, says the same: every mean within the 95% interval that was published."""

import math
from collections.abc import Mapping
from typing import Any

SLACK = 1e-6
SLACK_WITHOUT_WIDTH = 1e-3  # of an interval such as that of a change that was exactly none

Estimates = Mapping[str, Mapping[str, Any]]  # name -> mean, low, high as in results.json, None if undefined


def disagreements(published: Estimates, found: Estimates) -> list[str]:
    """One line for every published estimate that the new study puts outside the published interval.

    An estimate without an interval (a single case) must be the same to a hundredth of its value.
    """
    lines = []
    for name, estimate in published.items():
        mean, low, high = (_number(estimate[part]) for part in ("mean", "low", "high"))
        new = _number(found[name]["mean"])
        if math.isnan(low):
            low, high = mean - abs(mean) / 100, mean + abs(mean) / 100
        slack = SLACK if high > low else SLACK_WITHOUT_WIDTH
        if math.isnan(mean) != math.isnan(new) or new < low - slack or new > high + slack:
            lines.append(f"{name}: {new:.4g}, published {mean:.4g} [{low:.4g}, {high:.4g}]")
    return lines


def _number(value: float | None) -> float:
    return math.nan if value is None else value

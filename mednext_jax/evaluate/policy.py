"""What an absent region counts for: one named policy, written into every table that uses it.

A region can be absent in the truth, in the prediction, or in both; several metrics are then undefined, and
silently dropping them rewards a model for finding nothing. The metric functions return NaN or infinity; a
policy turns that into the number that enters tables and means. NaN that remains is left out and counted.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType

from mednext_jax.evaluate.lesionwise import PENALTY_MM

_PENALTY = f"{PENALTY_MM:g} mm"
POLICIES: Mapping[str, str] = MappingProxyType(
    {
        "penalise": "Absent in truth and prediction: undefined (nan), left out of means and counted. "
        f"Absent in one of them: Dice, IoU and NSD are 0, every distance is {_PENALTY}. "
        "Sensitivity needs a true, precision a predicted region.",
        "undefined": "Absent in truth and prediction: undefined (nan). Absent in one of them: Dice, IoU and "
        "NSD are 0, distances are undefined (nan) and left out of means, so that a missed region does not "
        "show in them.",
        "brats2023": "As the official BraTS 2023 tables. Absent in truth and prediction: Dice, IoU, NSD, "
        "sensitivity and precision are 1, distances 0 mm. Absent in one of them: Dice, IoU, NSD, sensitivity "
        f"and precision are 0, distances {_PENALTY}.",
    }
)
LESIONWISE_NOTE = (
    "Lesion-wise Dice and HD95 always follow the official rule: with nothing to score they are 1 and 0 mm; "
    f"a missed lesion and a false positive count 0 and {_PENALTY}."
)


def resolve(metric: str, value: float, policy: str) -> float:
    """The value that enters tables.

    Args:
      metric: a name of `measure.METRICS`, without regard to lesion-wise ones (they resolve themselves).
      value: what the metric function returned; NaN means undefined, infinity that one mask was empty.
      policy: a key of POLICIES.
    """
    if policy not in POLICIES:
        raise ValueError(f"unknown policy {policy!r} for absent regions: choose from {', '.join(POLICIES)}")
    if math.isinf(value):
        return math.nan if policy == "undefined" else PENALTY_MM
    return value


def resolve_region(values: Mapping[str, float], absent: tuple[bool, bool], policy: str) -> dict[str, float]:
    """Applies the policy to all values of one region of one case.

    Args:
      values: metric name to raw value.
      absent: whether the region is absent in the prediction and in the truth.
      policy: a key of POLICIES.
    """
    resolved = {name: resolve(name, value, policy) for name, value in values.items()}
    if policy != "brats2023" or not any(absent):
        return resolved
    for name, value in resolved.items():
        if math.isnan(value):
            distance = name.endswith("_mm")
            resolved[name] = (0.0 if distance else 1.0) if all(absent) else (PENALTY_MM if distance else 0.0)
    return resolved

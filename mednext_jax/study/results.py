"""What a study's evaluations say: scores per arm, differences between arms, and what each fault explains."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mednext_jax.evaluate import statistics
from mednext_jax.evaluate.tables import MEAN_REGION, SEED_MARK, Table

HEADLINE = (
    ("WT", "dice"), ("TC", "dice"), ("ET", "dice"), (MEAN_REGION, "dice"), (MEAN_REGION, "sensitivity"),
    (MEAN_REGION, "specificity"), (MEAN_REGION, "precision"), (MEAN_REGION, "lesionwise_dice"),
    (MEAN_REGION, "lesionwise_hd95_mm"),
)  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """A mean over cases and repetitions with its 95% bootstrap interval over both; NaN where undefined."""

    mean: float
    low: float
    high: float
    cases: int
    seeds: int


def estimate(values: np.ndarray) -> Estimate:
    """Of (seeds, cases) values."""
    found = statistics.describe(values)
    return Estimate(found.mean, found.low, found.high, found.n, found.n_seeds)


def scores(table: Table, arm: str) -> dict[str, Estimate]:
    """The paper's columns and lesion-wise ones: {"WT dice": ..., "mean sensitivity": ...}."""
    known = [(region, metric) for region, metric in HEADLINE
             if metric in table.metrics and region in (*table.regions, MEAN_REGION)]
    return {f"{region} {metric}": estimate(table.matrix(arm, region, metric)) for region, metric in known}


def mean_dice(table: Table, arm: str, seeds: Sequence[str] | None = None) -> np.ndarray:
    """(seeds, cases) mean Dice over the regions; of these seeds only, in their order.

    Raises: ValueError if the arm lacks one of the seeds.
    """
    values = table.matrix(arm, MEAN_REGION, "dice")
    if seeds is None:
        return values
    known = table.seeds(arm)
    if missing := [seed for seed in seeds if seed not in known]:
        raise ValueError(f"arm {arm!r} has no repetition {', '.join(missing)}; it has {', '.join(known)}")
    return values[[known.index(seed) for seed in seeds]]


def difference(first: np.ndarray, second: np.ndarray) -> Estimate:
    """first - second, paired by repetition and case; (seeds, cases) each."""
    return estimate(first - second)


def apart(first: np.ndarray, second: np.ndarray) -> Estimate:
    """mean(first) - mean(second) of unpaired (seeds, cases) values, as of two cohorts."""
    sides = [statistics.resampled_means(v, (0, 2 * i), (0, 2 * i + 1), statistics.RESAMPLES)
             for i, v in ((1, first), (2, second))]
    low, high = statistics.interval(sides[0] - sides[1])
    mean = float(np.nanmean(first) - np.nanmean(second))
    return Estimate(mean, low, high, min(first.shape[1], second.shape[1]), min(len(first), len(second)))


@dataclass(frozen=True)
class Setting:
    """Where the four numbers of the paper's argument stand: (table, arm) of each.

    ``source`` and ``zero_shot`` are the network without adaptation on the source's and the target's test cases;
    ``full`` and ``adapter`` are adapted to the target.
    """

    source: tuple[Table, str]
    zero_shot: tuple[Table, str]
    full: tuple[Table, str]
    adapter: tuple[Table, str]


@dataclass(frozen=True)
class Effect:
    """What a fault does to the paper's two claims.

    Attributes:
      drop: source - zero-shot with the fault.
      drop_change: that minus the same without the fault.
      share_of_drop: drop_change / drop, the part of the drop that the fault makes; NaN without a drop.
      full, adapter: mean Dice with the fault.
      gap: adapter - full with the fault.
      gap_change: that minus the same without the fault.
    """

    fault: str
    drop: Estimate
    drop_change: Estimate
    share_of_drop: float
    full: Estimate
    adapter: Estimate
    gap: Estimate
    gap_change: Estimate


def effect(fault: str, faulty: Setting, clean: Setting) -> Effect:
    """Compares a study with one fault to the study without, over the repetitions and cases that both have.

    Raises: ValueError if the two were tested on different cases.
    """
    pairs = {name: _paired(getattr(faulty, name), getattr(clean, name)) for name in ("source", "zero_shot")}
    drop = apart(pairs["source"][0], pairs["zero_shot"][0])
    drop_change = apart(pairs["source"][0] - pairs["source"][1], pairs["zero_shot"][0] - pairs["zero_shot"][1])
    share = drop_change.mean / drop.mean if drop.mean > 0 else math.nan
    full, clean_full = _paired(faulty.full, clean.full)
    adapter, clean_adapter = _paired(faulty.adapter, clean.adapter)
    rows = min(len(full), len(adapter))
    full, clean_full, adapter, clean_adapter = (v[:rows] for v in (full, clean_full, adapter, clean_adapter))
    return Effect(
        fault, drop, drop_change, share, estimate(full), estimate(adapter), difference(adapter, full),
        difference(adapter - full, clean_adapter - clean_full),
    )  # fmt: skip


def _paired(first: tuple[Table, str], second: tuple[Table, str]) -> tuple[np.ndarray, np.ndarray]:
    """Mean Dice of both over the seeds that both have."""
    (table, arm), (other_table, other_arm) = first, second
    if table.cases(arm) != other_table.cases(other_arm):
        raise ValueError(f"{arm} and {other_arm} were tested on different cases")
    shared = [seed for seed in table.seeds(arm) if seed in other_table.seeds(other_arm)]
    if not shared:
        raise ValueError(f"{arm} and {other_arm} share no repetition ({SEED_MARK}...)")
    return mean_dice(table, arm, shared), mean_dice(other_table, other_arm, shared)


def few_shot(tables: Mapping[int, Table], arms: Mapping[int, Mapping[str, str]]) -> dict[str, dict[int, Estimate]]:
    """The curve of every arm over the number of training cases.

    Args:
      tables: size -> table with its runs.
      arms: size -> arm -> its name in that table.
    """
    curve: dict[str, dict[int, Estimate]] = {}
    for size in sorted(tables):
        for arm, name in arms[size].items():
            curve.setdefault(arm, {})[size] = estimate(mean_dice(tables[size], name))
    return curve


def as_number(value: Any) -> Any:
    """NaN as None, for JSON."""
    return None if isinstance(value, float) and math.isnan(value) else value

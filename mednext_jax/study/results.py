"""What a study's evaluations say: scores per arm, differences between arms, and what each fault explains."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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


def estimate(values: np.ndarray, levels: statistics.Levels | None = None) -> Estimate:
    """Of (seeds, cases) values; ``levels`` of the seeds, if they are crossed."""
    found = statistics.describe(values, levels=levels)
    return Estimate(found.mean, found.low, found.high, found.n, found.n_seeds)


def scores(table: Table, arm: str, levels: statistics.Levels | None = None) -> dict[str, Estimate]:
    """The paper's columns and lesion-wise ones: {"WT dice": ..., "mean sensitivity": ...}."""
    known = [(region, metric) for region, metric in HEADLINE
             if metric in table.metrics and region in (*table.regions, MEAN_REGION)]
    return {f"{region} {metric}": estimate(table.matrix(arm, region, metric), levels) for region, metric in known}


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


@dataclass(frozen=True)
class Difference:
    """first - second in mean Dice, paired by repetition and case.

    Attributes:
      estimate: with its bootstrap interval over repetitions and cases.
      wins, ties, losses: cases, averaged over repetitions, in which the first is better, equal, worse.
      p, p_holm: Wilcoxon signed-rank over those cases, and corrected for all differences of the list.
    """

    first: str
    second: str
    estimate: Estimate
    wins: int
    ties: int
    losses: int
    p: float
    p_holm: float


def differences(
    pairs: Mapping[tuple[str, str], tuple[np.ndarray, np.ndarray]], levels: statistics.Levels | None = None
) -> list[Difference]:
    """Compares pairs of arms; together they are one Holm family.

    Args:
      pairs: (first, second) -> (repetitions, cases) values of both, row by row of the same repetition.
      levels: of the repetitions, if their seeds are crossed.
    """
    found = {names: statistics.compare(*values, paired_seeds=True, levels=levels) for names, values in pairs.items()}
    adjusted = statistics.holm([c.p for c in found.values()])
    return [
        Difference(*names, Estimate(c.mean_difference, c.low, c.high, c.n, c.n_seeds[0]), c.wins, c.ties, c.losses,
                   c.p, p)
        for (names, c), p in zip(found.items(), adjusted, strict=True)
    ]  # fmt: skip


def difference(first: np.ndarray, second: np.ndarray) -> Estimate:
    """first - second, paired by repetition and case; (seeds, cases) each."""
    return estimate(first - second)


def apart(first: np.ndarray, second: np.ndarray) -> Estimate:
    """mean(first) - mean(second) of two cohorts' (seeds, cases) values: the same networks, other cases."""
    resampled = _resampled(first, 1) - _resampled(second, 2)
    return Estimate(float(np.nanmean(first) - np.nanmean(second)), *statistics.interval(resampled),
                    min(first.shape[1], second.shape[1]), len(first))  # fmt: skip


def _resampled(values: np.ndarray, cohort: int) -> np.ndarray:
    """Resampled means of (seeds, cases) values: all draw the same seeds, those of a cohort the same cases too."""
    return statistics.resampled_means(values, (0, 0), (0, cohort), statistics.RESAMPLES)


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
      share_of_drop: drop_change / drop, the part of the drop that the fault makes; NaN if a resample has no drop.
      full, adapter: mean Dice with the fault.
      gap: adapter - full with the fault.
      gap_change: that minus the same without the fault.
    """

    fault: str
    drop: Estimate
    drop_change: Estimate
    share_of_drop: Estimate
    full: Estimate
    adapter: Estimate
    gap: Estimate
    gap_change: Estimate


def effect(fault: str, faulty: Setting, clean: Setting) -> Effect:
    """Compares a study with one fault to the study without, over the repetitions and cases that both have.

    Raises: ValueError if the two were tested on different cases, or share no repetition.
    """
    source, zero_shot = _paired(fault, faulty, clean, ("source", "zero_shot"))
    drop, drop_change, share = _drops(source, zero_shot)
    (full, clean_full), (adapter, clean_adapter) = _paired(fault, faulty, clean, ("full", "adapter"))
    return Effect(
        fault, drop, drop_change, share, estimate(full), estimate(adapter), difference(adapter, full),
        difference(adapter - full, clean_adapter - clean_full),
    )  # fmt: skip


def _drops(source: Sequence[np.ndarray], zero_shot: Sequence[np.ndarray]) -> tuple[Estimate, Estimate, Estimate]:
    """Drop with the fault, its change by the fault, and that change's share of it; arguments are (faulty, clean)."""
    means = [float(np.nanmean(source[i]) - np.nanmean(zero_shot[i])) for i in (0, 1)]
    resampled = [_resampled(source[i], 1) - _resampled(zero_shot[i], 2) for i in (0, 1)]
    counts = min(source[0].shape[1], zero_shot[0].shape[1]), len(source[0])
    known = means[0] > 0 and (resampled[0] > 0).all()
    changes, change = resampled[0] - resampled[1], means[0] - means[1]
    share = (change / means[0], *statistics.interval(changes / resampled[0])) if known else (math.nan,) * 3
    return (Estimate(means[0], *statistics.interval(resampled[0]), *counts),
            Estimate(change, *statistics.interval(changes), *counts), Estimate(*share, *counts))


def _paired(fault: str, faulty: Setting, clean: Setting, names: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Mean Dice (with the fault, without it) of each name, over the seeds that all of them have.

    What a fault leaves as it is may have been repeated more often than what it changes.
    """
    pairs = [(getattr(faulty, name), getattr(clean, name)) for name in names]
    for (table, arm), (other_table, other_arm) in pairs:
        if table.cases(arm) != other_table.cases(other_arm):
            raise ValueError(f"{arm} and {other_arm} were tested on different cases")
    every = [table.seeds(arm) for pair in pairs for table, arm in pair]
    shared = [seed for seed in every[0] if all(seed in seeds for seeds in every)]
    if not shared:
        raise ValueError(f"{fault}: {' and '.join(names)} share no repetition ({SEED_MARK}...)")
    return [tuple(mean_dice(table, arm, shared) for table, arm in pair) for pair in pairs]


def few_shot(
    tables: Mapping[int, Table],
    arms: Mapping[int, Mapping[str, str]],
    levels: Mapping[int, statistics.Levels | None],
) -> dict[str, dict[int, Estimate]]:
    """The curve of every arm over the number of training cases.

    Args:
      tables: size -> table with its runs.
      arms: size -> arm -> its name in that table.
      levels: size -> those of its seeds, None where they are not crossed.
    """
    curve: dict[str, dict[int, Estimate]] = {}
    for size in sorted(tables):
        for arm, name in arms[size].items():
            curve.setdefault(arm, {})[size] = estimate(mean_dice(tables[size], name), levels[size])
    return curve

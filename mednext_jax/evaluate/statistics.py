"""Statistics for few cases and few seeds: means with bootstrap intervals, paired comparisons, n everywhere.

Undefined values (NaN) are left out and counted. Intervals are percentile bootstrap intervals with a fixed
seed. No result is called significant here: a p-value comes with its interval, its n, and the smallest p that
this many pairs can give at all.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import stats

RESAMPLES = 5000
TIE = 1e-9  # differences up to this count as equal
MOST_EXACT = 50  # differences; the number of their sign patterns is still a whole float64
NAN = float("nan")

Levels = Sequence[Sequence[Hashable]]
"""What each seed (row) shares with others, one entry per factor: ((subset, initial weights), ...)."""


@dataclass(frozen=True)
class Description:
    """One metric over cases. `low` and `high`: 95% bootstrap interval of the mean, over seeds too."""

    n: int
    n_undefined: int
    n_seeds: int
    mean: float
    sd: float
    median: float
    q25: float
    q75: float
    minimum: float
    maximum: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """Paired comparison of two arms over the cases in which both are defined; differences are first - second.

    Attributes:
      n, n_seeds: cases, and seeds of the first and second arm.
      mean_difference, low, high: with its 95% bootstrap interval over cases and seeds.
      median_difference: of the cases.
      p: two-sided Wilcoxon signed-rank test over cases (seeds averaged); 1 if nothing differs.
      p_floor: the smallest p that n untied pairs can reach, 2 ** (1 - n).
      effect: matched-pairs rank-biserial correlation, -1 to 1; positive if the first arm's values are larger.
      wins, ties, losses: cases in which the first arm is better, equal, worse.
      p_holm: p corrected for all tests of its family; NaN until `with_holm`.
    """

    n: int
    n_seeds: tuple[int, int]
    mean_difference: float
    low: float
    high: float
    median_difference: float
    p: float
    p_floor: float
    effect: float
    wins: int
    ties: int
    losses: int
    p_holm: float = NAN


def describe(
    values: np.ndarray, seed: int = 0, resamples: int = RESAMPLES, levels: Levels | None = None
) -> Description:
    """Describes (cases,) or (seeds, cases) values; a case's value is its mean over seeds.

    ``levels`` as in :func:`resampled_means`. A case undefined in every seed is left out. With one case or none, sd and
    interval are NaN.
    """
    values = np.atleast_2d(np.asarray(values, float))
    cases = mean(values, axis=0)
    kept = cases[~np.isnan(cases)]
    low, high = bootstrap_mean(values[:, ~np.isnan(cases)], seed, resamples, levels)
    quartiles = np.percentile(kept, (50, 25, 75, 0, 100)) if kept.size else [NAN] * 5
    return Description(
        n=kept.size,
        n_undefined=cases.size - kept.size,
        n_seeds=len(values),
        mean=float(kept.mean()) if kept.size else NAN,
        sd=float(kept.std(ddof=1)) if kept.size > 1 else NAN,
        median=float(quartiles[0]),
        q25=float(quartiles[1]),
        q75=float(quartiles[2]),
        minimum=float(quartiles[3]),
        maximum=float(quartiles[4]),
        low=low,
        high=high,
    )


def bootstrap_mean(
    values: np.ndarray, seed: int = 0, resamples: int = RESAMPLES, levels: Levels | None = None
) -> tuple[float, float]:
    """95% interval of the mean of (seeds, cases) values by a hierarchical bootstrap.

    Seeds and cases are crossed (every seed saw the same cases), so each resample draws seeds and cases
    independently, both with replacement. With one seed it is the ordinary bootstrap over cases.
    ``levels`` as in :func:`resampled_means`.

    Returns:
      (low, high); (NaN, NaN) for fewer than two cases.
    """
    values = np.atleast_2d(np.asarray(values, float))
    if values.shape[1] < 2:
        return NAN, NAN
    return interval(resampled_means(values, (seed, 1), seed, resamples, levels))


def compare(
    first: np.ndarray,
    second: np.ndarray,
    higher_is_better: bool = True,
    seed: int = 0,
    resamples: int = RESAMPLES,
    paired_seeds: bool = False,
    levels: Levels | None = None,
) -> Comparison:
    """Compares (cases,) or (seeds, cases) values of two arms; column i of both is the same case.

    The arms may have different numbers of seeds. With ``paired_seeds``, row i of both is the same repetition (the
    same training cases, say), and every resample draws the same repetitions for both; ``levels`` are those of both,
    as in :func:`resampled_means`.
    """
    first, second = (np.atleast_2d(np.asarray(v, float)) for v in (first, second))
    if first.shape[1] != second.shape[1]:
        counts = f"{first.shape[1]} and {second.shape[1]}"
        raise ValueError(f"arms have {counts} cases: pass the shared ones, in one order")
    difference = mean(first, axis=0) - mean(second, axis=0)
    both = ~np.isnan(difference)
    difference = difference[both]
    difference[np.abs(difference) <= TIE] = 0.0
    low = high = NAN
    if both.sum() > 1:  # every resample draws the same cases for both arms, and each arm's own seeds
        keys = (1, 1 if paired_seeds else 2)
        sides = [
            resampled_means(v[:, both], (seed, i), seed, resamples, levels)
            for i, v in zip(keys, (first, second), strict=True)
        ]
        low, high = interval(sides[0] - sides[1])
    better = difference if higher_is_better else -difference
    n = difference.size
    return Comparison(
        n=n,
        n_seeds=(len(first), len(second)),
        mean_difference=float(difference.mean()) if n else NAN,
        low=low,
        high=high,
        median_difference=float(np.median(difference)) if n else NAN,
        p=wilcoxon(difference),
        p_floor=min(1.0, 2.0 ** (1 - n)) if n else NAN,
        effect=rank_biserial(difference),
        wins=int((better > 0).sum()),
        ties=int((better == 0).sum()),
        losses=int((better < 0).sum()),
    )


def wilcoxon(difference: np.ndarray) -> float:
    """Two-sided p of the signed-rank test, exact for up to :data:`MOST_EXACT` differences, ties included.

    Zeros are left out; 1 if nothing is left, NaN without pairs.
    """
    difference = np.asarray(difference, float)
    nonzero = difference[difference != 0]
    if not nonzero.size:
        return 1.0 if difference.size else NAN
    if nonzero.size > MOST_EXACT:
        return float(stats.wilcoxon(nonzero, method="asymptotic").pvalue)
    # Under the null hypothesis every sign is a coin: count the sign patterns by their sum of positive ranks. SciPy's
    # exact method knows ranks without ties alone, and its approximation undercuts the smallest p that there can be.
    doubled = np.rint(2 * stats.rankdata(np.abs(nonzero))).astype(int)  # tied ranks are halves
    patterns = np.ones(1)
    for rank in doubled:
        patterns = np.pad(patterns, (0, rank)) + np.pad(patterns, (rank, 0))
    seen = doubled[nonzero > 0].sum()
    smaller_side = min(patterns[: seen + 1].sum(), patterns[seen:].sum())
    return float(min(1.0, 2 * smaller_side / 2.0**nonzero.size))


def rank_biserial(difference: np.ndarray) -> float:
    """(sum of positive ranks - sum of negative ranks) / sum of ranks of the absolute non-zero differences."""
    nonzero = np.asarray(difference, float)
    if not nonzero.size:
        return NAN
    nonzero = nonzero[nonzero != 0]
    if not nonzero.size:
        return 0.0
    ranks = stats.rankdata(np.abs(nonzero))
    return float((ranks * np.sign(nonzero)).sum() / ranks.sum())


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction; NaN (no test) stays NaN and does not count."""
    p = np.asarray(p_values, float)
    adjusted = np.full(p.shape, NAN)
    order = [i for i in np.argsort(p) if not math.isnan(p[i])]
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p[i]))
        adjusted[i] = largest
    return adjusted.tolist()


def resampled_means(
    values: np.ndarray,
    seed_key: tuple[int, ...],
    case_key: int | tuple[int, ...],
    resamples: int,
    levels: Levels | None = None,
) -> np.ndarray:
    """(resamples,) means of (seeds, cases) values, drawn as counts of how often each seed and case came.

    Args:
      levels: of every seed, if seeds cross several factors (each training subset with each set of initial weights,
        say). The levels of each factor are then drawn, and a seed comes as often as the product of its levels' counts:
        drawn by themselves, fifteen seeds of five subsets would pass for fifteen subsets. None: no two seeds share
        anything.
    """
    seeds = _draws(len(values), seed_key, resamples) if levels is None else _crossed(levels, seed_key, resamples)
    cases = _draws(values.shape[1], case_key, resamples)
    defined = ~np.isnan(values)
    total = ((np.where(defined, values, 0.0) @ cases) * seeds).sum(axis=0)
    if defined.all() and levels is None:
        return total / values.size
    count = ((defined.astype(float) @ cases) * seeds).sum(axis=0)
    return np.divide(total, count, out=np.full(resamples, NAN), where=count > 0)


@lru_cache(maxsize=64)
def _draws(n: int, key, resamples: int) -> np.ndarray:
    """(n, resamples) how often each of n things is drawn in n draws with replacement; seeded by `key`."""
    draws = np.random.default_rng(key).multinomial(n, np.full(n, 1 / max(n, 1)), size=resamples)
    return np.ascontiguousarray(draws.T, float)


def _crossed(levels: Levels, key: tuple[int, ...], resamples: int) -> np.ndarray:
    """(seeds, resamples) how often each seed comes if the levels of its factors are drawn."""
    counts = np.ones((len(levels), resamples))
    for number, factor in enumerate(zip(*levels, strict=True)):
        known = list(dict.fromkeys(factor))
        drawn = _draws(len(known), (*key, number), resamples)
        counts *= drawn[[known.index(level) for level in factor]]
    return counts


def interval(means: np.ndarray) -> tuple[float, float]:
    """95% percentile interval of resampled means; (NaN, NaN) if none is defined."""
    means = means[~np.isnan(means)]
    if not means.size:
        return NAN, NAN
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def mean(values: np.ndarray, axis) -> np.ndarray:
    """Mean over the defined values; NaN (without a warning) where there is none."""
    defined = ~np.isnan(values)
    count = defined.sum(axis=axis)
    total = np.where(defined, values, 0.0).sum(axis=axis)
    return np.divide(total, count, out=np.full(np.shape(total), NAN), where=count > 0)

"""Statistics against hand sums and scipy."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from mednext_jax.evaluate import statistics


def test_description_leaves_undefined_values_out_and_counts_them():
    found = statistics.describe(np.array([0.2, math.nan, 0.4, 0.9]))
    assert (found.n, found.n_undefined, found.n_seeds) == (3, 1, 1)
    assert found.mean == pytest.approx((0.2 + 0.4 + 0.9) / 3) and found.median == 0.4
    assert found.minimum == 0.2 and found.maximum == 0.9


def test_description_of_one_case_has_no_spread_and_of_none_no_value():
    one, none = statistics.describe(np.array([0.5])), statistics.describe(np.array([math.nan]))
    assert one.mean == 0.5 and math.isnan(one.low) and math.isnan(one.sd)
    assert none.n == 0 and none.n_undefined == 1 and math.isnan(none.mean)


def test_bootstrap_interval_agrees_with_scipys():
    values = np.random.default_rng(3).gamma(2.0, 1.0, 40)
    low, high = statistics.bootstrap_mean(values, seed=1, resamples=20000)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=20000, method="percentile", rng=2)
    theirs = theirs.confidence_interval
    assert low == pytest.approx(theirs.low, abs=0.02) and high == pytest.approx(theirs.high, abs=0.02)


def test_bootstrap_is_the_same_for_a_seed_and_another_for_another():
    values = np.random.default_rng(0).random(12)
    assert statistics.bootstrap_mean(values, 5) == statistics.bootstrap_mean(values, 5)
    assert statistics.bootstrap_mean(values, 5) != statistics.bootstrap_mean(values, 6)


def test_interval_over_seeds_is_wider_when_seeds_differ():
    cases = np.random.default_rng(0).random(30)
    steady = np.stack([cases, cases, cases])
    moving = np.stack([cases - 0.3, cases, cases + 0.3])
    assert np.ptp(statistics.bootstrap_mean(moving)) > 1.5 * np.ptp(statistics.bootstrap_mean(steady))
    np.testing.assert_allclose(
        statistics.bootstrap_mean(steady), statistics.bootstrap_mean(cases), atol=0.02
    )  # seeds that agree add nothing


CROSSED = [(subset, init) for init in range(3) for subset in range(5)]


def test_seeds_that_differ_by_their_subset_alone_have_the_interval_of_the_subsets():
    cases, of_subset = 0.3 * np.random.default_rng(1).random(20), np.array([-0.3, -0.1, 0.0, 0.15, 0.25])
    rows = np.stack([cases + of_subset[subset] for subset, _ in CROSSED])
    once = np.stack([cases + of_subset[subset] for subset in range(5)])
    np.testing.assert_allclose(
        statistics.bootstrap_mean(rows, levels=CROSSED), statistics.bootstrap_mean(once), atol=0.015
    )
    assert np.ptp(statistics.bootstrap_mean(rows, levels=CROSSED)) > 1.3 * np.ptp(statistics.bootstrap_mean(rows))
    paired = statistics.compare(rows, np.zeros_like(rows), paired_seeds=True, levels=CROSSED)
    assert (paired.low, paired.high) == statistics.bootstrap_mean(rows, levels=CROSSED)


def test_crossed_seeds_with_an_undefined_value_are_weighted_by_hand():
    values = np.array([[0.2, 0.8], [0.4, np.nan]])  # both of one subset, with other initial weights
    found = statistics.resampled_means(values, (0, 1), 0, 50, [("a", 0), ("a", 1)])
    inits = statistics._draws(2, (0, 1, 1), 50)
    cases = statistics._draws(2, 0, 50)
    for i, mean in enumerate(found):
        weights = np.outer(inits[:, i], cases[:, i]) * ~np.isnan(values)
        expected = np.nansum(weights * np.nan_to_num(values)) / weights.sum() if weights.sum() else np.nan
        assert mean == pytest.approx(expected, nan_ok=True)


def test_intervals_over_crossed_seeds_hold_the_truth_about_as_often_as_they_should():
    rng, hits, as_if_fifteen = np.random.default_rng(0), 0, 0
    for _ in range(150):  # studies of an effect that is zero: 5 subsets, 3 sets of initial weights, 20 cases
        subsets, inits = rng.normal(0, 0.02, 5), rng.normal(0, 0.01, 3)
        rows = np.stack([subsets[s] + inits[i] + rng.normal(0, 0.02, 20) for s, i in CROSSED])
        low, high = statistics.bootstrap_mean(rows, resamples=500, levels=CROSSED)
        hits += low <= 0 <= high
        low, high = statistics.bootstrap_mean(rows, resamples=500)
        as_if_fifteen += low <= 0 <= high
    assert hits >= 0.82 * 150 and as_if_fifteen < hits - 10  # few levels are too few for 95 %


def test_comparison_counts_wins_by_the_direction_of_the_metric():
    first, second = np.array([0.5, 0.7, 0.9, 0.4]), np.array([0.4, 0.7, 0.5, 0.6])
    up, down = statistics.compare(first, second), statistics.compare(first, second, higher_is_better=False)
    assert (up.wins, up.ties, up.losses) == (2, 1, 1)
    assert (down.wins, down.ties, down.losses) == (1, 1, 2)
    assert up.mean_difference == down.mean_difference == pytest.approx((0.1 + 0 + 0.4 - 0.2) / 4)
    assert up.effect == pytest.approx((1 + 3 - 2) / (1 + 2 + 3))


def test_comparison_uses_only_cases_defined_in_both():
    found = statistics.compare(np.array([0.5, math.nan, 0.9]), np.array([0.4, 0.7, math.nan]))
    assert found.n == 1 and found.mean_difference == pytest.approx(0.1) and found.p_floor == 1
    assert math.isnan(found.low)


def test_comparison_over_seeds_averages_them_per_case():
    first = np.array([[0.5, 0.7], [0.7, 0.9]])
    second = np.array([[0.4, 0.9]])
    found = statistics.compare(first, second)
    assert found.n == 2 and found.n_seeds == (2, 1)
    assert found.mean_difference == pytest.approx((0.6 - 0.4 + 0.8 - 0.9) / 2)


def test_comparison_refuses_different_cases():
    with pytest.raises(ValueError, match="3 and 4 cases"):
        statistics.compare(np.zeros(3), np.zeros(4))


def test_wilcoxon_of_five_equal_signs_is_its_floor():
    difference = np.array([0.1, 0.2, 0.3, 0.4, 0.5])
    assert statistics.wilcoxon(difference) == pytest.approx(2 / 2**5)
    assert statistics.compare(difference, np.zeros(5)).p_floor == 2 / 2**5


def test_wilcoxon_ignores_zeros_and_bears_ties_without_a_warning():
    assert statistics.wilcoxon(np.zeros(4)) == 1.0
    assert math.isnan(statistics.wilcoxon(np.array([])))
    assert statistics.wilcoxon(np.array([0.5, 0.5, 0.0, 0.5, 0.5])) == 2 / 2**4


@pytest.mark.parametrize(
    "difference",
    ([0.1, 0.1, -0.1, 0.2, 0.2, 0.0, 0.3], [1, 1, 1, 1, -1], [1, -2, 2, 3, 3, -3, 4, 1, 1], [0.3, -0.1, 0.2, 0.5]),
)
def test_wilcoxon_counts_the_sign_patterns_that_are_as_far_from_chance(difference):
    difference = np.array(difference)
    nonzero = difference[difference != 0]
    ranks = stats.rankdata(np.abs(nonzero))
    sums = [sum(ranks[i] for i, up in enumerate(signs) if up)
            for signs in itertools.product((True, False), repeat=len(ranks))]  # fmt: skip
    seen = ranks[nonzero > 0].sum()
    wanted = 2 * min(sum(s <= seen for s in sums), sum(s >= seen for s in sums)) / len(sums)
    assert statistics.wilcoxon(difference) == pytest.approx(min(1, wanted))
    if len(np.unique(np.abs(nonzero))) == len(nonzero):
        assert statistics.wilcoxon(difference) == pytest.approx(stats.wilcoxon(nonzero, method="exact").pvalue)


def test_wilcoxon_of_many_untied_differences_is_scipys():
    difference = np.random.default_rng(0).normal(0.2, 1, 50)
    assert statistics.wilcoxon(difference) == pytest.approx(stats.wilcoxon(difference, method="exact").pvalue)
    more = np.random.default_rng(0).normal(0.2, 1, 51)
    assert statistics.wilcoxon(more) == pytest.approx(stats.wilcoxon(more, method="asymptotic").pvalue)


def test_holm_correction_is_the_textbook_one():
    found = statistics.holm([0.01, 0.04, math.nan, 0.03])
    assert found == pytest.approx([0.03, 0.06, math.nan, 0.06], nan_ok=True)
    assert statistics.holm([0.6, 0.9]) == [1.0, 1.0]


def test_rank_biserial_is_one_if_all_differences_have_one_sign():
    assert statistics.rank_biserial(np.array([0.1, 0.5, 0.0])) == 1
    assert statistics.rank_biserial(np.array([-0.1, -0.5])) == -1
    assert statistics.rank_biserial(np.zeros(3)) == 0

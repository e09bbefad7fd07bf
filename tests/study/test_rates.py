"""Learning rates: the grid starts equal for all, grows at its edges, and ends where it was told to."""

import math

import pytest

from mednext_jax.study import rates


def search(score, trials=3, most=6):
    """Runs the search on a function of the trial; returns the trials in the order in which they were asked for."""
    scores, asked = {}, []
    while wanted := rates.wanted(scores, trials, most):
        asked += wanted
        scores |= {k: score(k) for k in wanted}
    return scores, asked


def test_every_search_begins_with_the_same_grid_around_the_centre():
    assert rates.wanted({}, 3, 6) == [-1, 0, 1]
    assert rates.wanted({0: 0.5}, 3, 6) == [-1, 1]
    assert rates.wanted({}, 4, 6) == [-2, -1, 0, 1]


def test_an_interior_optimum_ends_the_search_at_once():
    scores, asked = search(lambda k: -abs(k))
    assert asked == [-1, 0, 1] and rates.chosen(scores) == 0 and rates.is_interior(scores)


@pytest.mark.parametrize("peak", (-3, 3))
def test_the_grid_grows_towards_the_best_until_it_lies_inside(peak):
    scores, asked = search(lambda k: -abs(k - peak))
    assert rates.chosen(scores) == peak and rates.is_interior(scores)
    assert len(asked) == 3 + 3 and len(set(asked)) == len(asked)


def test_a_search_that_only_rises_ends_at_the_limit_and_says_that_it_is_at_the_edge():
    scores, _ = search(lambda k: float(k), most=5)
    assert len(scores) == 5 and rates.chosen(scores) == 3 and not rates.is_interior(scores)


def test_diverged_trials_lose_and_equal_ones_go_to_the_smaller_rate():
    assert rates.chosen({-1: 0.5, 0: 0.5, 1: math.nan}) == -1
    with pytest.raises(ValueError, match="no learning rate gave a score"):
        rates.chosen({0: math.nan})


def test_rates_are_rounded_as_they_are_written():
    assert [rates.rate(1e-3, 3.0, k) for k in (-1, 0, 1, 2)] == [0.00033, 0.001, 0.003, 0.009]


def test_of_rates_that_are_as_good_the_one_nearest_to_the_recipes_own_is_taken():
    assert rates.chosen({-1: 0.700, 0: 0.697, 1: 0.690}, 0.005) == 0
    assert rates.chosen({-1: 0.700, 0: 0.690, 1: 0.690}, 0.005) == -1
    assert rates.chosen({-2: 0.699, -1: 0.690, 0: 0.600, 1: 0.697, 2: 0.7}, 0.005) == 1
    assert rates.chosen({-1: 0.7, 0: math.nan, 1: 0.7}, 0.005) == -1


def test_a_grid_grows_until_nothing_beyond_the_chosen_rate_is_better_by_more_than_the_tolerance():
    slowly = {-1: 0.690, 0: 0.699, 1: 0.700}
    assert rates.wanted(slowly, 3, 6, 0.005) == [] and rates.is_interior(slowly, 0.005)
    assert rates.wanted(slowly, 3, 6) == [2] and not rates.is_interior(slowly)
    steeply = {-1: 0.680, 0: 0.690, 1: 0.700}
    assert rates.wanted(steeply, 3, 6, 0.005) == [2] and not rates.is_interior(steeply, 0.005)

    def towards_no_adaptation(k):  # what a rate that is divided by three again and again comes to
        return 0.7 - 0.06 * 3.0 ** min(k, 1)

    scores = {}
    while wanted := rates.wanted(scores, 3, 9, 0.005):
        scores |= {k: towards_no_adaptation(k) for k in wanted}
    assert sorted(scores) == [-3, -2, -1, 0, 1] and rates.chosen(scores, 0.005) == -2

"""A study done again agrees if it says the same within the published intervals."""

import math

from mednext_jax.study.agreement import disagreements

PUBLISHED = {
    "full": {"mean": 0.70, "low": 0.65, "high": 0.75},
    "no change": {"mean": 0.0, "low": 0.0, "high": 0.0},
    "single case": {"mean": 0.5, "low": None, "high": None},
    "undefined": {"mean": None, "low": None, "high": None},
}


def again(**changes: float | None) -> dict:
    return {name: {"mean": changes.get(name, estimate["mean"])} for name, estimate in PUBLISHED.items()}


def test_a_mean_anywhere_in_the_interval_agrees():
    assert disagreements(PUBLISHED, again()) == []
    assert disagreements(PUBLISHED, again(full=0.651)) == disagreements(PUBLISHED, again(full=0.749)) == []


def test_a_mean_outside_is_named_with_what_was_published():
    assert disagreements(PUBLISHED, again(full=0.64)) == ["full: 0.64, published 0.7 [0.65, 0.75]"]
    assert len(disagreements(PUBLISHED, again(**{"no change": 0.01, "single case": 0.51}))) == 2


def test_what_is_undefined_on_one_side_disagrees():
    assert len(disagreements(PUBLISHED, again(undefined=0.5))) == 1
    assert len(disagreements(PUBLISHED, again(full=math.nan))) == 1

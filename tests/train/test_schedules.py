import math

import pytest

from mednext_jax.train.schedules import NAMES, Plateau, make_schedule

CONFIG = {
    "schedule": "warmup_cosine",
    "peak_lr": 0.8,
    "warmup_steps": 4,
    "total_steps": 20,
    "final_fraction": 0.25,
    "poly_power": 0.9,
}


@pytest.mark.parametrize("name", NAMES)
def test_every_schedule_rises_linearly_to_its_peak(name):
    schedule = make_schedule({**CONFIG, "schedule": name})
    assert [schedule(s) for s in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])


def test_warmup_cosine_is_halfway_down_in_the_middle_and_ends_at_its_final_fraction():
    schedule = make_schedule(CONFIG)
    assert schedule(4 + 8) == pytest.approx((0.8 + 0.2) / 2)
    assert schedule(20) == pytest.approx(0.8 * 0.25)
    assert schedule(99) == pytest.approx(0.8 * 0.25)


def test_poly_falls_with_its_power():
    schedule = make_schedule({**CONFIG, "schedule": "poly"})
    assert schedule(4 + 12) == pytest.approx(0.8 * (1 - 12 / 16) ** 0.9)


def test_constant_needs_no_warmup():
    schedule = make_schedule({**CONFIG, "schedule": "constant", "warmup_steps": 0})
    assert schedule(0) == schedule(19) == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("schedule", "linear", "must be one of"), ("warmup_steps", 20, "below total_steps")],
)
def test_an_impossible_schedule_is_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        make_schedule({**CONFIG, field: value})


def test_plateau_keeps_the_rate_while_the_score_rises():
    plateau = Plateau(factor=0.1, patience=2)
    assert [plateau.update(s / 10) for s in range(8)] == [1.0] * 8


def test_plateau_falls_after_more_than_patience_validations_without_a_rise():
    plateau = Plateau(factor=0.5, patience=2)
    scores = [0.5, 0.4, 0.5, 0.3, 0.6, 0.1, 0.1, 0.1]
    assert [plateau.update(s) for s in scores] == [1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.25]


def test_plateau_counts_an_undefined_score_as_no_progress():
    plateau = Plateau(factor=0.5, patience=1)
    assert [plateau.update(s) for s in (0.5, math.nan, math.nan)] == [1, 1, 0.5]


def test_plateau_continues_from_its_state():
    straight, first, second = (Plateau(factor=0.1, patience=1) for _ in range(3))
    scores = [0.3, 0.2, 0.1, 0.4, 0.3, 0.2]
    expected = [straight.update(s) for s in scores]
    got = [first.update(s) for s in scores[:2]]
    second.set_state(first.get_state())
    assert got + [second.update(s) for s in scores[2:]] == expected


def test_plateau_state_before_the_first_score_is_plain_json():
    plateau = Plateau(factor=0.1, patience=1)
    state = plateau.get_state()
    assert state["best"] is None
    plateau.set_state(state)
    assert plateau.best == -math.inf

"""What a study concludes, on tables whose right answer is known."""

import math

import numpy as np
import pytest

from mednext_jax.evaluate.tables import Table
from mednext_jax.study import figures, report, results

CASES, SEEDS = 9, 3


def table(**arms) -> Table:
    """Dice of arms given as (seeds, cases) arrays, the same in both regions."""
    made = Table()
    for arm, values in arms.items():
        for seed, row in enumerate(values):
            for case, value in enumerate(row):
                for region in ("WT", "TC"):
                    made.add(f"{arm}@{seed}", f"case{case}", region, {"dice": value})
    return made


def around(mean: float, seed: int, spread: float = 0.05) -> np.ndarray:
    return mean + spread * np.random.default_rng(seed).standard_normal((SEEDS, CASES))


def test_an_effect_shared_by_all_repetitions_is_found_with_its_size():
    base = around(0.6, 1)
    made = table(full=base, adapter=base + 0.1)
    found = results.difference(results.mean_dice(made, "adapter"), results.mean_dice(made, "full"))
    assert found.mean == pytest.approx(0.1) and found.low == pytest.approx(0.1) and found.high == pytest.approx(0.1)
    assert (found.cases, found.seeds) == (CASES, SEEDS)


def test_two_arms_without_a_difference_get_an_interval_that_covers_zero():
    made = table(full=around(0.6, 1), again=around(0.6, 2))
    found = results.difference(results.mean_dice(made, "again"), results.mean_dice(made, "full"))
    assert found.low < 0 < found.high


def setting(made: Table, source: str = "source") -> results.Setting:
    return results.Setting((made, source), (made, "zero"), (made, "full"), (made, "adapter"))


def test_a_fault_that_costs_the_target_alone_explains_its_share_of_the_drop():
    source, zero, full, adapter = (around(m, i) for i, m in enumerate((0.9, 0.7, 0.8, 0.75)))
    clean = setting(table(source=source, zero=zero, full=full, adapter=adapter))
    faulty = setting(table(source=source, zero=zero - 0.2, full=full - 0.1, adapter=adapter - 0.15))
    found = results.effect("fault", faulty, clean)
    assert found.drop_change.mean == pytest.approx(0.2) and found.drop_change.low == pytest.approx(0.2)
    share = found.share_of_drop
    assert share.mean == pytest.approx(0.2 / (source.mean() - zero.mean() + 0.2))
    assert share.low < share.mean < share.high
    assert found.gap_change.mean == pytest.approx(-0.05)
    assert found.full.mean == pytest.approx(full.mean() - 0.1)


def test_a_fault_without_effect_has_none():
    made = table(source=around(0.9, 1), zero=around(0.7, 2), full=around(0.8, 3), adapter=around(0.8, 4))
    found = results.effect("none", setting(made), setting(made))
    assert found.drop_change.mean == found.gap_change.mean == found.share_of_drop.mean == 0


def test_without_a_drop_no_fault_has_a_share_of_it():
    clean = setting(table(source=around(0.7, 1), zero=around(0.7, 2), full=around(0.8, 3), adapter=around(0.8, 4)))
    assert math.isnan(results.effect("none", clean, clean).share_of_drop.mean)


def test_a_fault_that_leaves_the_source_as_it_is_takes_the_repetitions_that_all_networks_have():
    source, zero = around(0.9, 1), around(0.7, 2)
    source[1:] -= 0.3  # repetitions that the fault lacks must not count
    same = {"full": around(0.8, 3), "adapter": around(0.8, 4)}
    clean = table(source=source, zero=zero, **same)
    permuted = table(zero=zero[:1] - 0.1)
    faulty = results.Setting((clean, "source"), (permuted, "zero"), (clean, "full"), (clean, "adapter"))
    found = results.effect("permuted", faulty, setting(clean))
    assert found.drop.mean == pytest.approx(source[0].mean() - zero[0].mean() + 0.1)
    assert found.drop_change.mean == pytest.approx(0.1) and found.drop.seeds == 1
    assert found.gap_change.mean == 0


def test_differences_are_one_holm_family_and_paired_by_repetition():
    base = around(0.6, 1)
    better = base + np.linspace(0.08, 0.12, CASES)
    found = results.differences({("better", "full"): (better, base), ("same", "full"): (base, base)})
    assert (found[0].wins, found[0].ties, found[0].losses) == (CASES, 0, 0)
    assert 0.08 < found[0].estimate.low < found[0].estimate.high < 0.12  # the luck of a repetition is both arms'
    assert found[0].p == 2 / 2**CASES and found[0].p_holm == 2 * found[0].p
    assert found[1].p == found[1].p_holm == 1


def test_an_ablation_with_fewer_repetitions_is_compared_with_the_same_ones():
    base = around(0.6, 1)
    base[2] += 0.3  # a repetition that the ablation lacks must not count
    clean = setting(table(source=base, zero=base, full=base, adapter=base))
    faulty = setting(table(source=base[:2], zero=base[:2], full=base[:2], adapter=base[:2]))
    assert results.effect("fewer", faulty, clean).gap_change.mean == 0
    assert results.effect("fewer", faulty, clean).drop_change.mean == pytest.approx(0)


def test_other_test_cases_are_refused():
    first, second = table(full=around(0.6, 1)), table(full=around(0.6, 1)[:, :4])
    with pytest.raises(ValueError, match="different cases"):
        results.effect("fault", setting_of(first), setting_of(second))


def setting_of(made: Table) -> results.Setting:
    return results.Setting(*[(made, "full")] * 4)


def test_tables_and_pictures_hold_every_arm_and_escape_what_they_are_given():
    made = table(full=around(0.6, 1), zero=around(0.5, 2))
    zero = results.estimate(results.mean_dice(made, "zero"))
    rows = report.score_rows({arm: results.scores(made, arm) for arm in made.arms})
    dice = results.estimate(results.mean_dice(made, "full"))
    picture = figures.accuracy_against_compute({"full": (1e12, 1000, dice), "<b>": (1e11, 10, zero)}, zero)
    sections = [report.Section("Comparison", "text", *rows, picture), report.Section("<script>", "a\n\nb")]
    page = report.page("Study", "Simulated", sections, {"report": "evaluation/report.html"})
    assert "<script>" not in page and "data:image/svg+xml" in page and "Simulated" in page
    text = report.markdown("Study", "Simulated", sections)
    assert "| full | 9 | 3 |" in text and text.startswith("# Study\n\n**Simulated**")
    assert report.plain_text(*rows).splitlines()[1].startswith("full")


def test_arms_of_equal_arithmetic_stand_side_by_side_in_the_picture():
    dice = results.estimate(results.mean_dice(table(full=around(0.6, 1)), "full"))
    arms = {"full": (3e12, 9, dice), "scratch": (3e12, 8, dice), "adapter": (1e12, 1, dice)}
    figure = figures.accuracy_against_compute(arms, dice)
    full, scratch, adapter = (circle.get_offsets()[0][0] for circle in figure.axes[0].collections
                              if len(circle.get_offsets()) == 1 and circle.get_label() != "zero-shot"
                              and "(" in str(circle.get_label()))  # fmt: skip
    assert full < 3e12 < scratch < 1.05 * full and adapter == 1e12


def test_a_curve_over_sizes_takes_each_size_from_its_table():
    small, large = table(full_n1=around(0.5, 1)), table(full=around(0.7, 2))
    curve = results.few_shot({12: large, 1: small}, {12: {"full": "full"}, 1: {"full": "full_n1"}}, {12: None, 1: None})
    assert list(curve["full"]) == [1, 12] and curve["full"][12].mean == pytest.approx(0.7, abs=0.05)
    assert "<svg" in figures.svg(figures.few_shot_curve(curve, curve["full"][1]))


def test_pictures_show_every_arm_and_fault_by_name():
    made = table(source=around(0.9, 1), zero=around(0.7, 2), full=around(0.8, 3), adapter=around(0.8, 4))
    effect = results.effect("the fault", setting(made), setting(made))
    boxes, changes = figures.boxes(made, ["full", "adapter"]), figures.effects([effect])
    assert [text.get_text() for text in boxes.axes[0].get_yticklabels()] == ["full", "adapter"]
    assert [axes.get_title() for axes in boxes.axes] == made.regions
    assert [text.get_text() for text in changes.axes[0].get_yticklabels()] == ["the fault"]
    assert figures.png(boxes).startswith(b"\x89PNG")

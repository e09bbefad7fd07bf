"""Lesion-wise scores against the official tables and lesions drawn by hand."""

import json
from pathlib import Path

import numpy as np
import pytest

from mednext_jax.evaluate import lesionwise, overlap
from mednext_jax.evaluate.lesionwise import CHALLENGES, Rules

GOLDEN = Path(__file__).parents[1] / "golden"
ARRAYS = np.load(GOLDEN / "metrics_public.npz")
EXPECTED = json.loads((GOLDEN / "metrics_public.json").read_text())["cases"]
REGIONS = {"WT": (1, 2, 3), "TC": (1, 3), "ET": (3,)}
SHAPE = (20, 21, 40)
UNIT = (1.0, 1.0, 1.0)


def _boxes(*boxes):
    mask = np.zeros(SHAPE, bool)
    for (z, y, x), (d, h, w) in boxes:
        mask[z : z + d, y : y + h, x : x + w] = True
    return mask


@pytest.mark.parametrize("challenge", ["GLI", "MEN", "MET"])
@pytest.mark.parametrize("case", sorted(EXPECTED))
def test_lesionwise_scores_equal_the_official_table(case, challenge):
    pred, truth = (overlap.region_masks(ARRAYS[f"{case}/{k}"], REGIONS) for k in ("pred", "truth"))
    for region, official in EXPECTED[case]["brats2023"][f"BraTS-{challenge}"].items():
        ours = lesionwise.score(pred[region], truth[region], ARRAYS[f"{case}/spacing"], CHALLENGES[challenge])
        assert (ours.tp, ours.fp, ours.fn) == tuple(official[f"Num_{kind}"] for kind in ("TP", "FP", "FN"))
        assert ours.dice == pytest.approx(official["LesionWise_Score_Dice"], abs=1e-12)
        assert ours.hd95_mm == pytest.approx(official["LesionWise_Score_HD95"], abs=1e-9)


def test_africa_and_paediatric_rules_are_those_of_adult_glioma():
    assert CHALLENGES["SSA"] == CHALLENGES["PED"] == CHALLENGES["GLI"] == Rules(3, 50)


def test_one_found_one_missed_one_invented_lesion_is_the_hand_sum():
    truth = _boxes(((2, 2, 2), (4, 4, 4)), ((2, 2, 20), (4, 4, 4)))
    pred = _boxes(((2, 2, 2), (4, 4, 3)), ((12, 12, 34), (1, 1, 1)))
    found = lesionwise.score(pred, truth, UNIT, Rules(1, 50))
    assert (found.tp, found.fp, found.fn) == (1, 1, 1)
    assert found.dice == pytest.approx((2 * 48 / (64 + 48) + 0 + 0) / 3)
    assert found.hd95_mm == pytest.approx((1 + 374 + 374) / 3)
    assert [x.kind for x in found.lesions] == ["TP", "FN", "FP"]
    assert found.lesions[2].predicted_mm3 == 1 and found.lesions[2].centre_voxel == (12, 12, 34)


def test_truth_parts_whose_dilations_touch_are_one_lesion():
    truth = _boxes(((2, 2, 2), (4, 4, 4)), ((2, 2, 8), (4, 4, 4)))  # two voxels apart
    assert lesionwise.score(truth, truth, UNIT, Rules(1, 50)).tp == 1
    apart = _boxes(((2, 2, 2), (4, 4, 4)), ((2, 2, 9), (4, 4, 4)))  # three voxels apart
    assert lesionwise.score(apart, apart, UNIT, Rules(1, 50)).tp == 2
    assert lesionwise.score(apart, apart, UNIT, Rules(3, 50)).tp == 1


def test_lesion_of_exactly_the_volume_limit_is_left_out_found_or_not():
    truth = _boxes(((2, 2, 2), (2, 5, 5)))  # 50 voxels
    for pred in (truth, np.zeros(SHAPE, bool)):
        found = lesionwise.score(pred, truth, UNIT, CHALLENGES["SSA"])
        assert (found.tp, found.fp, found.fn, found.dice, found.hd95_mm) == (0, 0, 0, 1.0, 0.0)
        assert [x.kind for x in found.lesions] == ["small"]
    assert lesionwise.score(truth, truth, (1.0, 1.0, 1.01), CHALLENGES["SSA"]).tp == 1


def test_prediction_within_the_dilation_counts_as_found_with_dice_zero():
    truth = _boxes(((2, 2, 2), (4, 4, 4)))
    near = _boxes(((2, 2, 8), (1, 1, 1)))  # three steps from the lesion
    found = lesionwise.score(near, truth, UNIT, CHALLENGES["SSA"])
    assert (found.tp, found.fp, found.fn, found.dice) == (1, 0, 0, 0.0)
    assert found.hd95_mm < 374
    far = _boxes(((2, 2, 9), (1, 1, 1)))
    found = lesionwise.score(far, truth, UNIT, CHALLENGES["SSA"])
    assert (found.tp, found.fp, found.fn) == (0, 1, 1)


def test_one_component_over_two_lesions_is_scored_against_both():
    truth = _boxes(((2, 2, 2), (4, 4, 4)), ((2, 2, 20), (4, 4, 4)))
    pred = _boxes(((2, 2, 2), (4, 4, 22)))
    found = lesionwise.score(pred, truth, UNIT, Rules(1, 50))
    assert (found.tp, found.fp, found.fn) == (2, 0, 0)
    assert found.dice == pytest.approx(2 * 64 / (64 + 4 * 4 * 22))


def test_scores_do_not_depend_on_the_empty_margin():
    truth = _boxes(((4, 4, 4), (4, 5, 6)))
    pred = _boxes(((5, 4, 4), (4, 5, 6)), ((15, 15, 30), (2, 2, 2)))
    wide = [np.pad(m, 9) for m in (pred, truth)]
    ours, padded = (lesionwise.score(*masks, (1.0, 2.0, 0.5)) for masks in ((pred, truth), wide))
    assert (ours.dice, ours.hd95_mm, ours.tp, ours.fp) == (padded.dice, padded.hd95_mm, padded.tp, padded.fp)

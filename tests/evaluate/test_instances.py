"""One-to-one lesion matching on lesions drawn by hand, and the reference tool's numbers."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from mednext_jax.evaluate import instances, overlap

GOLDEN = Path(__file__).parents[1] / "golden"
SHAPE = (10, 12, 30)
UNIT = (1.0, 1.0, 1.0)


def _boxes(*spans):
    mask = np.zeros(SHAPE, bool)
    for start, stop in spans:
        mask[2:6, 2:6, start:stop] = True
    return mask


def test_matched_missed_and_invented_lesions_give_the_hand_sums():
    truth, pred = _boxes((2, 6), (20, 24)), _boxes((3, 7), (12, 13))
    found = instances.match(pred, truth, UNIT)
    assert (found.tp, found.fp, found.fn) == (1, 1, 1)
    assert found.rq == 2 * 1 / (2 * 1 + 1 + 1)
    assert found.sq == 2 * 3 / (4 + 4)
    assert found.pq == found.rq * found.sq
    assert found.hd95_mm == 1.0


def test_one_prediction_over_two_lesions_serves_only_the_better_one():
    truth, pred = _boxes((2, 5), (7, 12)), _boxes((2, 12))
    found = instances.match(pred, truth, UNIT)
    assert (found.tp, found.fp, found.fn) == (1, 0, 1)
    assert found.sq == 2 * 5 / (5 + 10)


def test_matching_maximises_the_sum_and_not_the_first_pair():
    truth, pred = np.zeros((1, 1, 40), bool), np.zeros((1, 1, 40), bool)
    truth[0, 0, 0:10] = truth[0, 0, 11:15] = True
    pred[0, 0, 5:15] = pred[0, 0, 0:3] = True
    found = instances.match(pred, truth, UNIT)
    # (0:10 with 5:15) and nothing else, or (0:10 with 0:3) and (11:15 with 5:15): the latter sums higher
    assert 2 * 5 / 20 < 2 * 3 / 13 + 2 * 4 / 14
    assert found.tp == 2 and found.sq == pytest.approx((2 * 3 / 13 + 2 * 4 / 14) / 2)


def test_no_lesions_at_all_is_undefined_and_none_matched_is_zero():
    empty, some = np.zeros(SHAPE, bool), _boxes((2, 6))
    both = instances.match(empty, empty, UNIT)
    assert math.isnan(both.rq) and math.isnan(both.pq) and math.isnan(both.hd95_mm)
    for pred, truth in ((empty, some), (some, empty)):
        found = instances.match(pred, truth, UNIT)
        assert found.rq == found.sq == found.pq == 0 and math.isinf(found.hd95_mm)


def test_diagonal_voxels_are_one_lesion_with_26_neighbours_and_two_with_6():
    mask = np.zeros((3, 3, 3), bool)
    mask[0, 0, 0] = mask[1, 1, 1] = True
    assert instances.match(mask, mask, UNIT).tp == 1
    assert instances.match(mask, mask, UNIT, neighbours=6).tp == 2


@pytest.mark.parametrize("case", ["0", "1", "2", "3", "4"])
def test_matching_equals_the_reference_tool_on_isotropic_cases(case):
    # numbers of BraTS_evaluation 0.0.10 (panoptica 2.1.7), configuration gli, on the golden cases
    expected = json.loads((GOLDEN / "instances_panoptica.json").read_text())[case]
    arrays = np.load(GOLDEN / "metrics_public.npz")
    regions = {"wt": (1, 2, 3), "tc": (1, 3), "et": (3,), "netc": (1,), "snfh": (2,)}
    pred, truth = (overlap.region_masks(arrays[f"{case}/{k}"], regions) for k in ("pred", "truth"))
    for region in regions:
        ours, theirs = instances.match(pred[region], truth[region], UNIT), expected[region]
        assert (ours.tp, ours.fp, ours.fn) == (theirs["tp"], theirs["fp"], theirs["fn"])
        names = {"rq": ours.rq, "sq_dsc": ours.sq, "pq_dsc": ours.pq, "sq_hd95": ours.hd95_mm}
        for name, value in names.items():
            np.testing.assert_allclose(value, float(theirs[name]), atol=1e-9)

"""Surface distances against hand sums, the golden arrays and DeepMind's package."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from mednext_jax.evaluate import overlap, surface

GOLDEN = Path(__file__).parents[1] / "golden"
ARRAYS = np.load(GOLDEN / "metrics_public.npz")
EXPECTED = json.loads((GOLDEN / "metrics_public.json").read_text())
REGIONS = {name: tuple(labels) for name, labels in EXPECTED["meta"]["regions"].items()}


def _voxel(shape, *where):
    mask = np.zeros(shape, bool)
    mask[where] = True
    return mask


def _random_masks(seed, shape=(11, 14, 9)):
    rng = np.random.default_rng(seed)
    return rng.random(shape) < 0.2, rng.random(shape) < 0.3


def _number(value):
    return math.nan if value is None else float(value)


@pytest.mark.parametrize("case", sorted(EXPECTED["cases"]))
def test_surface_metrics_equal_the_golden_numbers(case):
    spacing = ARRAYS[f"{case}/spacing"]
    pred, truth = (overlap.region_masks(ARRAYS[f"{case}/{k}"], REGIONS) for k in ("pred", "truth"))
    for region, expected in EXPECTED["cases"][case]["per_label"].items():
        surfels = surface.surfel_distances(pred[region], truth[region], spacing)
        borders = surface.border_distances(pred[region], truth[region], spacing)
        area, voxel = expected["deepmind_surface_distance"], expected["scipy"]
        pairs = [
            (surface.nsd(surfels, 1), area["nsd_1mm"]),
            (surface.nsd(surfels, 2), area["nsd_2mm"]),
        ]
        if pred[region].any() and truth[region].any():
            pairs += [
                (surface.hd_mm(surfels), area["hd95"]),
                (surface.hd_mm(surfels, 100), area["hd100"]),
                (surface.hd_max_directed_mm(borders), voxel["hd95_max_of_directed"]),
                (surface.hd_max_directed_mm(borders, 100), voxel["hd100"]),
                (surface.hd_pooled_mm(borders), voxel["hd95_pooled"]),
                (surface.assd_mm(borders), voxel["assd"]),
            ]
        for ours, theirs in pairs:
            np.testing.assert_allclose(ours, _number(theirs), atol=1e-9, rtol=0)


@pytest.mark.parametrize("case", sorted(EXPECTED["cases"]))
def test_voxel_counts_equal_the_golden_counts(case):
    pred, truth = (overlap.region_masks(ARRAYS[f"{case}/{k}"], REGIONS) for k in ("pred", "truth"))
    for region, expected in EXPECTED["cases"][case]["per_label"].items():
        counts = overlap.confusion(pred[region], truth[region])
        assert [counts.tp, counts.fp, counts.tn, counts.fn] == expected["tp_fp_tn_fn"]
        dice = _number(expected["deepmind_surface_distance"]["dice"])
        np.testing.assert_allclose(counts.dice, dice, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Please import:DeprecationWarning")  # the package uses old names of scipy
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (1.0, 0.75, 3.0), (0.7, 0.9, 1.3)])
def test_surfel_metrics_equal_deepminds_package(spacing):
    package = pytest.importorskip("surface_distance")
    for seed in range(4):
        pred, truth = _random_masks(seed)
        theirs = package.compute_surface_distances(truth, pred, spacing)
        ours = surface.surfel_distances(pred, truth, spacing)
        for percent in (50, 95, 100):
            expected = package.compute_robust_hausdorff(theirs, percent)
            assert surface.hd_mm(ours, percent) == pytest.approx(expected, abs=1e-12)
        for tolerance in (0.5, 1, 2):
            expected = package.compute_surface_dice_at_tolerance(theirs, tolerance)
            assert surface.nsd(ours, tolerance) == pytest.approx(expected, abs=1e-12)


def test_hd95_of_shifted_voxels_is_the_shift_in_mm():
    a, b = _voxel((9, 10, 11), 2, 3, 4), _voxel((9, 10, 11), 5, 3, 8)
    expected = math.hypot(3 * 2.0, 4 * 0.5)
    spacing = (2.0, 1.0, 0.5)
    borders = surface.border_distances(a, b, spacing)
    for metric in (surface.hd_max_directed_mm, surface.hd_pooled_mm, surface.assd_mm):
        assert metric(borders) == expected
    # of the eight corners of a voxel some are nearer to the other voxel
    assert surface.hd_mm(surface.surfel_distances(a, b, spacing), 100) == expected


def test_distances_scale_with_the_spacing():
    pred, truth = _random_masks(7)
    for measure in (
        lambda s: surface.hd_mm(surface.surfel_distances(pred, truth, s)),
        lambda s: surface.assd_mm(surface.border_distances(pred, truth, s)),
    ):
        assert measure((2.0, 3.0, 5.0)) == pytest.approx(2 * measure((1.0, 1.5, 2.5)), rel=1e-12)


def test_pooled_and_directed_percentiles_are_the_hand_sums():
    truth = _voxel((1, 1, 30), 0, 0, 0)
    pred = np.zeros((1, 1, 30), bool)
    pred[0, 0, :21] = True  # distances 0..20 to the truth, and 0 back
    borders = surface.border_distances(pred, truth, (1, 1, 1))
    assert surface.hd_max_directed_mm(borders) == 19.0  # 95% of the way from 0 to 20
    assert surface.hd_pooled_mm(borders) == pytest.approx(0.95 * 21 - 1)  # 22 values: 0, 0, 1, ..., 20
    assert surface.assd_mm(borders) == (sum(range(21)) / 21 + 0) / 2


def test_distances_are_infinite_if_one_mask_is_empty_and_nan_if_both_are():
    empty, full = np.zeros((4, 5, 6), bool), _voxel((4, 5, 6), 1, 2, 3)
    for pred, truth in ((empty, full), (full, empty)):
        surfels = surface.surfel_distances(pred, truth, (1, 1, 1))
        borders = surface.border_distances(pred, truth, (1, 1, 1))
        assert surface.hd_mm(surfels) == surface.hd_pooled_mm(borders) == math.inf
        assert surface.hd_max_directed_mm(borders) == surface.assd_mm(borders) == math.inf
        assert surface.nsd(surfels, 1) == 0
    surfels = surface.surfel_distances(empty, empty, (1, 1, 1))
    borders = surface.border_distances(empty, empty, (1, 1, 1))
    assert math.isnan(surface.hd_mm(surfels)) and math.isnan(surface.nsd(surfels, 1))
    for metric in (surface.hd_max_directed_mm, surface.hd_pooled_mm, surface.assd_mm):
        assert math.isnan(metric(borders))


def test_masks_at_the_edge_of_the_grid_have_a_closed_surface():
    inside = np.zeros((8, 9, 10), bool)
    inside[2:5, 2:6, 2:7] = True
    at_edge = inside[2:5, 2:6, 2:7]
    moved = np.roll(inside, 1, axis=0)
    both = surface.surfel_distances(inside, inside, (1, 2, 3))
    assert both.pred_mm2.sum() == surface.surfel_distances(at_edge, at_edge, (1, 2, 3)).pred_mm2.sum()
    assert surface.hd_mm(surface.surfel_distances(inside, moved, (1, 2, 3))) == 1.0


def test_bounding_box_is_tight_and_the_whole_grid_if_empty():
    mask = np.zeros((7, 8, 9), bool)
    assert mask[surface.bounding_box(mask)].shape == (7, 8, 9)
    mask[2, 3:5, 4] = mask[5, 1, 8] = True
    assert surface.bounding_box(mask) == (slice(2, 6), slice(1, 5), slice(4, 9))

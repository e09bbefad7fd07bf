"""All metrics of a case: names, policies for absent regions, and speed."""

import json
import math
import time
from pathlib import Path

import numpy as np
import pytest

from mednext_jax.evaluate import definitions, measure, official, policy, tables

GOLDEN = Path(__file__).parents[1] / "golden"
ARRAYS = np.load(GOLDEN / "metrics_public.npz")
EXPECTED = json.loads((GOLDEN / "metrics_public.json").read_text())["cases"]
REGIONS = {"WT": (1, 2, 3), "TC": (1, 3), "ET": (3,)}
PROMISED = (
    "dice, iou, sensitivity, specificity, precision, volume_mm3, hd95_mm, hd95_max_directed_mm, "
    "hd95_pooled_mm, nsd_1mm, assd_mm, lesionwise_dice, lesionwise_hd95_mm, lesions_tp, lesions_fp, "
    "lesions_fn"
).split(", ")
ONE = {"A": (1,)}


def _label(*voxels):
    labels = np.zeros((8, 9, 10), np.uint8)
    for voxel in voxels:
        labels[voxel] = 1
    return labels


def _values(pred, truth, **changes):
    return measure.measure(pred, truth, (1.0, 1.0, 1.0), measure.Settings(ONE, **changes))["A"].values


def test_metric_names_are_the_promised_ones_and_all_are_defined():
    settings = measure.Settings(REGIONS)
    assert set(PROMISED) <= set(settings.metrics)
    values = _values(_label((1, 2, 3)), _label((1, 2, 3)))
    assert tuple(values) == settings.metrics
    assert all(definitions.of(name) for name in values)


def test_volumes_are_in_mm3_and_their_difference_has_a_sign():
    pred, truth = _label((1, 1, 1), (1, 1, 2), (4, 4, 4)), _label((1, 1, 1))
    found = measure.measure(pred, truth, (2.0, 3.0, 0.5), measure.Settings(ONE))["A"].values
    assert found["volume_mm3"] == 3 * 3.0 and found["reference_volume_mm3"] == 3.0
    assert found["volume_difference_mm3"] == 2 * 3.0


@pytest.mark.parametrize("empty", policy.POLICIES)
def test_absent_regions_follow_the_named_policy(empty):
    none, some = _label(), _label((3, 3, 3))
    missed, invented = _values(none, some, empty=empty), _values(some, none, empty=empty)
    both = _values(none, none, empty=empty)
    for found in (missed, invented):
        assert found["dice"] == found["iou"] == found["nsd_1mm"] == 0
        for metric in measure.DISTANCE:
            assert math.isnan(found[metric]) if empty == "undefined" else found[metric] == 374
    expected = {"dice": 1, "nsd_1mm": 1, "hd95_mm": 0} if empty == "brats2023" else {}
    for metric in ("dice", "iou", "nsd_1mm", "sensitivity", "precision", "hd95_mm", "assd_mm"):
        assert math.isnan(both[metric]) != (empty == "brats2023"), metric
    assert all(both[metric] == value for metric, value in expected.items())
    assert both["lesionwise_dice"] == 1 and both["lesionwise_hd95_mm"] == 0  # the official rule, always


def test_unknown_policy_or_challenge_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="penalise"):
        measure.Settings(ONE, empty="skip")
    with pytest.raises(ValueError, match="GLI"):
        measure.Settings(ONE, challenge="LIVER")


def test_maps_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match="shape"):
        measure.measure(np.zeros((3, 4, 5), int), np.zeros((3, 5, 4), int), (1, 1, 1), measure.Settings(ONE))


@pytest.mark.parametrize("empty", policy.POLICIES)
@pytest.mark.parametrize("case", sorted(EXPECTED))
def test_official_table_is_the_golden_one_under_any_policy(case, empty):
    settings = measure.Settings(REGIONS, challenge="GLI", empty=empty)
    arrays = [ARRAYS[f"{case}/{k}"] for k in ("pred", "truth", "spacing")]
    table = tables.Table()
    for region, result in measure.measure(*arrays, settings).items():
        table.add("arm", "case", region, result.values)
    for row in official.rows(table, "arm", "case"):
        expected = EXPECTED[case]["brats2023"]["BraTS-GLI"][row[0]]
        for name, value in zip(official.COLUMNS[1:], row[1:], strict=True):
            assert value == pytest.approx(expected[name], abs=1e-9), name


def test_region_map_of_another_anatomy_is_measured_the_same_way():
    labels = np.zeros((8, 9, 10), np.uint8)
    labels[2:5, 2:5, 2:5], labels[6, 6, 6] = 7, 12
    found = measure.measure(labels, labels, (1, 1, 1), measure.Settings({"liver": (7, 12), "tumour": (12,)}))
    assert found["liver"].values["volume_mm3"] == 28 and found["tumour"].values["dice"] == 1


def test_all_metrics_of_a_full_size_case_take_at_most_two_seconds_of_one_core():
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in (240, 240, 155)), indexing="ij", sparse=False))
    maps = []
    for centre in ((110, 120, 80), (112, 118, 81)):
        radius = np.sqrt(((grid - np.reshape(centre, (3, 1, 1, 1))) ** 2).sum(axis=0, dtype=np.float32))
        radius += 1.5 * np.sin(grid[0] / 3) + 1.5 * np.cos(grid[1] / 4)
        labels = np.select([radius < 12, radius < 22, radius < 38], [1, 3, 2], 0).astype(np.uint8)
        for corner in rng.integers(30, 120, (5, 3)):  # satellites all over the brain
            labels[tuple(slice(c, c + 3) for c in corner)] = rng.integers(1, 4)
        maps.append(labels)
    settings = measure.Settings(REGIONS)
    measure.measure(*(m[:40, :40, :40] for m in maps), (1, 1, 1), settings)  # builds the area table
    before = time.process_time()
    measure.measure(*maps, (1.0, 1.0, 1.0), settings)
    assert time.process_time() - before < 2.0

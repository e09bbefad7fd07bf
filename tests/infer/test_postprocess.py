"""Label maps from probabilities, and the rules that clean them, on volumes small enough to count by hand."""

import numpy as np
import pytest

from mednext_jax.infer.postprocess import (
    STRICT_THRESHOLDS,
    PostProcess,
    labels_from_softmax,
    own_labels,
    regions_to_labels,
    remove_small_components,
    remove_small_regions,
)

REGIONS = {"WT": (1, 2, 3), "TC": (1, 3), "ET": (3,)}


def one_voxel(*probabilities):
    return np.array(probabilities, np.float32).reshape(1, 1, 1, -1)


@pytest.mark.parametrize(
    ("probabilities", "thresholds", "label"),
    [
        ((0.4, 0.1, 0.1), 0.5, 0),
        ((0.5, 0.1, 0.1), 0.5, 2),  # reaching the threshold is enough
        ((0.9, 0.6, 0.1), 0.5, 1),
        ((0.9, 0.6, 0.6), 0.5, 3),
        ((0.1, 0.1, 0.6), 0.5, 3),  # the inner region wins
        ((0.9, 0.6, 0.6), STRICT_THRESHOLDS, 2),
        ((0.9, 0.8, 0.6), STRICT_THRESHOLDS, 1),
        ((0.9, 0.6, 0.1), {"TC": 0.61}, 2),  # others stay at 0.5
    ],
)
def test_label_is_the_innermost_region_above_its_threshold(probabilities, thresholds, label):
    assert regions_to_labels(one_voxel(*probabilities), thresholds, REGIONS) == label


def test_own_labels_of_brats_regions_are_oedema_necrosis_and_enhancing():
    assert own_labels(REGIONS) == {"WT": 2, "TC": 1, "ET": 3}


@pytest.mark.parametrize(
    "regions", [{"ET": (3,), "TC": (1, 3)}, {"WT": (1, 2, 3), "ET": (3,)}, {"NCR": (1,), "ED": (2,)}]
)
def test_regions_that_are_not_nested_one_label_apart_are_refused(regions):
    with pytest.raises(ValueError, match="not nested"):
        own_labels(regions)


def test_number_of_probabilities_must_be_the_number_of_regions():
    with pytest.raises(ValueError, match="4 probabilities for the regions WT, TC, ET"):
        regions_to_labels(one_voxel(0.1, 0.2, 0.3, 0.4), 0.5, REGIONS)


def test_softmax_gives_the_most_probable_label():
    assert labels_from_softmax(one_voxel(0.1, 0.2, 0.4, 0.3)) == 2
    assert labels_from_softmax(one_voxel(0.1, 0.2, 0.4, 0.3)).dtype == np.uint8


def specks():
    """Oedema of 27 voxels holding NCR of 4 and ET of 2 that touch at a corner only; one ET voxel far away."""
    labels = np.zeros((5, 6, 9), np.uint8)
    labels[1:4, 1:4, 1:4] = 2
    labels[1, 1, 1:3] = 1
    labels[2, 2, 1:3] = 1
    labels[3, 3, 1:3] = 3
    labels[4, 5, 8] = 3
    return labels


def test_small_components_fall_to_the_region_around_them():
    cleaned = remove_small_components(specks(), {"ET": 2}, 1.0, REGIONS)
    assert cleaned[4, 5, 8] == 1 and (cleaned[3, 3, 1:3] == 3).all()
    cleaned = remove_small_components(specks(), {"ET": 3}, 1.0, REGIONS)
    assert (cleaned[3, 3, 1:3] == 1).all()
    cleaned = remove_small_components(specks(), {"WT": 2}, 1.0, REGIONS)
    assert cleaned[4, 5, 8] == 0 and (cleaned[:4] == specks()[:4]).all()


def test_components_join_at_corners():
    kept = remove_small_components(specks(), {"TC": 6}, 1.0, REGIONS)  # 4 + 2 voxels
    assert (kept[:4] == specks()[:4]).all()
    assert not np.isin(remove_small_components(specks(), {"TC": 7}, 1.0, REGIONS), (1, 3)).any()


def test_component_volume_is_in_cubic_millimetres():
    kept = remove_small_components(specks(), {"ET": 4}, 4.0, REGIONS)
    assert kept[4, 5, 8] == 3
    removed = remove_small_components(specks(), {"ET": 4}, 3.9, REGIONS)
    assert removed[4, 5, 8] == 1 and (removed[3, 3, 1:3] == 3).all()


def test_region_whose_total_is_tiny_is_removed_as_a_whole():
    assert (remove_small_regions(specks(), {"ET": 3}, 1.0, REGIONS) == specks()).all()  # exactly 3 voxels
    cleaned = remove_small_regions(specks(), {"ET": 3.1}, 1.0, REGIONS)
    assert (cleaned == np.where(specks() == 3, 1, specks())).all()


def test_nothing_is_removed_by_default():
    labels = specks()
    probabilities = np.stack([np.isin(labels, values) for values in REGIONS.values()], -1).astype(np.float32)
    assert (PostProcess()(probabilities, "regions", REGIONS, (1, 1, 1)) == labels).all()
    softmax = np.eye(4, dtype=np.float32)[labels]
    assert (PostProcess()(softmax, "labels", REGIONS, (1, 1, 1)) == labels).all()


def test_rules_compose_and_keep_the_regions_nested():
    probabilities = np.random.default_rng(0).random((9, 10, 11, 3)).astype(np.float32)
    rules = PostProcess({"WT": 0.8, "TC": 0.9, "ET": 0.95}, {"WT": 3, "ET": 2}, {"ET": 10})
    labels = rules(probabilities, "regions", REGIONS, (1, 1, 1))
    assert set(np.unique(labels)) <= {0, 1, 2, 3}
    again = remove_small_components(labels, {"WT": 3}, 1.0, REGIONS)
    assert (again == labels).all()  # demoting ET never made a tumour smaller


@pytest.mark.parametrize(
    ("rules", "line"),
    [
        (PostProcess(thresholds={"XX": 0.5}), "names the region 'XX'"),
        (PostProcess(thresholds={"ET": 1.0}), "threshold of ET is 1.0"),
        (PostProcess(min_component_mm3={"ET": -1}), "min_component_mm3 of ET is -1"),
    ],
)
def test_impossible_rules_are_refused(rules, line):
    with pytest.raises(ValueError, match=line):
        rules.check(REGIONS)

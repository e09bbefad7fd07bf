"""Voxel overlap against sums written by hand."""

import numpy as np
import pytest

from mednext_jax.evaluate import overlap


def _row(*values):
    return np.array(values, bool)


def test_confusion_counts_each_kind_of_voxel():
    pred, truth = _row(1, 1, 1, 0, 0, 0, 0), _row(1, 1, 0, 1, 1, 1, 0)
    assert overlap.confusion(pred, truth) == (2, 1, 3, 1)


def test_ratios_equal_the_hand_sums():
    pred, truth = _row(1, 1, 1, 0, 0, 0, 0), _row(1, 1, 0, 1, 1, 1, 0)
    assert overlap.dice(pred, truth) == 2 * 2 / (3 + 5)
    assert overlap.iou(pred, truth) == 2 / 6
    assert overlap.sensitivity(pred, truth) == 2 / 5
    assert overlap.precision(pred, truth) == 2 / 3
    assert overlap.specificity(pred, truth) == 1 / 2


def test_dice_is_nan_when_region_absent_in_both_and_zero_when_absent_in_one():
    empty, full = np.zeros((3, 4, 5), bool), np.ones((3, 4, 5), bool)
    assert np.isnan(overlap.dice(empty, empty)) and np.isnan(overlap.iou(empty, empty))
    assert overlap.dice(empty, full) == 0 and overlap.dice(full, empty) == 0
    assert np.isnan(overlap.sensitivity(full, empty)) and np.isnan(overlap.precision(empty, full))
    assert np.isnan(overlap.specificity(full, full))


def test_confusion_refuses_other_shapes_and_label_maps():
    with pytest.raises(ValueError, match="shape"):
        overlap.confusion(np.zeros((3, 4), bool), np.zeros((4, 3), bool))
    with pytest.raises(ValueError, match="boolean"):
        overlap.confusion(np.zeros((3, 4), int), np.zeros((3, 4), bool))


def test_region_masks_are_unions_of_labels_in_order():
    labels = np.array([0, 1, 2, 3, 4])
    masks = overlap.region_masks(labels, {"WT": (1, 2, 3), "ET": (3,)})
    assert list(masks) == ["WT", "ET"]
    assert masks["WT"].tolist() == [False, True, True, True, False]
    assert masks["ET"].tolist() == [False, False, False, True, False]

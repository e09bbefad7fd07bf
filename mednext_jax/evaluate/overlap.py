"""Voxel overlap between a predicted and a true mask: Dice, IoU, sensitivity, specificity, precision.

A ratio whose denominator is zero is undefined and comes back as NaN, never as 0 or 1: what an absent region
counts for is a policy, applied (and named) where numbers are put into tables (`policy.py`).
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

NAN = float("nan")


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else NAN


class Confusion(NamedTuple):
    """Voxel counts of one prediction against one truth; the ratios are NaN where undefined."""

    tp: int
    fp: int
    fn: int
    tn: int

    @property
    def dice(self) -> float:
        """2 TP / (2 TP + FP + FN); NaN if the region is absent in both masks, 0 if absent in one."""
        return _ratio(2 * self.tp, 2 * self.tp + self.fp + self.fn)

    @property
    def iou(self) -> float:
        """TP / (TP + FP + FN), the Jaccard index; NaN if the region is absent in both masks."""
        return _ratio(self.tp, self.tp + self.fp + self.fn)

    @property
    def sensitivity(self) -> float:
        """TP / (TP + FN), the recall; NaN if the region is absent in the truth."""
        return _ratio(self.tp, self.tp + self.fn)

    @property
    def specificity(self) -> float:
        """TN / (TN + FP) over the whole grid; NaN if the truth fills the grid."""
        return _ratio(self.tn, self.tn + self.fp)

    @property
    def precision(self) -> float:
        """TP / (TP + FP), the positive predictive value; NaN if the region is absent in the prediction."""
        return _ratio(self.tp, self.tp + self.fp)


def confusion(pred: np.ndarray, truth: np.ndarray) -> Confusion:
    """Counts true/false positive/negative voxels of two boolean masks of the same shape (any rank).

    Raises:
      ValueError: the shapes differ or a mask is not boolean.
    """
    pred, truth = np.asarray(pred), np.asarray(truth)
    if pred.shape != truth.shape:
        raise ValueError(f"prediction has shape {pred.shape}, truth {truth.shape}: they must be equal")
    if pred.dtype != bool or truth.dtype != bool:
        raise ValueError(f"masks must be boolean, got {pred.dtype} and {truth.dtype}; use region_masks()")
    tp = int(np.count_nonzero(pred & truth))
    fp = int(np.count_nonzero(pred)) - tp
    fn = int(np.count_nonzero(truth)) - tp
    return Confusion(tp, fp, fn, pred.size - tp - fp - fn)


def dice(pred: np.ndarray, truth: np.ndarray) -> float:
    """Dice of two boolean masks; see `Confusion.dice`."""
    return confusion(pred, truth).dice


def iou(pred: np.ndarray, truth: np.ndarray) -> float:
    """IoU of two boolean masks; see `Confusion.iou`."""
    return confusion(pred, truth).iou


def sensitivity(pred: np.ndarray, truth: np.ndarray) -> float:
    """Sensitivity of two boolean masks; see `Confusion.sensitivity`."""
    return confusion(pred, truth).sensitivity


def specificity(pred: np.ndarray, truth: np.ndarray) -> float:
    """Specificity of two boolean masks; see `Confusion.specificity`."""
    return confusion(pred, truth).specificity


def precision(pred: np.ndarray, truth: np.ndarray) -> float:
    """Precision of two boolean masks; see `Confusion.precision`."""
    return confusion(pred, truth).precision


def region_masks(labels: np.ndarray, regions: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    """Boolean mask of each region (a name for a set of label values), in the order of `regions`.

    Args:
      labels: integer label map of any shape.
      regions: for example ``{"WT": (1, 2, 3), "TC": (1, 3), "ET": (3,)}``.
    """
    return {name: np.isin(labels, np.asarray(values)) for name, values in regions.items()}

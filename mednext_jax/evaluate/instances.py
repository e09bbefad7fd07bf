"""Instance-wise scores: predicted and true lesions matched one to one, without dilation.

Lesions are connected components. Each truth lesion is paired with at most one predicted one so that the sum
of the pairs' Dice is largest (maximum-weight bipartite matching); a pair counts if its Dice exceeds a
threshold. The idea is that of panoptic quality (Kirillov et al. 2019, arXiv:1801.00868) as used by the BraTS
tooling from 2025 on: recognition quality RQ = F1 of detection, segmentation quality SQ = mean Dice of the
pairs, PQ = RQ x SQ. Unlike `lesionwise`, no lesion is too small, and a predicted one serves one truth only.
"""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from scipy.optimize import linear_sum_assignment

from mednext_jax.evaluate import surface

NAN = float("nan")


@dataclass(frozen=True)
class InstanceScores:
    """Counts of matched (tp), unmatched predicted (fp) and unmatched true (fn) lesions, and the pairs.

    pairs: (truth number, predicted number, Dice, pooled HD95 in mm), numbers from 1 in scan order.
    """

    tp: int
    fp: int
    fn: int
    pairs: tuple[tuple[int, int, float, float], ...]

    @property
    def rq(self) -> float:
        """TP / (TP + (FP + FN) / 2); NaN if neither mask has a lesion."""
        lesions = 2 * self.tp + self.fp + self.fn
        return 2 * self.tp / lesions if lesions else NAN

    @property
    def sq(self) -> float:
        """Mean Dice of the pairs; 0 if lesions exist but none is paired, NaN if there is no lesion."""
        return float(np.mean([p[2] for p in self.pairs])) if self.pairs else self.rq

    @property
    def pq(self) -> float:
        """RQ x SQ: missed and invented lesions count as Dice 0."""
        return self.rq * self.sq

    @property
    def hd95_mm(self) -> float:
        """Mean pooled HD95 of the pairs; infinite if lesions exist but none is paired, NaN without any."""
        if self.pairs:
            return float(np.mean([p[3] for p in self.pairs]))
        return NAN if np.isnan(self.rq) else float("inf")


def match(
    pred: np.ndarray, truth: np.ndarray, spacing_mm, min_dice: float = 1e-6, neighbours: int = 26
) -> InstanceScores:
    """Matches the components of two (D, H, W) bool masks; `neighbours` is 6, 18 or 26."""
    structure = ndimage.generate_binary_structure(3, {6: 1, 18: 2, 26: 3}[neighbours])
    pred, truth = surface.crop(pred, truth)
    found, n_found = ndimage.label(pred, structure)
    lesions, n_lesions = ndimage.label(truth, structure)
    somewhere = np.flatnonzero(pred | truth)
    cells = lesions.ravel()[somewhere].astype(np.int64) * (n_found + 1) + found.ravel()[somewhere]
    common = np.bincount(cells, minlength=(n_lesions + 1) * (n_found + 1)).reshape(n_lesions + 1, n_found + 1)
    sizes = common.sum(axis=1)[1:, None] + common.sum(axis=0)[None, 1:]
    dice = 2 * common[1:, 1:] / np.maximum(sizes, 1)
    boxes = ndimage.find_objects(lesions), ndimage.find_objects(found)
    pairs = []
    for t, p in zip(*linear_sum_assignment(dice, maximize=True), strict=True):
        if dice[t, p] > min_dice:
            here = tuple(
                slice(min(a.start, b.start), max(a.stop, b.stop))
                for a, b in zip(boxes[0][t], boxes[1][p], strict=True)
            )
            apart = surface.border_distances(found[here] == p + 1, lesions[here] == t + 1, spacing_mm)
            pairs.append((int(t) + 1, int(p) + 1, float(dice[t, p]), surface.hd_pooled_mm(apart)))
    return InstanceScores(len(pairs), n_found - len(pairs), n_lesions - len(pairs), tuple(pairs))

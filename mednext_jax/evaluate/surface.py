"""Distances between the surfaces of a predicted and a true mask, in mm.

"HD95" names three different numbers, all in use and up to a third apart; each has its own name here:

  hd95_mm               surface-area weighted: each directed distance is the 95th percentile over the area of
                        marching-cubes surface elements at voxel corners, and the larger one counts.
                        DeepMind's `surface-distance`, used by the official BraTS code.
  hd95_max_directed_mm  the larger of the two directed 95th percentiles over border voxels (MONAI).
  hd95_pooled_mm        the 95th percentile of both directions' border-voxel distances together (medpy).

Border voxels are the mask minus its erosion with the six-neighbour cross; percentiles interpolate linearly.
ASSD is the mean of the two directions' mean border-voxel distances. NSD (surface Dice) is area weighted.
If exactly one mask is empty a distance is infinite and NSD is 0; if both are, everything is NaN.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.spatial import cKDTree

from mednext_jax.evaluate import surfels


class SurfelDistances(NamedTuple):
    """Distance (mm) of each surface element to the other surface and its area (mm2), nearest first."""

    pred_mm: np.ndarray
    pred_mm2: np.ndarray
    truth_mm: np.ndarray
    truth_mm2: np.ndarray


class BorderDistances(NamedTuple):
    """Distance (mm) of each border voxel of one mask to the border of the other."""

    pred_mm: np.ndarray
    truth_mm: np.ndarray


def crop(*masks: np.ndarray) -> tuple[np.ndarray, ...]:
    """The masks (all of one shape) cut to the bounding box of their union; unchanged if all are empty."""
    box = bounding_box(np.logical_or.reduce(masks) if len(masks) > 1 else masks[0])
    return tuple(m[box] for m in masks)


def bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    """Slices of the smallest box holding a boolean mask; the whole array if it is empty."""
    box, kept = [], mask
    for axis in range(mask.ndim):
        hit = np.flatnonzero(kept.any(axis=tuple(a for a in range(mask.ndim) if a != axis)))
        low, high = (int(hit[0]), int(hit[-1]) + 1) if hit.size else (0, mask.shape[axis])
        box.append(slice(low, high))
        kept = kept[(slice(None),) * axis + (slice(low, high),)]
    return tuple(box)


def surfel_distances(pred: np.ndarray, truth: np.ndarray, spacing_mm: Sequence[float]) -> SurfelDistances:
    """Surface elements of two (D, H, W) bool masks, with areas and distances to the other surface.

    Source: the definition of DeepMind's `surface-distance` (as used by BraTS 2023), computed with a nearest
    neighbour search over surface points instead of two distance transforms.
    """
    areas = surfels.areas_mm2(tuple(spacing_mm))
    codes = [surfels.neighbour_codes(m) for m in crop(pred, truth)]
    points = [np.flatnonzero((c - 1).astype(np.uint8) < 254) for c in codes]  # neither 0 nor 255
    distances = _nearest_mm(*points, codes[0].shape, spacing_mm)
    columns = []
    for code, flat, distance in zip(codes, points, distances, strict=True):
        area = areas[code.ravel()[flat]]
        order = np.lexsort((area, distance))  # ties by area, so that sums round as in the source
        columns += [distance[order], area[order]]
    return SurfelDistances(*columns)


def border_distances(pred: np.ndarray, truth: np.ndarray, spacing_mm: Sequence[float]) -> BorderDistances:
    """Border voxels (mask minus erosion) of two (D, H, W) bool masks and their distances to each other."""
    borders = [_border(m) for m in crop(pred, truth)]
    points = [np.flatnonzero(b) for b in borders]
    return BorderDistances(*_nearest_mm(*points, borders[0].shape, spacing_mm))


def hd_mm(distances: SurfelDistances, percent: float = 95.0) -> float:
    """Area-weighted robust Hausdorff distance; 100 percent is the plain one."""
    pred = _area_percentile(distances.pred_mm, distances.pred_mm2, percent)
    truth = _area_percentile(distances.truth_mm, distances.truth_mm2, percent)
    return _larger(pred, truth)


def nsd(distances: SurfelDistances, tolerance_mm: float) -> float:
    """Normalised surface Dice: the share of both surfaces' area within `tolerance_mm` of the other."""
    total = distances.pred_mm2.sum() + distances.truth_mm2.sum()
    if not total:
        return float("nan")
    within = distances.pred_mm2[distances.pred_mm <= tolerance_mm].sum()
    within += distances.truth_mm2[distances.truth_mm <= tolerance_mm].sum()
    return float(within / total)


def hd_max_directed_mm(distances: BorderDistances, percent: float = 95.0) -> float:
    """The larger of the two directed percentiles over border voxels."""
    directed = [np.percentile(d, percent) if d.size and np.isfinite(d[0]) else np.inf for d in distances]
    return float("nan") if _absent(distances) else float(max(directed))


def hd_pooled_mm(distances: BorderDistances, percent: float = 95.0) -> float:
    """The percentile of the two directions' border-voxel distances taken together."""
    if _absent(distances):
        return float("nan")
    pooled = np.concatenate(distances)
    return float(np.percentile(pooled, percent)) if np.isfinite(pooled).all() else float("inf")


def assd_mm(distances: BorderDistances) -> float:
    """Average symmetric surface distance: the mean of the two directed mean border-voxel distances."""
    if _absent(distances):
        return float("nan")
    return float(np.mean([d.mean() if d.size else np.inf for d in distances]))


def _absent(distances: BorderDistances) -> bool:
    return distances.pred_mm.size == 0 and distances.truth_mm.size == 0


def _border(mask: np.ndarray) -> np.ndarray:
    """Voxels of the mask with an empty one among their six neighbours; outside the grid counts as empty."""
    inside = np.pad(mask, 1)
    core = (slice(1, -1),) * mask.ndim
    kept = mask.copy()
    for axis in range(mask.ndim):
        for step in (slice(0, -2), slice(2, None)):
            kept &= inside[core[:axis] + (step,) + core[axis + 1 :]]
    return mask & ~kept


def _nearest_mm(first: np.ndarray, second: np.ndarray, shape, spacing_mm) -> tuple[np.ndarray, np.ndarray]:
    """Distance of each point of two ascending lists of flat grid indices to the nearest of the other list."""
    return _directed_mm(first, second, shape, spacing_mm), _directed_mm(second, first, shape, spacing_mm)


def _directed_mm(source: np.ndarray, target: np.ndarray, shape, spacing_mm) -> np.ndarray:
    """Points that lie on both need no search; lengths come from whole-voxel offsets, so ties stay exact."""
    if not target.size:
        return np.full(source.shape, np.inf)
    shared = np.zeros(np.prod(shape), bool)
    shared[target] = True
    apart = ~shared[source]
    distances = np.zeros(source.shape)
    if apart.any():
        spacing = np.asarray(spacing_mm, float)
        points, goals = (np.stack(np.unravel_index(flat, shape), axis=-1) for flat in (source[apart], target))
        tree = cKDTree(goals * spacing, compact_nodes=False, balanced_tree=False)
        nearest = tree.query(points * spacing)[1]
        offsets = (points - goals[nearest]) * spacing
        distances[apart] = np.sqrt((offsets * offsets).sum(axis=1))
    return distances


def _area_percentile(distances: np.ndarray, areas: np.ndarray, percent: float) -> float:
    """Smallest distance at which `percent` of the area is reached; distances sorted. NaN without elements."""
    if not distances.size:
        return float("nan")
    reached = np.cumsum(areas) / areas.sum()
    return float(distances[min(np.searchsorted(reached, percent / 100), distances.size - 1)])


def _larger(a: float, b: float) -> float:
    """Maximum; an empty mask's NaN leaves the other mask's (infinite) distance."""
    return float(np.fmax(a, b))

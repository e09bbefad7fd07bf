"""Lesion-wise Dice and HD95 as the official BraTS 2023/2024 evaluation computes them.

Truth voxels whose dilations (18-neighbour element, a fixed number of voxel steps whatever the spacing) touch
form one lesion. A lesion is scored against the union of all predicted components (26-neighbour) that touch
its dilation. Lesions of at most `min_volume_mm3` are left out, found or not; a predicted component that
touches no lesion is a false positive of Dice 0 whatever its size. A lesion that is missed, and a false
positive, cost `PENALTY_MM`. With nothing left to score, Dice is 1 and HD95 0.

One predicted component may touch, and then counts for, several lesions: the official code does so.

Source: the definition in github.com/rachitsaluja/BraTS-2023-Metrics; the tests hold its numbers.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from scipy import ndimage

from mednext_jax.evaluate import surface

PENALTY_MM = 374.0  # official cost of a missing distance: the diagonal of the 240 x 240 x 155 mm grid
NEIGHBOURS_18 = ndimage.generate_binary_structure(3, 2)
NEIGHBOURS_26 = ndimage.generate_binary_structure(3, 3)


class Rules(NamedTuple):
    """A challenge's parameters: dilation steps in voxels, and the volume up to which truth is left out."""

    dilations: int
    min_volume_mm3: float


CHALLENGES = {
    "GLI": Rules(3, 50),
    "SSA": Rules(3, 50),
    "PED": Rules(3, 50),
    "MEN": Rules(1, 50),
    "MET": Rules(1, 2),
}


@dataclass(frozen=True)
class Lesion:
    """One row of the lesion table. Dice and HD95 are of the lesion against what was predicted there.

    `kind`: TP (found), FN (missed), FP (predicted where nothing is), small (truth below the volume limit).
    `centre_voxel` is the middle of the lesion's bounding box (of the predicted component for an FP).
    """

    kind: Literal["TP", "FN", "FP", "small"]
    truth_mm3: float
    predicted_mm3: float
    dice: float
    hd95_mm: float
    centre_voxel: tuple[int, int, int]


@dataclass(frozen=True)
class LesionScores:
    """Lesion-wise result of one region of one case."""

    dice: float
    hd95_mm: float
    tp: int
    fp: int
    fn: int
    lesions: tuple[Lesion, ...]


def score(pred: np.ndarray, truth: np.ndarray, spacing_mm, rules: Rules = CHALLENGES["SSA"]) -> LesionScores:
    """Scores two (D, H, W) bool masks lesion by lesion; `spacing_mm` is per array axis."""
    lesions = _lesions(pred, truth, spacing_mm, rules)
    scored = [x for x in lesions if x.kind != "small"]
    count = {kind: sum(x.kind == kind for x in lesions) for kind in ("TP", "FP", "FN")}
    return LesionScores(
        dice=sum(x.dice for x in scored) / len(scored) if scored else 1.0,
        hd95_mm=sum(x.hd95_mm for x in scored) / len(scored) if scored else 0.0,
        tp=count["TP"],
        fp=count["FP"],
        fn=count["FN"],
        lesions=tuple(lesions),
    )


def _lesions(pred: np.ndarray, truth: np.ndarray, spacing_mm, rules: Rules) -> list[Lesion]:
    """Table of all truth lesions and then all false positives."""
    box = _grown(surface.bounding_box(pred | truth), rules.dilations, truth.shape)
    origin = np.array([s.start for s in box])
    pred, truth = pred[box], truth[box]
    reach = ndimage.binary_dilation(truth, NEIGHBOURS_18, iterations=rules.dilations)
    reach, n_lesions = ndimage.label(reach, NEIGHBOURS_26)  # a lesion's label fills its own dilation too
    lesion = np.where(truth, reach, 0)
    component, n_components = ndimage.label(pred, NEIGHBOURS_26)
    volume = np.prod(np.asarray(spacing_mm, float))
    sizes = np.bincount(component.ravel(), minlength=n_components + 1)
    places, components = ndimage.find_objects(lesion, n_lesions), ndimage.find_objects(component)
    touching = _pairs(reach[pred], component[pred])
    rows = []
    for number, place in enumerate(places, start=1):
        touched = sorted(c for other, c in touching if other == number)
        here = _union([place, *(components[c - 1] for c in touched)])
        lesion_here = lesion[here] == number
        found_here = np.isin(component[here], touched)
        truth_mm3 = _volume_mm3(int(lesion_here.sum()), spacing_mm)
        small = truth_mm3 <= rules.min_volume_mm3
        rows.append(
            Lesion(
                kind="small" if small else "TP" if touched else "FN",
                truth_mm3=truth_mm3,
                predicted_mm3=float(sizes[touched].sum() * volume),
                dice=float(2 * (lesion_here & found_here).sum() / (lesion_here.sum() + sizes[touched].sum())),
                hd95_mm=_hd95_mm(found_here, lesion_here, spacing_mm) if touched else PENALTY_MM,
                centre_voxel=_centre(place, origin),
            )
        )
    matched = {c for _, c in touching}
    for number, place in enumerate(components, start=1):
        if number not in matched:
            predicted = float(sizes[number] * volume)
            rows.append(Lesion("FP", 0.0, predicted, 0.0, PENALTY_MM, _centre(place, origin)))
    return rows


def _hd95_mm(found: np.ndarray, lesion: np.ndarray, spacing_mm) -> float:
    return surface.hd_mm(surface.surfel_distances(found, lesion, spacing_mm))


def _volume_mm3(voxels: int, spacing_mm) -> float:
    """Multiplied axis by axis, as in the official code, so that a lesion right at the limit falls alike."""
    for step in spacing_mm:
        voxels = voxels * float(step)
    return voxels


def _pairs(reach: np.ndarray, component: np.ndarray) -> set[tuple[int, int]]:
    """(lesion, component) of every voxel where a predicted component lies in a lesion's dilation."""
    both = np.stack([reach, component])[:, reach > 0]
    return {(int(a), int(b)) for a, b in np.unique(both, axis=1).T}


def _grown(box, steps: int, shape) -> tuple[slice, ...]:
    pairs = zip(box, shape, strict=True)
    return tuple(slice(max(s.start - steps, 0), min(s.stop + steps, n)) for s, n in pairs)


def _union(boxes) -> tuple[slice, ...]:
    axes = zip(*boxes, strict=True)
    return tuple(slice(min(s.start for s in axis), max(s.stop for s in axis)) for axis in axes)


def _centre(box, origin: np.ndarray) -> tuple[int, int, int]:
    return tuple(int(o + (s.start + s.stop - 1) // 2) for s, o in zip(box, origin, strict=True))

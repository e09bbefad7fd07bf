"""Healthy anatomy: MNI152 tissue maps, bent into one person's head.

The maps are the ICBM 2009a symmetric averages that nilearn carries inside its wheel (Fonov et al.,
NeuroImage 54, 2011), so nothing is downloaded.
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from data_pipeline.simulate.grid import Grid, smooth_field

# MNI point that is put at the middle of the BraTS field of view, and that middle (field-of-view mm).
_MNI_MIDDLE = np.array([0.0, -17.0, 5.0])
_VIEW_MIDDLE_MM = np.array([119.5, 120.0, 77.0])
_SHARPENING = 1.6  # an average of 152 people is blurred; the exponent takes the tissue edges back
_T1_OF_TISSUE = (0.27, 0.65, 0.875)  # CSF, grey, white in the template's own T1
_SDF_STEP = 2  # template voxels per voxel of the distance map: it is smooth, and eight times cheaper
_SDF_PAD = 4


@dataclass(frozen=True)
class Template:
    """MNI152 maps, float32, prepared for one voxel size.

    Attributes:
      white, grey: (X, Y, Z) tissue fractions at 1 mm, low-passed to the voxel size.
      detail: (X, Y, Z) T1 signal that the tissue fractions do not explain (deep nuclei, pons).
      outside_mm: signed distance to the brain's surface, positive outside, every second voxel and padded.
      to_voxel: (4, 4), MNI mm to index of the 1 mm maps.
    """

    white: np.ndarray
    grey: np.ndarray
    detail: np.ndarray
    outside_mm: np.ndarray
    to_voxel: np.ndarray


@dataclass(frozen=True)
class Head:
    """One person's head, as drawn; angles in degrees, lengths in mm."""

    rotation_deg: tuple[float, float, float]
    scale: float
    shift_mm: tuple[float, float, float]
    bend_mm: float  # amplitude of the wide deformation, between people
    fold_mm: float  # amplitude of the fine one, between gyri
    fluid: float  # log odds added to CSF: atrophy when positive


@dataclass(frozen=True)
class Tissue:
    """Healthy tissue on a grid, float32 arrays of its shape; fractions sum to 1 everywhere.

    Attributes:
      csf, grey, white: fractions; outside the brain all is CSF.
      detail: T1 signal beyond them. outside_mm: signed distance to the brain's surface.
    """

    csf: np.ndarray
    grey: np.ndarray
    white: np.ndarray
    detail: np.ndarray
    outside_mm: np.ndarray


def check_installed() -> None:
    """Raises ModuleNotFoundError, with the command that helps, if nilearn is not there."""
    if importlib.util.find_spec("nilearn") is None:
        raise ModuleNotFoundError("the simulator needs nilearn's MNI152 maps: pip install 'mednext-jax[demo]'")


@functools.lru_cache(maxsize=1)
def _maps() -> tuple[np.ndarray, ...]:
    check_installed()
    from nilearn import datasets

    loaders = (
        datasets.load_mni152_wm_template,
        datasets.load_mni152_gm_template,
        datasets.load_mni152_template,
        datasets.load_mni152_brain_mask,
    )
    images = [load(resolution=1) for load in loaders]
    white, grey, t1, mask = (np.asarray(image.dataobj, dtype=np.float32) for image in images)
    return white, grey, t1, mask > 0.5, np.linalg.inv(images[0].affine)


@functools.lru_cache(maxsize=2)
def load_template(spacing_mm: float) -> Template:
    """MNI152 white, grey and T1 maps, sharpened, then low-passed for voxels of ``spacing_mm``.

    Raises:
      ModuleNotFoundError: nilearn is not installed; the message names the extra to install.
    """
    white, grey, t1, brain, to_voxel = _maps()
    csf = np.clip(1 - white - grey, 0, 1)
    expected = sum(level * part for level, part in zip(_T1_OF_TISSUE, (csf, grey, white), strict=True))
    detail = np.where(brain & (csf < 0.3), np.clip(t1 - expected, -0.12, 0.12), 0).astype(np.float32)
    total = white**_SHARPENING + grey**_SHARPENING + csf**_SHARPENING
    sigma = max(0.35 * spacing_mm - 0.2, 0.0)  # half-way between box average and point sample
    sharp = white**_SHARPENING / total, grey**_SHARPENING / total
    low = [ndimage.gaussian_filter(m, sigma) for m in (*sharp, detail)]
    # Padded: the mask touches the template's edge at the brain stem, and beyond must not count as brain.
    coarse = np.pad(brain[::_SDF_STEP, ::_SDF_STEP, ::_SDF_STEP], _SDF_PAD)
    distance = ndimage.distance_transform_edt(~coarse) - ndimage.distance_transform_edt(coarse)
    distance = ndimage.gaussian_filter(distance.astype(np.float32) * _SDF_STEP, 0.7)
    return Template(*low, distance, to_voxel)


def draw_head(rng: np.random.Generator) -> Head:
    """A head pose, size and shape. MNI152 is larger than people are: the mean scale takes it back."""
    return Head(
        rotation_deg=tuple(float(v) for v in rng.normal(0, (4, 4, 6))),
        scale=float(np.clip(rng.normal(0.925, 0.03), 0.85, 1.0)),
        shift_mm=tuple(float(v) for v in rng.normal(0, 2, 3)),
        bend_mm=float(rng.uniform(2.0, 4.5)),
        fold_mm=float(rng.uniform(0.6, 1.2)),
        fluid=float(rng.normal(0.1, 0.35)),
    )


def _rotation(angles_deg: tuple[float, float, float]) -> np.ndarray:
    matrix = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(angles_deg)):
        a, b = (axis + 1) % 3, (axis + 2) % 3
        turn = np.eye(3)
        turn[a, a] = turn[b, b] = np.cos(angle)
        turn[a, b], turn[b, a] = -np.sin(angle), np.sin(angle)
        matrix = turn @ matrix
    return matrix


def view_to_mni(head: Head) -> tuple[np.ndarray, np.ndarray]:
    """Affine part of the way from field-of-view mm to MNI mm: ``mni = matrix @ p + offset``."""
    matrix = np.diag([-1.0, -1.0, 1.0]) @ _rotation(head.rotation_deg) / head.scale  # LPS to RAS
    return matrix, _MNI_MIDDLE - matrix @ (_VIEW_MIDDLE_MM + head.shift_mm)


def bend(rng: np.random.Generator, head: Head, grid: Grid) -> list[np.ndarray]:
    """Displacement between people, three float32 arrays (mm) of the grid's shape."""
    wide = [smooth_field(rng, 55.0, grid) for _ in range(3)]
    fine = [smooth_field(rng, 16.0, grid) for _ in range(3)]
    return [
        np.float32(head.bend_mm / np.sqrt(3)) * a + np.float32(head.fold_mm / np.sqrt(3)) * b
        for a, b in zip(wide, fine, strict=True)
    ]


def sample(template: Template, head: Head, displacement: list[np.ndarray], grid: Grid) -> Tissue:
    """Healthy tissue at ``p + displacement(p)`` for every voxel ``p`` of ``grid``."""
    matrix, offset = view_to_mni(head)
    turn, move = template.to_voxel[:3, :3], template.to_voxel[:3, 3]
    matrix, offset = turn @ matrix, turn @ offset + move
    position = [axis + u for axis, u in zip(grid.axes_mm(), displacement, strict=True)]
    where = np.empty((3, *grid.shape), np.float32)
    for row in range(3):
        np.multiply(position[0], np.float32(matrix[row, 0]), out=where[row])
        where[row] += position[1] * np.float32(matrix[row, 1])
        where[row] += position[2] * np.float32(matrix[row, 2]) + np.float32(offset[row])

    def look(values: np.ndarray, at: np.ndarray, outside: str) -> np.ndarray:
        return ndimage.map_coordinates(values, at, order=1, mode=outside, output=np.float32)

    maps = template.white, template.grey, template.detail
    white, grey, detail = (look(values, where, "constant") for values in maps)
    where /= _SDF_STEP
    where += _SDF_PAD
    outside_mm = look(template.outside_mm, where, "nearest") * np.float32(head.scale)
    csf = np.clip(1 - white - grey, 0, 1) * np.float32(np.exp(head.fluid))
    total = csf + white + grey
    return Tissue(csf / total, grey / total, white / total, detail, outside_mm)

"""Signal to scan: slices, coil shading, motion, blur, noise, skull stripping, scanner units.

Order as in a real scan: the coil shades the object, a slice averages over its thickness, motion and blur
act on the slices, noise is added to them, and only then are they resampled to the atlas grid and stripped.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from data_pipeline.cohorts import CHANNELS
from data_pipeline.simulate.anatomy import Tissue
from data_pipeline.simulate.grid import Grid, smooth_field
from data_pipeline.simulate.recipes import Recipe


@dataclass(frozen=True)
class Scan:
    """How one sequence was acquired."""

    slice_thickness_mm: float
    slice_offset: float  # of the first slice, in thicknesses
    snr: float
    bias: float
    ghost_weight: float  # 0: the patient lay still
    ghost_shift_mm: float
    ghost_axis: int  # phase-encoding direction: 0 left-right, 1 front-back
    blur_mm: float
    units: float  # scanner units per signal 1


@dataclass(frozen=True)
class Strip:
    """The skull strip: how its surface departs from the brain's, in mm."""

    wobble_mm: float
    bad_mm: float  # 0, or how far a careless strip goes wrong in places


def draw_scans(rng: np.random.Generator, recipe: Recipe) -> dict[str, Scan]:
    """Draws the four acquisitions of one examination; thickness and noise belong to the scanner."""
    thickness = rng.uniform(*recipe.slice_thickness_mm)
    snr = rng.uniform(*recipe.snr)
    scans = {}
    for channel in CHANNELS:
        moved = rng.random() < recipe.ghost_probability
        weight = rng.uniform(*recipe.ghost_weight)
        scans[channel] = Scan(
            slice_thickness_mm=float(thickness),
            slice_offset=float(rng.random()),
            snr=float(snr * rng.uniform(0.85, 1.15)),
            bias=float(rng.uniform(*recipe.bias)),
            ghost_weight=float(weight if moved else 0.0),
            ghost_shift_mm=float(rng.uniform(12, 40)),
            ghost_axis=int(rng.integers(2)),
            blur_mm=float(rng.uniform(*recipe.blur_mm)),
            units=float(np.exp(rng.uniform(np.log(250), np.log(1500)))),
        )
    return scans


def draw_strip(rng: np.random.Generator, recipe: Recipe) -> Strip:
    """Draws the skull strip of one examination (one mask for all channels)."""
    bad = rng.random() < recipe.bad_strip_probability
    size = rng.uniform(4.0, 9.0)
    return Strip(float(rng.uniform(0.3, 0.8)), float(size if bad else 0.0))


def brain_mask(strip: Strip, seed: np.random.SeedSequence, tissue: Tissue, grid: Grid) -> np.ndarray:
    """The stripped brain, boolean. A bad strip leaves skull in one patch and cuts brain in another."""
    rng = np.random.default_rng(seed)
    surface = tissue.outside_mm + np.float32(strip.wobble_mm) * smooth_field(rng, 15.0, grid)
    wrong = smooth_field(rng, 60.0, grid)
    # Only the field's peaks count; skull is left behind more often, and further, than brain is cut.
    surface -= np.float32(strip.bad_mm) * (np.clip(wrong - 0.6, 0, 1) - 0.6 * np.clip(-wrong - 1.0, 0, 1))
    return _largest(surface < 0)


def _largest(mask: np.ndarray) -> np.ndarray:
    parts, count = ndimage.label(mask)
    if count < 2:
        return mask
    return parts == 1 + np.argmax(np.bincount(parts.ravel())[1:])


def slice_profiles(scan: Scan, grid: Grid) -> tuple[np.ndarray, np.ndarray] | None:
    """Matrices (slices, K) from voxels to slices and (K, slices) back; None for slices as thin as voxels."""
    thickness = scan.slice_thickness_mm
    if thickness <= grid.spacing_mm:
        return None
    z = grid.axis_mm(2)
    half = grid.spacing_mm / 2
    first = z[0] - half + (scan.slice_offset - 0.5) * thickness
    middle = np.arange(first, z[-1] + half + thickness / 2, thickness)
    low = np.maximum(z[None] - half, middle[:, None] - thickness / 2)
    high = np.minimum(z[None] + half, middle[:, None] + thickness / 2)
    average = np.clip(high - low, 0, None)
    keep = average.sum(1) > 0
    middle, average = middle[keep], average[keep]
    average /= average.sum(1, keepdims=True)
    back = np.clip(1 - np.abs(z[:, None] - middle[None]) / thickness, 0, None)  # linear between slices
    back /= back.sum(1, keepdims=True)
    return average.astype(np.float32), back.astype(np.float32)


def _along_z(image: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """``image`` (I, J, K) times ``matrix`` (N, K) along its last axis, term by term (no BLAS)."""
    out = np.zeros((matrix.shape[0], *image.shape[:2]), np.float32)
    planes = np.ascontiguousarray(np.moveaxis(image, 2, 0))
    for row, weights in enumerate(matrix):
        for column in np.flatnonzero(weights):
            out[row] += weights[column] * planes[column]
    return np.ascontiguousarray(np.moveaxis(out, 0, 2))


def _ghosted(image: np.ndarray, scan: Scan, grid: Grid) -> np.ndarray:
    step = max(1, round(scan.ghost_shift_mm / grid.spacing_mm))
    weight, axis = np.float32(scan.ghost_weight), scan.ghost_axis
    here = tuple(slice(step, None) if a == axis else slice(None) for a in range(3))
    there = tuple(slice(None, -step) if a == axis else slice(None) for a in range(3))
    out = image * (1 - 2 * weight)
    out[here] += weight * image[there]
    out[there] += weight * image[here]
    return out


def acquire(scan: Scan, seed: np.random.SeedSequence, signal: np.ndarray, mask: np.ndarray, grid: Grid) -> np.ndarray:
    """Scans one channel.

    Args:
      scan: how.
      seed: of shading and noise.
      signal: noise-free signal, float32, shape ``grid.shape``.
      mask: the stripped brain, boolean.

    Returns:
      int16, shape ``grid.shape``: at least 1 inside the mask, 0 outside.
    """
    rng = np.random.default_rng(seed)
    shade = smooth_field(rng, 130.0, grid)
    image = signal * np.exp(np.float32(scan.bias) * shade)
    profiles = slice_profiles(scan, grid)
    if profiles is not None:
        image = _along_z(image, profiles[0])
    if scan.ghost_weight:
        image = _ghosted(image, scan, grid)
    blur = scan.blur_mm / grid.spacing_mm
    if blur > 0.15:  # a narrower kernel has no weight outside its own voxel
        image = ndimage.gaussian_filter(image, (blur, blur, 0))
    noise = np.float32(0.7 / scan.snr)
    real = rng.standard_normal(image.shape, dtype=np.float32)
    other = rng.standard_normal(image.shape, dtype=np.float32)
    image = np.hypot(image + noise * real, noise * other)  # Rician: the magnitude of two noisy channels
    if profiles is not None:
        image = _along_z(image, profiles[1])
    values = np.clip(np.rint(image * np.float32(scan.units)), 1, np.iinfo(np.int16).max)
    return np.where(mask, values, 0).astype(np.int16)

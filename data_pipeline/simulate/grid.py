"""The BraTS field of view at any voxel size, and smooth random fields that do not depend on it.

Everything is placed in *field-of-view millimetres* ``p``: voxel ``i`` of the 1 mm BraTS grid sits at
``p = i``. A coarser grid covers the same box, so its voxel ``i`` sits at ``p = i * s + (s - 1) / 2``.
Fields live on knots at fixed millimetre positions; a case therefore has the same anatomy and the same
tumour at 1 mm and at 3 mm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

FIELD_OF_VIEW_MM = (240, 240, 155)
_SPLINE_FWHM = 1.445  # width at half height of the cubic B-spline, in knot distances
_SPLINE_POWER = 151.0 / 315.0  # integral of the squared cubic B-spline


@dataclass(frozen=True)
class Grid:
    """A box of voxels inside the BraTS field of view.

    Attributes:
      spacing_mm: edge of the cubic voxels.
      start: index (i, j, k) of the first voxel in the whole grid of that spacing.
      shape: number of voxels (I, J, K) along left, posterior and superior.
    """

    spacing_mm: float
    start: tuple[int, int, int]
    shape: tuple[int, int, int]

    def axis_mm(self, axis: int) -> np.ndarray:
        """Positions of the voxel centres along one axis, in field-of-view mm, shape (shape[axis],)."""
        index = self.start[axis] + np.arange(self.shape[axis])
        return index * self.spacing_mm + (self.spacing_mm - 1) / 2

    def axes_mm(self) -> list[np.ndarray]:
        """The three axes as float32 arrays that broadcast to ``shape``."""
        return [
            self.axis_mm(axis).astype(np.float32).reshape([-1 if a == axis else 1 for a in range(3)])
            for axis in range(3)
        ]

    def affine(self) -> np.ndarray:
        """Voxel index to RAS+ mm, (4, 4): diag(-s, -s, s), and translation (0, 239, 0) at 1 mm."""
        first = [self.axis_mm(axis)[0] for axis in range(3)]
        affine = np.diag([-self.spacing_mm, -self.spacing_mm, self.spacing_mm, 1.0])
        affine[:3, 3] = 0.0 - first[0], FIELD_OF_VIEW_MM[1] - 1 - first[1], first[2]
        return affine

    def box(self, inside: np.ndarray, margin_mm: float, other: Grid) -> Grid:
        """The smallest part of ``other`` that holds every true voxel of ``inside`` (on this grid).

        Args:
          inside: boolean, shape ``self.shape``, with at least one true voxel.
          margin_mm: space added on every side; the result never leaves ``other``.
          other: the grid to cut from; may have another spacing.
        """
        start, shape = [], []
        for axis in range(3):
            hit = np.flatnonzero(inside.any(axis=tuple(a for a in range(3) if a != axis)))
            own, positions = self.axis_mm(axis), other.axis_mm(axis)
            low = np.searchsorted(positions, own[hit[0]] - self.spacing_mm / 2 - margin_mm)
            high = np.searchsorted(positions, own[hit[-1]] + self.spacing_mm / 2 + margin_mm)
            low, high = min(low, len(positions) - 1), max(high, low + 1)
            start.append(other.start[axis] + int(low))
            shape.append(int(min(high, len(positions)) - low))
        return Grid(other.spacing_mm, tuple(start), tuple(shape))

    def slices_in(self, outer: Grid) -> tuple[slice, slice, slice]:
        """Where this box lies in an array on ``outer`` (same spacing)."""
        return tuple(slice(a - b, a - b + n) for a, b, n in zip(self.start, outer.start, self.shape, strict=True))


def whole_grid(spacing_mm: float) -> Grid:
    """The whole BraTS grid: (240, 240, 155) at 1 mm, (80, 80, 52) at 3 mm."""
    return Grid(spacing_mm, (0, 0, 0), tuple(math.ceil(n / spacing_mm - 1e-9) for n in FIELD_OF_VIEW_MM))


def interpolate(values: np.ndarray, first_mm: tuple[float, ...], step_mm: float, grid: Grid) -> np.ndarray:
    """Sum of cubic B-splines with coefficients ``values``, at the voxels of ``grid``.

    With a smooth array as coefficients it is that array, resampled and slightly smoothed. Taps are added
    one by one instead of by a matrix product, so the result does not depend on the BLAS or its threads.

    Args:
      values: coefficients, (A, B, C), one per knot.
      first_mm: position of knot (0, 0, 0); step_mm: distance of knots. Outside, edge knots repeat.
      grid: where to evaluate.

    Returns:
      float32, shape ``grid.shape``.
    """
    out = np.asarray(values, np.float32)
    for axis in (2, 1, 0):  # the slowest axis last: the big products then run over contiguous rows
        u = (grid.axis_mm(axis) - first_mm[axis]) / step_mm
        base = np.floor(u).astype(int)
        t = u - base
        taps = ((1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3)
        column = [-1 if a == axis else 1 for a in range(3)]
        total = None
        for offset, weight in enumerate(taps):
            index = np.clip(base + offset - 1, 0, out.shape[axis] - 1)
            part = np.take(out, index, axis=axis)
            part *= (weight / 6).astype(np.float32).reshape(column)
            total = part if total is None else np.add(total, part, out=total)
        out = total
    return out


def smooth_field(rng: np.random.Generator, fwhm_mm: float, grid: Grid) -> np.ndarray:
    """Gaussian-like random field of mean 0 and variance 1, float32, shape ``grid.shape``.

    It is white noise under a kernel of the given width, drawn over the whole field of view: one state of
    ``rng`` gives one field, on whatever grid it is looked at.
    """
    step = fwhm_mm / _SPLINE_FWHM
    count = [math.ceil(n / step) + 4 for n in FIELD_OF_VIEW_MM]
    knots = rng.standard_normal(count, dtype=np.float32) * np.float32(_SPLINE_POWER**-1.5)
    return interpolate(knots, (-1.5 * step,) * 3, step, grid)


def child(seed: np.random.SeedSequence, number: int) -> np.random.SeedSequence:
    """The numbered child of a seed; unlike ``seed.spawn`` it has no memory of earlier calls."""
    return np.random.SeedSequence(seed.entropy, spawn_key=(*seed.spawn_key, number))

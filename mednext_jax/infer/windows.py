"""Where the windows of a volume lie, how their voxels are weighted, which mirror images are averaged.

Source: positions, Gaussian and smallest weight as in MONAI's ``sliding_window_inference``; mirrors as in
nnU-Net.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

SMALLEST_WEIGHT = 1e-3  # so that a voxel seen by window corners alone is not divided by almost nothing
NO_MIRROR = ((False, False, False),)
ALL_MIRRORS = tuple(itertools.product((False, True), repeat=3))


class Batch(NamedTuple):
    """Windows computed together: first voxels (B, 3), mirrored axes (B, 3), 0 for those that fill up (B,)."""

    starts: np.ndarray
    mirrors: np.ndarray
    valid: np.ndarray


def window_starts(shape: Sequence[int], patch_voxels: Sequence[int], overlap: float) -> np.ndarray:
    """First voxels of the windows that cover ``shape`` (each axis at least the patch), (N, 3) int32.

    Neighbours are ``int(patch * (1 - overlap))`` voxels apart, at least one; the last ends with the volume.
    """
    axes = []
    for size, patch in zip(shape, patch_voxels, strict=True):
        step = max(int(patch * (1 - overlap)), 1)
        axes.append([min(i * step, size - patch) for i in range(math.ceil((size - patch) / step) + 1)])
    return np.array(list(itertools.product(*axes)), np.int32)


def batches(starts: np.ndarray, flips: bool, windows_per_batch: int) -> Iterator[Batch]:
    """Every window, with its mirror images if ``flips``, in batches of one size; the last is filled up."""
    mirrors = np.array(ALL_MIRRORS if flips else NO_MIRROR)
    items = [(start, mirror) for start in starts for mirror in mirrors]
    for first in range(0, len(items), windows_per_batch):
        chunk = items[first : first + windows_per_batch]
        missing = windows_per_batch - len(chunk)
        chunk_starts, chunk_mirrors = zip(*(chunk + chunk[:1] * missing), strict=True)
        valid = np.array([1.0] * (windows_per_batch - missing) + [0.0] * missing, np.float32)
        yield Batch(np.stack(chunk_starts), np.stack(chunk_mirrors), valid)


def importance_map(patch_voxels: Sequence[int], mode: str, sigma_scale: float) -> np.ndarray:
    """Weight of a window's voxels, (d, h, w) float32: ones, or a Gaussian of ``sigma_scale * patch``."""
    if mode == "constant":
        return np.ones(tuple(patch_voxels), np.float32)
    if mode != "gaussian":
        raise ValueError(f"mode is {mode!r}; it must be 'gaussian' or 'constant'")
    offsets = [(np.arange(size) - (size - 1) / 2) / (sigma_scale * size) for size in patch_voxels]
    depth, height, width = (np.exp(-(offset**2) / 2) for offset in offsets)
    weights = depth[:, None, None] * height[:, None] * width
    return np.maximum(weights, SMALLEST_WEIGHT).astype(np.float32)

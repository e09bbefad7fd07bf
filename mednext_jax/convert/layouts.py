"""Array layouts: PyTorch keeps (out, in, *k) or (in, out, *k), we keep (*k, in, out) throughout.

    conv        (out, in / groups, *k)  a convolution; also the depthwise transposed one, (C, 1, *k): not
    mirrored transposed  (in, out, *k)           a transposed convolution that mixes channels
    linear      (out, in)
    grn         (1, C, 1, ...)          one number per channel, ours is (C,)
    vector      (C,)
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def from_torch(array: np.ndarray, layout: str) -> np.ndarray:
    """``array`` in our layout, float32 and contiguous (a copy unless nothing changes)."""
    if layout in ("conv", "linear"):
        array = np.moveaxis(array, (0, 1), (-1, -2))
    elif layout == "transposed":
        array = np.moveaxis(array, (0, 1), (-2, -1))
    elif layout == "grn":
        array = array.reshape(-1)
    return np.ascontiguousarray(array, dtype=np.float32)


def to_torch(array: np.ndarray, layout: str, spatial: int) -> np.ndarray:
    """The inverse of :func:`from_torch` for a network with ``spatial`` (2 or 3) axes."""
    if layout in ("conv", "linear"):
        array = np.moveaxis(array, (-1, -2), (0, 1))
    elif layout == "transposed":
        array = np.moveaxis(array, (-2, -1), (0, 1))
    elif layout == "grn":
        array = array.reshape(1, -1, *(1,) * spatial)
    return np.ascontiguousarray(array)


def torch_shape(shape: Sequence[int], layout: str, spatial: int) -> tuple[int, ...]:
    """The shape that :func:`to_torch` gives an array of ``shape``."""
    if layout in ("conv", "linear"):
        return (shape[-1], shape[-2], *shape[:-2])
    if layout == "transposed":
        return (shape[-2], shape[-1], *shape[:-2])
    if layout == "grn":
        return (1, *shape, *(1,) * spatial)
    return tuple(shape)

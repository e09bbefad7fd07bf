"""UpKern: a network with large kernels, initialised from a trained one with small kernels.

Source: Roy et al., MedNeXt, MICCAI 2023 (arXiv:2303.09975), section 2.3; upstream ``run/load_weights.py``.
The kernel is resampled linearly along each axis, voxel centres aligned as in torch's
``interpolate(mode="trilinear", align_corners=False)``, without rescaling its magnitude. Upstream calls the
trilinear mode for every kernel and so raises in 2-D; here the same rule works in any number of dimensions.
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def can_grow(source: Sequence[int], wanted: Sequence[int]) -> bool:
    """Whether a kernel of shape ``source`` (spatial axes first, then in and out) can grow to ``wanted``.

    True when both are odd along every spatial axis, none shrinks, and the channels agree.
    """
    spatial = list(zip(source[:-2], wanted[:-2], strict=False))
    return (
        len(source) == len(wanted) > 2
        and tuple(source[-2:]) == tuple(wanted[-2:])
        and tuple(source) != tuple(wanted)
        and all(small % 2 == 1 and large % 2 == 1 and small <= large for small, large in spatial)
    )


def grow(kernel: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """Resample a kernel to larger odd spatial ``sizes``.

    Args:
      kernel: (k, k, k, in, out), or (k, k, in, out) in 2-D.
      sizes: the wanted spatial size, one number per spatial axis.

    Returns: the kernel of shape ``(*sizes, in, out)`` in its own dtype.

    Raises:
      ValueError: a size is even, smaller than the kernel's, or the number of axes differs.
    """
    wanted = (*sizes, *kernel.shape[-2:])
    if tuple(wanted) != kernel.shape and not can_grow(kernel.shape, wanted):
        raise ValueError("UpKern enlarges odd kernels to larger odd ones, "
                         f"not {kernel.shape[:-2]} to {tuple(sizes)}")
    result = kernel.astype(np.float64)
    for axis, size in enumerate(sizes):
        if size != kernel.shape[axis]:
            result = np.moveaxis(np.tensordot(_weights(kernel.shape[axis], size), result, (1, axis)), 0, axis)
    return np.ascontiguousarray(result, dtype=kernel.dtype)


def _weights(small: int, large: int) -> np.ndarray:
    """(large, small) matrix of linear interpolation between voxel centres, constant beyond the outermost."""
    scale = np.float32(small) / np.float32(large)  # float32 as in torch: the coordinates round alike
    centres = np.maximum(scale * (np.arange(large, dtype=np.float32) + np.float32(0.5)) - np.float32(0.5), 0)
    below = np.minimum(centres.astype(int), small - 1)
    above = np.minimum(below + 1, small - 1)
    weights = np.zeros((large, small))
    rows = np.arange(large)
    np.add.at(weights, (rows, below), 1 - (centres - below))
    np.add.at(weights, (rows, above), centres - below)
    return weights

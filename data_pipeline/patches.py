"""One training crop: where it lies in a case, and how it is cut from the memory-mapped volume.

NumPy only. A crop is a start corner plus a size, both in voxels of the stored (brain-cropped) grid. Where
the volume is smaller than the patch, it lies in the middle of the patch (the odd voxel of padding goes to
the end of the axis) and the rest is zero: background in the label, "outside the brain" in the image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

Start = tuple[int, int, int]


def sample_generator(seed: int, index: int) -> np.random.Generator:
    """Returns the random generator of one sample.

    Counter-based (Philox keyed by seed and index), so a sample's decisions do not depend on which thread,
    process or machine makes them, nor on the samples before it.

    Args:
      seed: non-negative, below 2**64.
      index: global sample index, non-negative.
    """
    return np.random.Generator(np.random.Philox(key=np.array([seed, index], np.uint64)))


def choose_start(
    shape: Sequence[int],
    patch_voxels: Sequence[int],
    foreground: Mapping[str, np.ndarray],
    foreground_fraction: float,
    generator: np.random.Generator,
) -> Start:
    """Chooses the start corner of one crop, oversampling the foreground.

    With probability ``foreground_fraction`` the crop is centred on a random voxel of a random region that
    is present, then moved inside the volume, so it always contains that voxel; otherwise every position
    inside the volume is equally likely. A case without foreground always gets the latter. The coin is
    tossed per sample rather than per position in the batch, so mixing cohorts in a fixed rhythm cannot
    give one cohort all the foreground.

    Args:
      shape: (D, H, W) of the volume.
      patch_voxels: (d, h, w) of the crop, any positive size.
      foreground: region name -> (N, 3) voxel indices (z, y, x); N may be 0.
      foreground_fraction: probability in [0, 1].
      generator: consumed by this call.

    Returns:
      Start corner (z, y, x); negative on an axis where the volume is smaller than the patch.

    Source: Isensee et al., nnU-Net, Nature Methods 2021 (33 % of the patches centred on a random
    foreground class); there the share is fixed per batch.
    """
    present = [voxels for voxels in foreground.values() if len(voxels)]
    if present and generator.random() < foreground_fraction:
        voxels = present[generator.integers(len(present))]
        voxel = np.asarray(voxels[generator.integers(len(voxels))], np.int64)  # stored unsigned, perhaps
        wanted = voxel - np.asarray(patch_voxels) // 2
    else:
        room = np.maximum(np.asarray(shape) - patch_voxels, 0)
        wanted = generator.integers(0, room, endpoint=True)
    z, y, x = (
        min(max(int(w), 0), size - patch) if size >= patch else -((patch - size) // 2)
        for w, size, patch in zip(wanted, shape, patch_voxels, strict=True)
    )
    return z, y, x


def cut(volume: np.ndarray, start: Start, out: np.ndarray) -> None:
    """Copies a crop into ``out``, converting its dtype and filling zeros outside the volume.

    Reads only the pages of a memory-mapped volume that the crop touches, and writes straight into the
    batch, plane by plane: a plane stays in the processor's cache while it is converted.

    Args:
      volume: (D, H, W) or (D, H, W, C); finite if it is float16.
      start: corner of the crop, may be negative (see ``choose_start``).
      out: (d, h, w) or (d, h, w, C), overwritten.
    """
    low = [max(s, 0) for s in start]
    high = [min(s + patch, size) for s, patch, size in zip(start, out.shape, volume.shape, strict=False)]
    inside = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start, strict=True))
    if any(a > s or b < s + patch for a, b, s, patch in zip(low, high, start, out.shape, strict=False)):
        out[...] = 0
    target = out[inside]
    source = volume[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
    widen = volume.dtype == np.float16 and out.dtype == np.float32
    for plane in range(len(target)):
        if widen:
            _half_to_single(source[plane], target[plane])
        else:
            np.copyto(target[plane], source[plane], casting="same_kind")


def _half_to_single(half: np.ndarray, single: np.ndarray) -> None:
    """Converts finite float16 to float32, exactly, by moving the bits.

    Sign, exponent and mantissa are shifted to their float32 places, then the exponents' different biases
    (15 and 127) are made up for by a factor of 2**112, which also renormalises subnormal numbers. NumPy's
    own conversion works number by number: 12.1 ms of processor time for 128^3 x 4 against 3.3 ms.
    """
    bits = single.view(np.int32)
    np.copyto(bits, half.view(np.int16))  # the sign now fills bits 15 to 31
    np.left_shift(bits, 13, out=bits)
    np.bitwise_and(bits, np.int32(0x0FFFE000 - 2**31), out=bits)  # sign bit, 5 of exponent, 10 of mantissa
    np.multiply(single, np.float32(2.0**112), out=single)

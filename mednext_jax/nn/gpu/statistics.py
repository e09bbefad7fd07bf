"""Mean and squared deviation of every channel as a GPU kernel (mednext_jax/nn/gpu/triton.py): one pass over memory.

XLA transposes an array first whose last axis, the channels, stays; in float32, that is three more arrays.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mednext_jax.nn.gpu import triton

VOXELS, CHANNELS = 128, 32  # of a block
PROGRAMS = 264  # per sample: two for each core of a large GPU


def usable(x: Array) -> bool:
    """Whether the kernel takes x (B, *spatial, C)."""
    return triton.usable(x) and x.shape[-1] % 16 == 0


def mean_and_squares(x: Array) -> tuple[Array, Array]:
    """Mean, and sum of squared deviations from it, over space: x (B, *spatial, C) to (B, C) each, float32."""
    rows = x.reshape(x.shape[0], -1, x.shape[-1])
    kernel, counts = _statistics(rows.shape[1:])
    programs = len(counts)

    def fast(x: Array) -> list[Array]:
        many = triton.block(x.shape[-1], CHANNELS)
        result = jax.ShapeDtypeStruct((x.shape[0], programs, x.shape[-1]), jnp.float32)
        grid = (x.shape[0] * programs, x.shape[-1] // many)
        return triton.launch(kernel, grid, [result, result], [x], flops=4 * x.size, warps=max(VOXELS * many // 512, 1))

    def reference(x: Array) -> tuple[Array, Array]:
        wide = x.astype(jnp.float32)
        mean = wide.mean(1, keepdims=True)
        squares = jnp.square(wide - mean).sum(1, keepdims=True)
        alone = jnp.arange(programs)[:, None] == 0
        return jnp.broadcast_to(mean, (x.shape[0], programs, x.shape[-1])), jnp.where(alone, squares, 0.0)

    means, squares = triton.with_reference(fast, reference, (True,), 2)(rows)
    share = jnp.asarray(counts / counts.sum(), jnp.float32)[:, None]
    mean = (means * share).sum(1)
    # Programs' own squares are about their own means (Chan et al., 1983).
    between = (jnp.square(means - mean[:, None]) * share).sum(1) * rows.shape[1]
    return mean, squares.sum(1) + between


@triton.kept
def _statistics(sizes: tuple[int, int]):
    """The kernel, and the number of voxels of each program, (programs,)."""
    voxels, channels = sizes
    many = triton.block(channels, CHANNELS)
    each = -(-voxels // (VOXELS * PROGRAMS))
    counts = np.diff(np.append(np.arange(0, voxels, VOXELS * each), voxels))
    programs = len(counts)

    def statistics(x_ref, mean_ref, squares_ref):
        place, part = triton.place(0), triton.place(1)
        sample, begin = triton.divided(place, programs)
        channel = part * many + jnp.arange(many)

        def tile(i):
            row = (begin * each + i) * VOXELS + jnp.arange(VOXELS)
            real = (row < voxels)[:, None]
            at = (sample * voxels + row)[:, None] * channels + channel[None, :]
            return triton.load_wide(x_ref.at[at], real), real

        # Every place of the block adds up about the first number that it sees, so that digits are kept.
        pivot, _ = tile(0)

        def step(i, sums):
            number, total, squares = sums
            x, real = tile(i)
            apart = jnp.where(real, x - pivot, 0.0)
            return number + real.astype(jnp.float32), total + apart, triton.multiply_add(apart, apart, squares)

        zero = jnp.zeros((VOXELS, many), jnp.float32)
        number, total, squares = jax.lax.fori_loop(0, each, step, (jnp.zeros((VOXELS, 1), jnp.float32), zero, zero))
        own = total / jnp.maximum(number, 1.0)
        mean = ((pivot + own) * number).sum(0) / number.sum()
        squares = squares - total * own + jnp.square(pivot + own - mean[None, :]) * number
        here = place * channels + channel
        mean_ref[here] = mean
        squares_ref[here] = squares.sum(0)

    return statistics, counts

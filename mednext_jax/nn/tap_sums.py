"""The kernel gradient of the depthwise operations: one sum over batch and space for every kernel tap."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from mednext_jax.nn.slabs import counted_loop
from mednext_jax.nn.windows import accumulator, every_tap, rows_at_once, window


def tap_sums(padded: Array, padded_g: Array, taps: Array, out: Sequence[int], stride: int) -> Array:
    """Kernel gradient: ``sum over batch and space of x[stride * i + t - k // 2] * g[i]``, (*k, C).

    Args: the input and the output's gradient, both padded; ``out``: the output's spatial sizes.
    """
    sizes = taps.shape[:-1]
    if len(sizes) == 2:
        padded, padded_g, sizes, out = padded[:, None], padded_g[:, None], (1, *sizes), (1, *out)
    by_rows = jax.default_backend() == "cpu"
    sums = (_tap_sums_by_rows if by_rows else _tap_sums_by_planes)(padded, padded_g, sizes, out, stride)
    return sums.reshape(taps.shape).astype(taps.dtype)


def _tap_sums_by_planes(x: Array, g: Array, sizes: Sequence[int], out: Sequence[int], stride: int) -> Array:
    """The sums for one plane of the kernel at a time, over the whole arrays, (kz, ky * kx, C): what suits a GPU.

    In two reductions per tap, the first of them over few rows. So short a one is a loop to XLA there, and the
    loops of all taps become one kernel, which reads x and g once; of whole sums it puts two or three into a kernel.
    The barrier keeps XLA from making one reduction of the two.
    """
    dtype = accumulator(x, g)
    kz, *plane = sizes
    depth, height, width = out
    rows = rows_at_once()
    out = (depth, height + -height % rows, width)

    def by_rows(seen: Array) -> Array:
        return seen.astype(dtype).reshape(*seen.shape[:2], -1, rows, *seen.shape[-2:])

    here = by_rows(window(g, [k // 2 for k in sizes], out, 1))

    def one(z: Array) -> Array:
        near = jax.lax.dynamic_slice_in_dim(x, z, stride * (depth - 1) + 1, 1)
        products = [by_rows(window(near, (0, *tap), out, stride)) * here for tap in every_tap(plane)]
        sums = jax.lax.optimization_barrier([product.sum(3) for product in products])
        return jnp.stack([total.sum((1, 2, 3)) for total in sums])

    # Samples are added up last: where they lie on several devices, one exchange serves all planes and blocks.
    return jax.lax.map(one, jnp.arange(kz)).sum(2)


def _tap_sums_by_rows(x: Array, g: Array, sizes: Sequence[int], out: Sequence[int], stride: int) -> Array:
    """The same sums, few rows of a plane at a time, so that they stay in cache for all taps, (taps, C).

    The products of the rows are added up in one pass that XLA vectorises; only their sum, one row per tap, is reduced
    over the width at the end. Rows that are read without gaps have one axis for voxels and channels: an innermost
    loop over 32 or 64 channels would be unrolled before it could be vectorised. Rows of g are copied with their
    margins: without, all of them would begin in the same few lines of the cache, and push each other out.
    """
    dtype = accumulator(x, g)
    kz, ky, kx = sizes
    batch, channels = g.shape[0], g.shape[-1]
    depth, height, width = out
    n_rows = rows_at_once()
    pieces = -(-height // n_rows)
    apart = 1  # along a row, from one voxel to the next
    if stride == 1:
        x, g = (a.reshape(*a.shape[:3], math.prod(a.shape[3:])) for a in (x, g))
        apart, width = channels, width * channels
    zero = jnp.uint32(0)
    rest = (zero,) * (x.ndim - 4)
    # No division in the loop, which XLA makes a kernel of its own.
    taps = jnp.asarray(list(every_tap((kz, ky))), jnp.uint32)

    def piece(i: Array, totals: list[Array]) -> list[Array]:
        z, y = i // pieces, i % pieces * n_rows
        start = (zero, z + kz // 2, y + ky // 2, zero, *rest)
        here = jax.lax.dynamic_slice(g, start, (batch, 1, n_rows, *g.shape[3:])).astype(dtype)

        def tap(t: Array, totals: list[Array]) -> list[Array]:
            tz, ty = jax.lax.dynamic_index_in_dim(taps, t, keepdims=False)
            first = stride * y + ty

            def row(j: int) -> Array:
                return here[:, :, j : j + 1, kx // 2 * apart : kx // 2 * apart + width]

            def near(j: int, tx: int) -> Array:
                # Each row by a slice of its own, which is fused with its use; one of all rows would be a copy.
                start = (zero, stride * z + tz, first + stride * j, zero + tx * apart, *rest)
                seen = jax.lax.dynamic_slice(x, start, (batch, 1, 1, stride * (width - 1) + 1, *x.shape[4:]))
                return seen[:, :, :, ::stride].astype(dtype)

            def added(total: Array, tx: int) -> Array:
                products = functools.reduce(jax.lax.add, [near(j, tx) * row(j) for j in range(n_rows)])
                old = jax.lax.dynamic_slice_in_dim(total, t, 1)
                return jax.lax.dynamic_update_slice_in_dim(total, old + products[None], t, 0)

            return [added(total, tx) for tx, total in enumerate(totals)]

        return counted_loop(kz * ky, tap, totals)

    zeros = [jnp.zeros((kz * ky, batch, 1, 1, width, *g.shape[4:]), dtype)] * kx
    totals = counted_loop(depth * pieces, piece, zeros)
    return jnp.stack([total.reshape(kz * ky, -1, channels).sum(1) for total in totals], 1).reshape(-1, channels)

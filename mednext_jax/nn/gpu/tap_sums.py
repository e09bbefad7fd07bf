"""The kernel gradient of the depthwise operations as a GPU kernel (mednext_jax/nn/gpu/triton.py).

A program goes through some rows with one sum per tap, of one plane of the kernel, in registers.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from mednext_jax.nn.gpu import triton
from mednext_jax.nn.gpu.depthwise import CHANNELS, ROW, Plain, spatial
from mednext_jax.nn.windows import every_tap

PROGRAMS = 512  # among which a sample's rows are divided
MOST_TAPS = 9  # whose sums the registers hold


def tap_sums(x: Array, g: Array, taps: Array, stride: int, plain: Plain) -> Array:
    """``sum over batch and space of x[stride * i + t - k // 2] * g[i]``: (*k, C), float32.

    Args: x (B, *spatial, C) and g (B, *out, C), which :func:`depthwise.usable` takes; taps (*k, C); ``plain``: the
    operation whose kernel gradient this is, without kernels, for what they cannot do.
    """
    shape, channels = taps.shape, taps.shape[-1]
    x, g, taps = spatial(x, 1), spatial(g, 1), spatial(taps, 0)
    sizes, strides = taps.shape[:-1], tuple(stride if n > 1 else 1 for n in x.shape[1:-1])
    kernel, programs, groups, row = _kernel(x.shape[1:], g.shape[1:-1], sizes, strides)
    many = triton.block(channels, CHANNELS)

    def fast(x: Array, g: Array) -> list[Array]:
        result = jax.ShapeDtypeStruct((x.shape[0], programs, math.prod(sizes), channels), jnp.float32)
        grid = (x.shape[0] * programs, groups, channels // many)
        work = 2 * g.size * math.prod(sizes)
        return triton.launch(kernel, grid, [result], (x, g), flops=work, warps=triton.warps(row * many, 8))

    def reference(x: Array, g: Array) -> tuple[Array]:
        def of_one(x: Array, g: Array) -> Array:
            def forward(taps: Array) -> Array:
                return plain("down" if stride == 2 else "same", x[None].astype(jnp.float32), taps, g.shape[:-1])

            return jax.vjp(forward, jnp.zeros(taps.shape, jnp.float32))[1](g[None].astype(jnp.float32))[0]

        sums = jax.vmap(of_one)(x, g).reshape(x.shape[0], 1, math.prod(sizes), channels)
        return (jnp.pad(sums, ((0, 0), (0, programs - 1), (0, 0), (0, 0))),)

    (parts,) = triton.with_reference(fast, reference, (True, True), 1)(x, g)
    return parts.sum((0, 1)).reshape(shape)


@triton.kept
def _kernel(
    sizes: tuple[int, ...], out: tuple[int, ...], taps: tuple[int, ...], strides: tuple[int, ...]
) -> tuple[Callable, int, int, int]:
    """The kernel, its programs per sample, the groups of taps among which they are divided, and the row."""
    depth, height, width, channels = sizes
    kz, ky, kx = taps
    row, many = triton.block(out[2], ROW), triton.block(channels, CHANNELS)
    parts = 1 if ky * kx <= MOST_TAPS else ky
    own = list(every_tap((ky // parts, kx)))
    pieces = -(-out[2] // row)
    rows = out[0] * out[1] * pieces
    each = -(-rows // PROGRAMS)
    programs = -(-rows // each)

    def depthwise_kernel_gradient(x_ref, g_ref, sums_ref):
        place, group, part = (triton.place(axis) for axis in range(3))
        sample, begin = triton.divided(place, programs)
        tz, first = triton.divided(group, parts)
        channel = part * many + jnp.arange(many)

        def step(i, sums):
            number = begin * each + i
            rest, column = triton.divided(number, pieces)
            z, y = triton.divided(rest, out[1])
            across = column * row + jnp.arange(row)
            real = (across < out[2]) & (number < rows)
            line = ((sample * out[0] + z) * out[1] + y) * (out[2] * channels)
            at = line + across[:, None] * channels + channel[None, :]
            here = triton.load(g_ref.at[at], mask=real[:, None], other=0.0).astype(jnp.float32)
            to_z, to_y = strides[0] * z + tz - kz // 2, strides[1] * y + first - ky // 2
            to_x = strides[2] * across - kx // 2
            begins = ((sample * depth + to_z) * height + to_y) * (width * channels)
            lanes = begins + to_x[:, None] * channels + channel[None, :]
            inside = [(real & (to_x + tx >= 0) & (to_x + tx < width))[:, None] for tx in range(kx)]
            added = []
            for (ty, tx), total in zip(own, sums, strict=True):
                there = (to_z >= 0) & (to_z < depth) & (to_y + ty >= 0) & (to_y + ty < height)
                at = lanes + (ty * width + tx) * channels
                seen = triton.load(x_ref.at[at], mask=inside[tx] & there, other=0.0).astype(jnp.float32)
                added.append(triton.multiply_add(seen, here, total))
            return tuple(added)

        zero = jnp.zeros((row, many), jnp.float32)
        sums = jax.lax.fori_loop(0, each, step, (zero,) * len(own))
        for (ty, tx), total in zip(own, sums, strict=True):
            tap = (tz * ky + first + ty) * kx + tx
            sums_ref[(place * (kz * ky * kx) + tap) * channels + channel] = total.sum(0)

    return depthwise_kernel_gradient, programs, kz * parts, row

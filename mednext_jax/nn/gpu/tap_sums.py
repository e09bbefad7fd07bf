"""The kernel gradient of the depthwise operations as GPU kernels (mednext_jax/nn/gpu/triton.py).

A program has one sum per tap of one plane of the kernel in registers. At stride 1 that is a plane across the last axis:
walking along the first one, each row of the input that it loads meets all rows of the gradient that see it through this
plane, of which it keeps the last few; so it loads 4 rows for 9 taps. At stride 2 it goes through rows one by one.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from mednext_jax.nn.gpu import triton
from mednext_jax.nn.gpu.depthwise import CHANNELS, ROW, Plain, spatial
from mednext_jax.nn.windows import every_tap

PROGRAMS = 512  # among which a sample's rows are divided, at most
WALKS = 256  # programs per sample that walk, at most
PLANES = 32  # of the first axis, that a walk goes through at least: at its ends it multiplies by zeros
MOST_TAPS = 9  # whose sums the registers hold


def tap_sums(x: Array, g: Array, taps: Array, stride: int, plain: Plain) -> Array:
    """``sum over batch and space of x[stride * i + t - k // 2] * g[i]``: (*k, C), float32.

    Args: x (B, *spatial, C) and g (B, *out, C), which :func:`depthwise.usable` takes; taps (*k, C); ``plain``: the
    operation whose kernel gradient this is, without kernels, for what they cannot do.
    """
    shape, channels = taps.shape, taps.shape[-1]
    x, g, taps = spatial(x, 1), spatial(g, 1), spatial(taps, 0)
    sizes, strides = taps.shape[:-1], tuple(stride if n > 1 else 1 for n in x.shape[1:-1])
    if stride == 1:
        kernel, programs, groups, row = _walking(x.shape[1:], sizes)
    else:
        kernel, programs, groups, row = _by_rows(x.shape[1:], g.shape[1:-1], sizes, strides)
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
def _walking(sizes: tuple[int, ...], taps: tuple[int, ...]) -> tuple[Callable, int, int, int]:
    """The kernel at stride 1, its programs per sample, the groups of taps among which they are divided, and the row."""
    depth, height, width, channels = sizes
    kz, ky, kx = taps
    row, many = triton.block(width, ROW), triton.block(channels, CHANNELS)
    parts = 1 if kz * ky <= MOST_TAPS else ky
    own = list(every_tap((kz, ky // parts)))
    pieces = -(-width // row)
    segments = min(-(-WALKS // (height * pieces)), -(-depth // PLANES))
    planes = -(-depth // segments)
    walks = segments * height * pieces
    each = -(-walks // WALKS)
    programs = -(-walks // each)

    def depthwise_kernel_gradient(x_ref, g_ref, sums_ref):
        place, group, part = (triton.place(axis) for axis in range(3))
        sample, begin = triton.divided(place, programs)
        tx, first = triton.divided(group, parts)
        channel = part * many + jnp.arange(many)

        def walk(i, sums):
            number = begin * each + i
            rest, column = triton.divided(number, pieces)
            segment, y = triton.divided(rest, height)
            start, to_y = segment * planes, y + first - ky // 2
            end = jnp.where(number < walks, jnp.minimum(start + planes, depth), 0)
            across = column * row + jnp.arange(row)
            to_x = across + tx - kx // 2
            lanes = across[:, None] * channels + channel[None, :]
            real, inside = (across < width)[:, None], triton.within(to_x, width)[:, None]

            def line(z, y):
                return ((sample * depth + z) * height + y) * (width * channels)

            def plane(j, carry):
                """One plane of the input, and the plane of the gradient that sees it through the first tap."""
                sums, seeing = carry
                z = start + j
                seeing = (*seeing[1:], triton.load_wide(g_ref.at[line(z, y) + lanes], real & (z < end)))
                to_z = z - kz // 2
                seen = []
                for ty in range(ky // parts):
                    there = triton.within(to_z, depth) & triton.within(to_y + ty, height)
                    at = line(to_z, to_y + ty) + lanes + (tx - kx // 2) * channels
                    seen.append(triton.load_wide(x_ref.at[at], inside & there))
                added = [triton.multiply_add(seen[ty], seeing[kz - 1 - tz], total)
                         for (tz, ty), total in zip(own, sums, strict=True)]  # fmt: skip
                return tuple(added), seeing

            zero = jnp.zeros((row, many), jnp.float32)
            return jax.lax.fori_loop(0, planes + kz - 1, plane, (sums, (zero,) * kz))[0]

        zero = jnp.zeros((row, many), jnp.float32)
        sums = jax.lax.fori_loop(0, each, walk, (zero,) * len(own))
        _write(sums_ref, place, taps, [(tz, first + ty, tx) for tz, ty in own], channel, channels, sums)

    return depthwise_kernel_gradient, programs, kx * parts, row


@triton.kept
def _by_rows(
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
            here = triton.load_wide(g_ref.at[at], real[:, None])
            to_z, to_y = strides[0] * z + tz - kz // 2, strides[1] * y + first - ky // 2
            to_x = strides[2] * across - kx // 2
            begins = ((sample * depth + to_z) * height + to_y) * (width * channels)
            lanes = begins + to_x[:, None] * channels + channel[None, :]
            inside = [(real & triton.within(to_x + tx, width))[:, None] for tx in range(kx)]
            added = []
            for (ty, tx), total in zip(own, sums, strict=True):
                there = triton.within(to_z, depth) & triton.within(to_y + ty, height)
                at = lanes + (ty * width + tx) * channels
                seen = triton.load_wide(x_ref.at[at], inside[tx] & there)
                added.append(triton.multiply_add(seen, here, total))
            return tuple(added)

        zero = jnp.zeros((row, many), jnp.float32)
        sums = jax.lax.fori_loop(0, each, step, (zero,) * len(own))
        _write(sums_ref, place, taps, [(tz, first + ty, tx) for ty, tx in own], channel, channels, sums)

    return depthwise_kernel_gradient, programs, kz * parts, row


def _write(
    sums_ref: Any, place: Array, taps: tuple[int, ...], own: Sequence[tuple], channel: Array, channels: int,
    sums: Sequence[Array],
) -> None:  # fmt: skip
    """Writes a program's sums over its voxels to the places of its ``own`` taps, each (tz, ty, tx)."""
    kz, ky, kx = taps
    for (tz, ty, tx), total in zip(own, sums, strict=True):
        tap = (tz * ky + ty) * kx + tx
        sums_ref[(place * (kz * ky * kx) + tap) * channels + channel] = total.sum(0)

"""The operations of mednext_jax/nn/depthwise.py as GPU kernels (mednext_jax/nn/gpu/triton.py).

XLA makes of a sum of shifts one kernel, but one that looks up every tap of every voxel anew, with its bounds. Here a
program loads eight channels at once and, at stride 1, walks along the first axis with the sums of the planes that are
open, so that what it loads serves all taps along that axis; and the transposed operation makes all eight voxels that
its loads contribute to.
"""

import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array

from mednext_jax.nn.gpu import triton
from mednext_jax.nn.windows import reach_of_transposed

ROW, CHANNELS = 64, 32  # voxels and channels of a block
PLANES = 16  # that one program walks through
LARGEST = 7  # kernel size

Plain = Callable[[str, Array, Array, tuple[int, ...]], Array]  # (mode, x (B, D, H, W, C), taps, sizes out) -> y


def usable(x: Array, taps: Array, grows: bool) -> bool:
    """Whether the kernels take x (B, *spatial, C) and taps (*k, C).

    Args:
      grows: the result has eight times the voxels.
    """
    if x.ndim != taps.ndim + 1 or x.shape[-1] % 16 or max(taps.shape[:-1]) > LARGEST:
        return False
    return triton.usable(x) and (8 if grows else 1) * x.size <= triton.MOST_ELEMENTS


def spatial(array: Array, before: int) -> Array:
    """The array with three spatial axes, which come after ``before`` others."""
    return array if array.ndim == before + 4 else jnp.expand_dims(array, before)


def convolve(
    mode: str, x: Array, taps: Array, bias: Array | None, out: Sequence[int], plain: Plain, onto: Array | None = None
) -> Array:
    """The operation "same", "down" or "up", with zeros outside, plus ``onto`` (mode "same" alone).

    Shapes: x (B, *spatial, C), taps (*k, C), bias (C,); returns (B, *out, C), in the dtype of x. "up" makes sizes
    2n - 1 or 2n of n.

    Args:
      plain: the operation without kernels, for what they cannot do.
    """
    sizes = (1, *out) if x.ndim == 4 else tuple(out)
    flat = x.ndim == 4
    x, taps = spatial(x, 1), spatial(taps, 0).astype(jnp.float32)
    more = () if onto is None else (spatial(onto, 1),)
    bias = jnp.zeros(x.shape[-1:], jnp.float32) if bias is None else bias.astype(jnp.float32)
    channels = x.shape[-1]
    many = triton.block(channels, CHANNELS)

    def fast(x: Array, taps: Array, bias: Array, *onto: Array) -> list[Array]:
        also = (bool(onto),) if mode == "same" else ()
        kernel, programs, row = _KERNELS[mode](x.shape[1:], taps.shape[:-1], sizes, *also)
        result = jax.ShapeDtypeStruct((x.shape[0], *sizes, channels), x.dtype)
        grid = (x.shape[0] * programs[0], programs[1], channels // many)
        smaller = x.size if mode == "up" else result.size
        return triton.launch(
            kernel, grid, [result], (x, taps, bias, *onto), flops=2 * smaller * taps.size // channels,
            warps=triton.warps(row * many, 16),
        )  # fmt: skip

    def reference(x: Array, taps: Array, bias: Array, *onto: Array) -> tuple[Array]:
        y = plain(mode, x, taps, sizes) + bias.astype(x.dtype)
        return (y + onto[0] if onto else y,)

    split = (True, False, False, *(True for _ in more))
    (y,) = triton.with_reference(fast, reference, split, 1)(x, taps, bias, *more)
    return y[:, 0] if flat else y


def _lanes(part: Array, across: Array, channels: int, many: int) -> tuple[Array, Array]:
    """A block's channels, and its places along a row of voxels."""
    channel = part * many + jnp.arange(many)
    return channel, across[:, None] * channels + channel[None, :]


@triton.kept
def _same(sizes: tuple[int, ...], taps: tuple[int, ...], out: tuple[int, ...], has_onto: bool):
    """Kernel, programs and row: a program makes PLANES planes of one row."""
    depth, height, width, channels = sizes
    kz, ky, kx = taps
    row, many = triton.block(width, ROW), triton.block(channels, CHANNELS)
    pieces = -(-depth // PLANES)

    def depthwise(x_ref, taps_ref, bias_ref, *others):
        onto_ref, y_ref = others if has_onto else (None, *others)
        place, column, part = (triton.place(axis) for axis in range(3))
        rest, y = triton.divided(place, height)
        sample, piece = triton.divided(rest, pieces)
        across = column * row + jnp.arange(row)
        channel, lanes = _lanes(part, across, channels, many)
        inside = [triton.within(across + tx - kx // 2, width)[:, None] for tx in range(kx)]
        first = piece * PLANES

        def line(z, y):
            return ((sample * depth + z) * height + y) * (width * channels)

        def plane(z, sums):
            """Adds plane z of the input to the sums of the planes z - kz // 2 .. z + kz // 2."""

            def add(ty, sums):
                sums = list(sums)
                to_y = y + ty - ky // 2
                begin = line(z, to_y) + lanes
                real = triton.within(z, depth) & triton.within(to_y, height)
                for tx in range(kx):
                    at = begin + (tx - kx // 2) * channels
                    seen = triton.load_wide(x_ref.at[at], inside[tx] & real)
                    for tz in range(kz):  # the plane at place i of the sums sees this one through tap kz - 1 - i
                        tap = ((kz - 1 - tz) * ky + ty) * kx + tx
                        weight = taps_ref[tap * channels + channel][None, :]
                        sums[tz] = triton.multiply_add(seen, weight, sums[tz])
                return tuple(sums)

            # A loop, not ky copies: loads that are all issued at once would take the registers of other programs.
            return jax.lax.fori_loop(0, ky, add, sums)

        def step(i, sums):
            z = first + i - (kz - 1)  # the plane that this one completes
            sums = plane(z + kz // 2, sums)
            written = (across < width)[:, None] & (z >= first) & (z < depth)
            here = line(z, y) + lanes
            result = sums[0] + bias_ref[channel][None, :]
            if has_onto:
                result = result + triton.load_wide(onto_ref.at[here], written)
            triton.store(y_ref.at[here], result.astype(y_ref.dtype), mask=written)
            return (*sums[1:], jnp.zeros((row, many), jnp.float32))

        zero = jnp.zeros((row, many), jnp.float32)
        jax.lax.fori_loop(0, min(PLANES, depth) + kz - 1, step, (zero,) * kz)

    return depthwise, (pieces * height, -(-width // row)), row


@triton.kept
def _down(sizes: tuple[int, ...], taps: tuple[int, ...], out: tuple[int, ...]):
    """Kernel, programs and row: a program makes one row."""
    depth, height, width, channels = sizes
    kz, ky, kx = taps
    row, many = triton.block(out[2], ROW), triton.block(channels, CHANNELS)

    def depthwise_down(x_ref, taps_ref, bias_ref, y_ref):
        place, column, part = (triton.place(axis) for axis in range(3))
        rest, y = triton.divided(place, out[1])
        sample, z = triton.divided(rest, out[0])
        across = column * row + jnp.arange(row)
        channel, lanes = _lanes(part, 2 * across, channels, many)
        inside = [triton.within(2 * across + tx - kx // 2, width)[:, None] for tx in range(kx)]

        def add(number, total):
            tz, ty = triton.divided(number, ky)
            to_z, to_y = 2 * z + tz - kz // 2, 2 * y + ty - ky // 2
            begin = ((sample * depth + to_z) * height + to_y) * (width * channels) + lanes
            real = triton.within(to_z, depth) & triton.within(to_y, height)
            for tx in range(kx):
                at = begin + (tx - kx // 2) * channels
                seen = triton.load_wide(x_ref.at[at], inside[tx] & real)
                weight = taps_ref[(number * kx + tx) * channels + channel][None, :]
                total = triton.multiply_add(seen, weight, total)
            return total

        start = jnp.zeros((row, many), jnp.float32) + bias_ref[channel][None, :]
        total = jax.lax.fori_loop(0, kz * ky, add, start)
        at = place * (out[2] * channels) + across[:, None] * channels + channel[None, :]
        triton.store(y_ref.at[at], total.astype(y_ref.dtype), mask=(across < out[2])[:, None])

    return depthwise_down, (out[0] * out[1], -(-out[2] // row)), row


@triton.kept
def _up(sizes: tuple[int, ...], taps: tuple[int, ...], out: tuple[int, ...]):
    """Kernel, programs and row: a program makes what is at twice its row's places, and one further on every axis.

    Output ``2 j + r`` is the sum over a of ``x[j + a] * taps[r + k // 2 - 2 a]``.
    """
    depth, height, width, channels = sizes
    row, many = triton.block(width, ROW // 2), triton.block(channels, CHANNELS)
    reach = [reach_of_transposed(k) for k in taps]
    parities = list(itertools.product(*((0, 1) if n > 1 else (0,) for n in out)))

    def depthwise_up(x_ref, taps_ref, bias_ref, y_ref):
        place, column, part = (triton.place(axis) for axis in range(3))
        rest, y = triton.divided(place, height)
        sample, z = triton.divided(rest, depth)
        across = column * row + jnp.arange(row)
        channel, lanes = _lanes(part, across, channels, many)
        sums = {parity: jnp.zeros((row, many), jnp.float32) + bias_ref[channel][None, :] for parity in parities}
        for steps in itertools.product(*reach):
            needed = {parity: [r + k // 2 - 2 * a for r, k, a in zip(parity, taps, steps, strict=True)]
                      for parity in parities}  # fmt: skip
            needed = {parity: tap for parity, tap in needed.items()
                      if all(0 <= t < k for t, k in zip(tap, taps, strict=True))}  # fmt: skip
            if not needed:
                continue
            to_z, to_y, to_x = z + steps[0], y + steps[1], across + steps[2]
            real = triton.within(to_x, width)[:, None] & triton.within(to_z, depth) & triton.within(to_y, height)
            at = ((sample * depth + to_z) * height + to_y) * (width * channels) + lanes + steps[2] * channels
            seen = triton.load_wide(x_ref.at[at], real)
            for parity, (tz, ty, tx) in needed.items():
                weight = taps_ref[((tz * taps[1] + ty) * taps[2] + tx) * channels + channel][None, :]
                sums[parity] = triton.multiply_add(seen, weight, sums[parity])
        twice = [2 if n > 1 else 1 for n in out]
        for (rz, ry, rx), total in sums.items():
            to_z, to_y, to_x = twice[0] * z + rz, twice[1] * y + ry, twice[2] * across + rx
            real = ((to_x < out[2]) & (across < width))[:, None] & (to_z < out[0]) & (to_y < out[1])
            line = ((sample * out[0] + to_z) * out[1] + to_y) * (out[2] * channels)
            at = line + to_x[:, None] * channels + channel[None, :]
            triton.store(y_ref.at[at], total.astype(y_ref.dtype), mask=real)

    return depthwise_up, (depth * height, -(-width // row)), 4 * row  # four times as many threads as for one result


_KERNELS: dict[str, Callable] = {"same": _same, "down": _down, "up": _up}

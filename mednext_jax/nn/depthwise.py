"""Depthwise convolutions in two and three dimensions, channels last, with gradients that cost what they must.

XLA's grouped convolution is the wrong tool here: on CPU it runs one channel at a time, on GPU its gradients cost as
much as a dense convolution's (jax-ml/jax#13800, #31662). A depthwise convolution is a sum of shifted products, one
per kernel tap, so it is written as that sum and left to fuse into a single pass over memory:

* forward: ``y[i] = sum_t x[stride * i + t - k // 2] * kernel[t]``, outside of x is zero;
* input gradient: the same sum with the taps mirrored (stride 1), or the transposed operation (stride 2);
* transposed operation, stride 2: each parity of the output index sees its own subset of taps, so the output is
  built phase by phase and interleaved. No zeros are inserted and multiplied;
* kernel gradient: one reduction per tap.

Layout: x is ``(B, *spatial, C)``, kernel is ``(*k, 1, C)`` as in ``flax.linen.Conv``; two or three spatial axes,
every kernel size odd. Accumulation is in float32 at least.
"""

import functools
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

STRIDES = (1, 2)


def depthwise_conv(x: Array, kernel: Array, stride: int = 1) -> Array:
    """Depthwise convolution with zero padding ``k // 2`` on every side.

    Shapes:
      x: (B, D, H, W, C) or (B, H, W, C).
      kernel: (k, k, k, 1, C) or (k, k, 1, C); sizes odd, possibly unequal.
      returns: (B, ceil(D / stride), ceil(H / stride), ceil(W / stride), C), dtype of ``x``.

    Equals ``torch.nn.Conv3d(C, C, k, stride, padding=k // 2, groups=C)`` without bias.

    Raises:
      ValueError: for a kernel that does not fit ``x``, an even size, or a stride other than 1 and 2.
    """
    if stride not in STRIDES:
        raise ValueError(f"depthwise_conv: stride must be 1 or 2, got {stride}")
    return _conv(x, _checked_taps(x, kernel), stride)


def depthwise_conv_transpose(x: Array, kernel: Array) -> Array:
    """The transpose of ``depthwise_conv(..., stride=2)``: sizes n become 2n - 1.

    Shapes:
      x: (B, D, H, W, C) or (B, H, W, C).
      kernel: (k, k, k, 1, C) or (k, k, 1, C), not mirrored: ``kernel[z, y, x, 0, c] == torch_weight[c, 0, z, y, x]``.
      returns: (B, 2D - 1, 2H - 1, 2W - 1, C), dtype of ``x``.

    Equals ``torch.nn.ConvTranspose3d(C, C, k, stride=2, padding=k // 2, groups=C)`` without bias.

    Raises:
      ValueError: for a kernel that does not fit ``x`` or has an even size.
    """
    return _conv_transpose(x, _checked_taps(x, kernel), tuple(2 * n - 1 for n in x.shape[1:-1]))


def _checked_taps(x: Array, kernel: Array) -> Array:
    """``kernel`` without its input-channel axis, (*k, C), after checking that it fits ``x``."""
    spatial = x.ndim - 2
    if spatial not in (2, 3):
        raise ValueError(f"depthwise: x must be (B, H, W, C) or (B, D, H, W, C), got shape {x.shape}")
    sizes = kernel.shape[:spatial]
    if kernel.ndim != x.ndim or kernel.shape[spatial:] != (1, x.shape[-1]):
        raise ValueError(f"depthwise: a kernel of shape {kernel.shape} does not fit x of shape {x.shape}; "
                         f"it must be (*k, 1, {x.shape[-1]})")
    if any(k % 2 == 0 for k in sizes):
        raise ValueError(f"depthwise: kernel sizes must be odd, got {sizes}")
    return kernel.reshape(*sizes, x.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv(x: Array, taps: Array, stride: int) -> Array:
    return _sum_of_shifts(x, taps, stride)


def _conv_forward(x: Array, taps: Array, stride: int):
    return _sum_of_shifts(x, taps, stride), (x, taps)


def _conv_backward(stride: int, saved, g: Array):
    x, taps = saved
    if stride == 1:
        dx = _sum_of_shifts(g, _mirrored(taps), 1)
    else:
        dx = _interleaved_phases(g, taps, x.shape[1:-1])
    return dx, _tap_sums(x, g, taps, stride)


_conv.defvjp(_conv_forward, _conv_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv_transpose(x: Array, taps: Array, sizes: tuple[int, ...]) -> Array:
    return _interleaved_phases(x, taps, sizes)


def _conv_transpose_forward(x: Array, taps: Array, sizes: tuple[int, ...]):
    return _interleaved_phases(x, taps, sizes), (x, taps)


def _conv_transpose_backward(sizes: tuple[int, ...], saved, g: Array):
    x, taps = saved
    return _sum_of_shifts(g, taps, 2), _tap_sums(g, x, taps, 2)


_conv_transpose.defvjp(_conv_transpose_forward, _conv_transpose_backward)


def _mirrored(taps: Array) -> Array:
    return jnp.flip(taps, tuple(range(taps.ndim - 1)))


def _accumulator(*arrays: Array) -> jnp.dtype:
    """float32, or wider when the operands are."""
    return jnp.promote_types(jnp.float32, jnp.result_type(*arrays))


def _padded(x: Array, sizes: Sequence[int]) -> Array:
    """x with k // 2 zeros on both sides of every spatial axis."""
    return jnp.pad(x, ((0, 0), *((k // 2, k // 2) for k in sizes), (0, 0)))


def _window(padded: Array, start: Sequence[int], sizes: Sequence[int], stride: int) -> Array:
    """``padded[:, start : start + stride * (n - 1) + 1 : stride, ..., :]`` with n given by ``sizes``."""
    limits = [s + stride * (n - 1) + 1 for s, n in zip(start, sizes, strict=True)]
    return jax.lax.slice(
        padded, (0, *start, 0), (padded.shape[0], *limits, padded.shape[-1]), (1, *(stride,) * len(sizes), 1)
    )


def _every_tap(sizes: Sequence[int]):
    return itertools.product(*(range(k) for k in sizes))


def _sum_of_shifts(x: Array, taps: Array, stride: int) -> Array:
    """The convolution: one shifted product per tap, all in one fused pass."""
    sizes = taps.shape[:-1]
    out = [(n - 1) // stride + 1 for n in x.shape[1:-1]]
    dtype = _accumulator(x, taps)
    padded = _padded(x, sizes)
    total = sum(
        _window(padded, tap, out, stride).astype(dtype) * taps[tap].astype(dtype) for tap in _every_tap(sizes)
    )
    return total.astype(x.dtype)


def _interleaved_phases(x: Array, taps: Array, sizes: Sequence[int]) -> Array:
    """The transposed stride-2 convolution, cut to ``sizes`` (each 2n - 1 or 2n).

    Output index ``2 j + r`` receives ``x[j + (r + p - t) / 2] * taps[t]`` for the taps t of the parity of r + p,
    where p = k // 2; so each of the 2^d phases r is a small stride-1 sum over its own taps.
    """
    dims = len(sizes)
    half = [k // 2 for k in taps.shape[:-1]]
    dtype = _accumulator(x, taps)
    margin = [p // 2 + 1 for p in half]  # the furthest x that any phase reaches
    padded = jnp.pad(x, ((0, 0), *((m, m) for m in margin), (0, 0)))
    counts = x.shape[1:-1]

    def phase(parity: tuple[int, ...]) -> Array:
        total = jnp.zeros((), dtype)
        for tap in _every_tap(taps.shape[:-1]):
            reach = [r + p - t for r, p, t in zip(parity, half, tap, strict=True)]
            if any(step % 2 for step in reach):
                continue
            start = [m + step // 2 for m, step in zip(margin, reach, strict=True)]
            total = total + _window(padded, start, counts, 1).astype(dtype) * taps[tap].astype(dtype)
        return jnp.broadcast_to(total, x.shape).astype(x.dtype)

    phases = jnp.stack([phase(parity) for parity in itertools.product((0, 1), repeat=dims)])
    phases = phases.reshape((2,) * dims + x.shape)
    # (r..., B, n..., C) -> (B, n0, r0, n1, r1, ..., C) -> (B, 2 n0, 2 n1, ..., C)
    order = [dims] + [axis for d in range(dims) for axis in (dims + 1 + d, d)] + [2 * dims + 1]
    full = phases.transpose(order).reshape(x.shape[0], *(2 * n for n in counts), x.shape[-1])
    return jax.lax.slice(full, (0,) * full.ndim, (x.shape[0], *sizes, x.shape[-1]))


def _tap_sums(x: Array, g: Array, taps: Array, stride: int) -> Array:
    """Kernel gradient: ``sum over batch and space of x[stride * i + t - k // 2] * g[i]``, (*k, C)."""
    by_planes = jax.default_backend() == "cpu"
    sums = (_tap_sums_by_planes if by_planes else _tap_sums_at_once)(x, g, taps.shape[:-1], stride)
    return sums.reshape(taps.shape).astype(taps.dtype)


def _tap_sums_at_once(x: Array, g: Array, sizes: Sequence[int], stride: int) -> Array:
    """One reduction per tap over the whole arrays, (taps, C)."""
    dtype = _accumulator(x, g)
    padded = _padded(x, sizes)
    windows = (_window(padded, tap, g.shape[1:-1], stride) for tap in _every_tap(sizes))
    axes = tuple(range(x.ndim - 1))
    return jnp.stack([jnp.sum(window.astype(dtype) * g.astype(dtype), axes) for window in windows])


def _tap_sums_by_planes(x: Array, g: Array, sizes: Sequence[int], stride: int) -> Array:
    """The same sums plane by plane, so that a plane of both arrays stays in cache for all taps, (taps, C).

    A third of the time of one whole reduction per tap on CPU (32 channels, 64^3), a twentieth of its temporaries,
    and one small program for all taps. Rows and columns must be reduced together: XLA vectorises that reduction
    over the channels, but not one over the rows alone.
    """
    if len(sizes) == 2:
        x, g, sizes = x[:, None], g[:, None], (1, *sizes)
    dtype = _accumulator(x, g)
    batch, depth, height, width, channels = g.shape
    padded = _padded(x, sizes)
    window = (batch, 1, stride * (height - 1) + 1, stride * (width - 1) + 1, channels)

    def plane(z: Array, totals: Array) -> Array:
        near = jax.lax.dynamic_slice_in_dim(padded, stride * z, sizes[0], axis=1)
        here = jax.lax.dynamic_index_in_dim(g, z, axis=1, keepdims=False).astype(dtype)

        def tap(t: Array, totals: Array) -> Array:
            start = (0, t // (sizes[1] * sizes[2]), t // sizes[2] % sizes[1], t % sizes[2], 0)
            seen = jax.lax.dynamic_slice(near, start, window)[:, 0, ::stride, ::stride].astype(dtype)
            return totals.at[t].add((seen * here).sum((1, 2)))

        return jax.lax.fori_loop(0, math.prod(sizes), tap, totals)

    totals = jnp.zeros((math.prod(sizes), batch, channels), dtype)
    return jax.lax.fori_loop(0, depth, plane, totals).sum(1)

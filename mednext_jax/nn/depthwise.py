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
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

STRIDES = (1, 2)
# Rows added up in one pass. A slice with more than 15 uses is not fused into them by XLA on CPU; fused, its moving
# start would keep the pass from being vectorised (three times slower with 8 rows; twice with 32, whose sum is cut).
ROWS = 16


def depthwise_conv(x: Array, kernel: Array, stride: int = 1, bias: Array | None = None) -> Array:
    """Depthwise convolution with zero padding ``k // 2`` on every side.

    Shapes:
      x: (B, D, H, W, C) or (B, H, W, C).
      kernel: (k, k, k, 1, C) or (k, k, 1, C); sizes odd, possibly unequal.
      bias: (C,), or None for none.
      returns: (B, ceil(D / stride), ceil(H / stride), ceil(W / stride), C), dtype of ``x``.

    Equals ``torch.nn.Conv3d(C, C, k, stride, padding=k // 2, groups=C)``.

    Raises:
      ValueError: for a kernel that does not fit ``x``, an even size, or a stride other than 1 and 2.
    """
    if stride not in STRIDES:
        raise ValueError(f"depthwise_conv: stride must be 1 or 2, got {stride}")
    return _conv(x, _checked_taps(x, kernel), bias, stride)


def depthwise_conv_transpose(x: Array, kernel: Array, bias: Array | None = None) -> Array:
    """The transpose of ``depthwise_conv(..., stride=2)``: sizes n become 2n - 1.

    Shapes:
      x: (B, D, H, W, C) or (B, H, W, C).
      kernel: (k, k, k, 1, C) or (k, k, 1, C), not mirrored: ``kernel[z, y, x, 0, c] == torch_weight[c, 0, z, y, x]``.
      bias: (C,), or None for none.
      returns: (B, 2D - 1, 2H - 1, 2W - 1, C), dtype of ``x``.

    Equals ``torch.nn.ConvTranspose3d(C, C, k, stride=2, padding=k // 2, groups=C)``.

    Raises:
      ValueError: for a kernel that does not fit ``x`` or has an even size.
    """
    return _conv_transpose(x, _checked_taps(x, kernel), bias, tuple(2 * n - 1 for n in x.shape[1:-1]))


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _conv(x: Array, taps: Array, bias: Array | None, stride: int) -> Array:
    return _plus(_sum_of_shifts(x, taps, stride), bias)


def _conv_forward(x: Array, taps: Array, bias: Array | None, stride: int):
    return _conv(x, taps, bias, stride), (x, taps, bias)


def _conv_backward(stride: int, saved, g: Array):
    x, taps, bias = saved
    if stride == 1:
        dx = _sum_of_shifts(g, _mirrored(taps), 1)
    else:
        dx = _interleaved_phases(g, taps, x.shape[1:-1])
    return dx, _tap_sums(x, g, taps, stride), _bias_sum(g, taps, bias)


_conv.defvjp(_conv_forward, _conv_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _conv_transpose(x: Array, taps: Array, bias: Array | None, sizes: tuple[int, ...]) -> Array:
    return _plus(_interleaved_phases(x, taps, sizes), bias)


def _conv_transpose_forward(x: Array, taps: Array, bias: Array | None, sizes: tuple[int, ...]):
    return _conv_transpose(x, taps, bias, sizes), (x, taps, bias)


def _conv_transpose_backward(sizes: tuple[int, ...], saved, g: Array):
    x, taps, bias = saved
    return _sum_of_shifts(g, taps, 2), _tap_sums(g, x, taps, 2), _bias_sum(g, taps, bias)


_conv_transpose.defvjp(_conv_transpose_forward, _conv_transpose_backward)


def _plus(y: Array, bias: Array | None) -> Array:
    return y if bias is None else y + bias.astype(y.dtype)


def _bias_sum(g: Array, taps: Array, bias: Array | None) -> Array | None:
    """Sum over batch and space; of the padded copy, which the other gradients have made already."""
    if bias is None:
        return None
    padded = _padded(g, taps.shape[:-1], _missing_rows(g.shape[-3]))
    return padded.astype(_accumulator(g)).sum(tuple(range(g.ndim - 1))).astype(bias.dtype)


def _mirrored(taps: Array) -> Array:
    return jnp.flip(taps, tuple(range(taps.ndim - 1)))


def _accumulator(*arrays: Array) -> jnp.dtype:
    """float32, or wider when the operands are."""
    return jnp.promote_types(jnp.float32, jnp.result_type(*arrays))


def _padded(x: Array, sizes: Sequence[int], more_rows: int = 0) -> Array:
    """x with k // 2 zeros on both sides of every spatial axis, and ``more_rows`` behind the last but one."""
    widths = [[k // 2, k // 2] for k in sizes]
    widths[-2][1] += more_rows
    return jnp.pad(x, ((0, 0), *widths, (0, 0)))


def _missing_rows(height: int) -> int:
    """Rows that fill the last piece of the kernel gradient's loop."""
    return -height % ROWS if jax.default_backend() == "cpu" else 0


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
    # As many rows as the kernel gradient wants: in the backward pass both then read one padded copy.
    padded = _padded(x, sizes, _missing_rows(x.shape[-3]) if stride == 1 else 0)
    total = sum(
        _window(padded, tap, out, stride).astype(dtype) * taps[tap].astype(dtype) for tap in _every_tap(sizes)
    )
    return total.astype(x.dtype)


def _interleaved_phases(x: Array, taps: Array, sizes: Sequence[int]) -> Array:
    """The transposed stride-2 convolution, cut to ``sizes`` (each 2n - 1 or 2n).

    Along one axis, output ``2 j + r`` is the sum over a of ``x[j + a] * taps[r + p - 2 a]`` with p = k // 2. Written
    with the two r as an axis of their own, that is an ordinary sum of few shifts whose result already lies
    interleaved: no zeros between the inputs, and no pass that puts the phases in place.
    """
    dims, counts = len(sizes), x.shape[1:-1]
    kernels = [k // 2 for k in taps.shape[:-1]]
    reach = [range(-(p // 2), (p + 1) // 2 + 1) for p in kernels]
    dtype = _accumulator(x, taps)
    padded = jnp.pad(x, ((0, 0), *((-steps[0], steps[-1]) for steps in reach), (0, 0)))
    by_parity = _taps_by_parity(taps.astype(dtype), reach)  # (a..., r..., C)
    total = jnp.zeros((), dtype)
    for start in _every_tap([len(steps) for steps in reach]):
        seen = jnp.expand_dims(_window(padded, start, counts, 1).astype(dtype), [2 + 2 * d for d in range(dims)])
        kernel = by_parity[start].reshape(*(size for _ in range(dims) for size in (1, 2)), -1)
        total = total + seen * kernel  # (B, n0, 2, n1, 2, ..., C)
    full = total.astype(x.dtype).reshape(x.shape[0], *(2 * n for n in counts), x.shape[-1])
    return jax.lax.slice(full, (0,) * full.ndim, (x.shape[0], *sizes, x.shape[-1]))


def _taps_by_parity(taps: Array, reach: Sequence[range]) -> Array:
    """``taps[r + p - 2 a]`` along every axis, zero where there is no such tap: (*k, C) -> (a..., r..., C)."""
    dims = len(reach)
    for steps in reach:
        k = taps.shape[0]
        wanted = np.array([[r + k // 2 - 2 * a for r in (0, 1)] for a in steps])
        chosen = jnp.asarray(wanted[..., None] == np.arange(k), taps.dtype)  # (a, r, k): at most a one in each row
        taps = jnp.tensordot(taps, chosen, (0, 2), precision=jax.lax.Precision.HIGHEST)  # axis 0 goes, (a, r) come last
    # (C, a0, r0, a1, r1, ...) -> (a..., r..., C)
    return taps.transpose(*range(1, 2 * dims, 2), *range(2, 2 * dims + 1, 2), 0)


def _tap_sums(x: Array, g: Array, taps: Array, stride: int) -> Array:
    """Kernel gradient: ``sum over batch and space of x[stride * i + t - k // 2] * g[i]``, (*k, C)."""
    by_rows = jax.default_backend() == "cpu"
    sums = (_tap_sums_by_rows if by_rows else _tap_sums_at_once)(x, g, taps.shape[:-1], stride)
    return sums.reshape(taps.shape).astype(taps.dtype)


def _tap_sums_at_once(x: Array, g: Array, sizes: Sequence[int], stride: int) -> Array:
    """One reduction per tap over the whole arrays, (taps, C)."""
    dtype = _accumulator(x, g)
    padded = _padded(x, sizes)
    windows = (_window(padded, tap, g.shape[1:-1], stride) for tap in _every_tap(sizes))
    axes = tuple(range(x.ndim - 1))
    return jnp.stack([jnp.sum(window.astype(dtype) * g.astype(dtype), axes) for window in windows])


def _tap_sums_by_rows(x: Array, g: Array, sizes: Sequence[int], stride: int) -> Array:
    """The same sums, ``ROWS`` rows of a plane at a time, so that they stay in cache for all taps, (taps, C).

    The products of the rows are added up in one pass that XLA vectorises; only their sum, one row per tap, is reduced
    over the width at the end. A third of the time of reducing each plane's product (32 channels, 64^3).
    """
    dtype = _accumulator(x, g)
    missing = _missing_rows(g.shape[-3])
    x, g = _padded(x, sizes, stride * missing), _padded(g, sizes, missing)
    if len(sizes) == 2:
        x, g, sizes = x[:, None], g[:, None], (1, *sizes)
    kz, ky, kx = sizes
    batch, channels = g.shape[0], g.shape[-1]
    depth, height, width = (n - 2 * (k // 2) for n, k in zip(g.shape[1:-1], sizes, strict=True))
    pieces = height // ROWS
    span = stride * (width - 1) + 1

    def piece(i: Array, totals: list[Array]) -> list[Array]:
        z, y = i // pieces, i % pieces * ROWS
        start = (0, z + kz // 2, y + ky // 2, kx // 2, 0)
        here = jax.lax.dynamic_slice(g, start, (batch, 1, ROWS, width, channels))[:, 0].astype(dtype)

        def tap(t: Array, totals: list[Array]) -> list[Array]:
            start = (0, stride * z + t // ky, stride * y + t % ky, 0, 0)
            size = (batch, 1, stride * (ROWS - 1) + 1, x.shape[3], channels)
            seen = jax.lax.dynamic_slice(x, start, size)[:, 0, ::stride].astype(dtype)

            def added(total: Array, tx: int) -> Array:
                near = seen[:, :, tx:tx + span:stride]
                products = sum(near[:, j] * here[:, j] for j in range(ROWS))
                old = jax.lax.dynamic_index_in_dim(total, t, 0)
                return jax.lax.dynamic_update_slice_in_dim(total, old + products, t, 0)

            return [added(total, tx) for tx, total in enumerate(totals)]

        return jax.lax.fori_loop(0, kz * ky, tap, totals)

    zeros = [jnp.zeros((kz * ky, batch, width, channels), dtype)] * kx
    totals = jax.lax.fori_loop(0, depth * pieces, piece, zeros)
    return jnp.stack([total.sum((1, 2)) for total in totals], 1).reshape(-1, channels)

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

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.custom_derivatives import SymbolicZero

from mednext_jax.nn.tap_sums import tap_sums
from mednext_jax.nn.windows import accumulator, every_tap, halved, padded_input, padded_like_rows, window

STRIDES = (1, 2)


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


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Wanted:
    """Which gradients are asked for, and the input's spatial sizes: known when the program is traced."""

    x: bool
    taps: bool
    bias: bool
    sizes: tuple[int, ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _conv(x: Array, taps: Array, bias: Array | None, stride: int) -> Array:
    return _plus(_sum_of_shifts(padded_input(x, taps, stride), taps, halved(x, stride), stride), bias)


def _conv_forward(x: Any, taps: Any, bias: Any, stride: int):
    """Keeps the padded input alone, and that only if the kernel learns."""
    wanted = _Wanted(x.perturbed, taps.perturbed, bias is not None and bias.perturbed, x.value.shape[1:-1])
    padded = padded_input(x.value, taps.value, stride)
    y = _sum_of_shifts(padded, taps.value, halved(x.value, stride), stride)
    return _plus(y, bias and bias.value), (padded if wanted.taps else None, taps.value, wanted)


def _conv_backward(stride: int, saved, g: Any):
    padded, taps, wanted = saved
    if isinstance(g, SymbolicZero):
        return None, None, None
    padded_g = padded_like_rows(g, taps)
    dx = None
    if wanted.x and stride == 1:
        dx = _sum_of_shifts(padded_g, _mirrored(taps), wanted.sizes, 1)
    elif wanted.x:
        dx = _interleaved_phases(g, taps, wanted.sizes)
    d_taps = tap_sums(padded, padded_g, taps, g.shape[1:-1], stride) if wanted.taps else None
    return dx, d_taps, _bias_sum(padded_g, taps) if wanted.bias else None


_conv.defvjp(_conv_forward, _conv_backward, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _conv_transpose(x: Array, taps: Array, bias: Array | None, sizes: tuple[int, ...]) -> Array:
    return _plus(_interleaved_phases(x, taps, sizes), bias)


def _conv_transpose_forward(x: Any, taps: Any, bias: Any, sizes: tuple[int, ...]):
    wanted = _Wanted(x.perturbed, taps.perturbed, bias is not None and bias.perturbed, x.value.shape[1:-1])
    y = _plus(_interleaved_phases(x.value, taps.value, sizes), bias and bias.value)
    return y, (x.value if wanted.taps else None, taps.value, wanted)


def _conv_transpose_backward(sizes: tuple[int, ...], saved, g: Any):
    x, taps, wanted = saved
    if isinstance(g, SymbolicZero):
        return None, None, None
    padded_g = padded_input(g, taps, 2)
    dx = _sum_of_shifts(padded_g, taps, wanted.sizes, 2) if wanted.x else None
    d_taps = tap_sums(padded_g, padded_like_rows(x, taps), taps, wanted.sizes, 2) if wanted.taps else None
    return dx, d_taps, _bias_sum(padded_g, taps) if wanted.bias else None


_conv_transpose.defvjp(_conv_transpose_forward, _conv_transpose_backward, symbolic_zeros=True)


def _plus(y: Array, bias: Array | None) -> Array:
    return y if bias is None else y + bias.astype(y.dtype)


def _bias_sum(padded_g: Array, taps: Array) -> Array:
    """Sum over batch and space; of the padded copy, which the other gradients read too."""
    return padded_g.astype(accumulator(padded_g)).sum(tuple(range(padded_g.ndim - 1))).astype(taps.dtype)


def _mirrored(taps: Array) -> Array:
    return jnp.flip(taps, tuple(range(taps.ndim - 1)))


def _sum_of_shifts(padded: Array, taps: Array, out: Sequence[int], stride: int) -> Array:
    """The convolution of a padded array: one shifted product per tap, all in one fused pass."""
    dtype = accumulator(padded, taps)
    total = sum(
        window(padded, tap, out, stride).astype(dtype) * taps[tap].astype(dtype)
        for tap in every_tap(taps.shape[:-1])
    )
    return total.astype(padded.dtype)


def _interleaved_phases(x: Array, taps: Array, sizes: Sequence[int]) -> Array:
    """The transposed stride-2 convolution, cut to ``sizes`` (each 2n - 1 or 2n).

    Along one axis, output ``2 j + r`` is the sum over a of ``x[j + a] * taps[r + p - 2 a]`` with p = k // 2. Written
    with the two r as an axis of their own, that is an ordinary sum of few shifts whose result already lies
    interleaved: no zeros between the inputs, and no pass that puts the phases in place.
    """
    dims, counts = len(sizes), x.shape[1:-1]
    reach = [range(-(k // 4), (k // 2 + 1) // 2 + 1) for k in taps.shape[:-1]]
    dtype = accumulator(x, taps)
    padded = jnp.pad(x, ((0, 0), *((-steps[0], steps[-1]) for steps in reach), (0, 0)))
    by_parity = _taps_by_parity(taps.astype(dtype), reach)  # (a..., r..., C)
    total = jnp.zeros((), dtype)
    for start in every_tap([len(steps) for steps in reach]):
        seen = jnp.expand_dims(window(padded, start, counts, 1).astype(dtype), [2 + 2 * d for d in range(dims)])
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



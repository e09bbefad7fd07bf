"""Depthwise convolutions in two and three dimensions, channels last, with gradients that cost what they must.

XLA's grouped convolution is the wrong tool here: on CPU it runs one channel at a time, on GPU its gradients cost as
much as a dense convolution's (jax-ml/jax#13800, #31662). A depthwise convolution is a sum of shifted products, one
per kernel tap, so it is written as that sum and left to fuse into a single pass over memory, or on an NVIDIA GPU in
bfloat16 done by a kernel of mednext_jax/nn/gpu:

* forward: ``y[i] = sum_t x[stride * i + t - k // 2] * kernel[t]``, outside of x is zero;
* input gradient: the same sum with the taps mirrored (stride 1), or the transposed operation (stride 2);
* transposed operation, stride 2: each parity of the output index sees its own subset of taps. With the parities as
  axes of their own it is a sum of few shifts, and no zeros are inserted and multiplied;
* kernel gradient: a sum of products per tap, arranged for the device (tap_sums.py).

Layout: x is ``(B, *spatial, C)``, kernel is ``(*k, 1, C)`` as in ``flax.linen.Conv``; two or three spatial axes,
every kernel size odd. Accumulation is in float32 at least.

A batch over several devices: by ``jax.jit``, with a mesh whose axes are Auto, or by ``jax.shard_map(...,
check_vma=False)`` and ``jax.pmap``. Gradients on a CPU know neither Explicit axes nor ``check_vma``.
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

from mednext_jax.nn.gpu import depthwise as gpu_depthwise
from mednext_jax.nn.gpu import tap_sums as gpu_tap_sums
from mednext_jax.nn.slabs import not_before
from mednext_jax.nn.tap_sums import tap_sums
from mednext_jax.nn.windows import (
    accumulator,
    every_tap,
    margins,
    missing_rows,
    padded,
    reach_of_transposed,
    window,
)

STRIDES = (1, 2)
MODES = ("same", "down", "up")  # what the operation does to each size: n, ceil(n / 2), 2n - 1


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
    return _conv(MODES[stride - 1], x, checked_taps(x, kernel), bias)


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
    return _conv("up", x, checked_taps(x, kernel), bias)


def checked_taps(x: Array, kernel: Array) -> Array:
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
    return jax.lax.reshape(kernel, (*sizes, x.shape[-1]))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Wanted:
    """Which gradients are asked for, and the input's spatial sizes: known when the program is traced."""

    x: bool
    taps: bool
    bias: bool
    sizes: tuple[int, ...]


# The two passes are jitted so that each is traced once per shape: a network calls them for all its blocks.
@functools.partial(jax.jit, static_argnums=0)
def convolve(mode: str, x: Array, taps: Array, bias: Array | None) -> Array:
    """The operation itself, without checks and without a derivative of its own; taps (*k, C)."""
    out = out_sizes(mode, x.shape[1:-1])
    if gpu_depthwise.usable(x, taps, grows=mode == "up"):
        return gpu_depthwise.convolve(mode, x, taps, bias, out, _plain)
    y = _plain(mode, x, taps, out)
    return y if bias is None else y + bias.astype(y.dtype)


@functools.partial(jax.jit, static_argnums=(0, 4))
def gradients(
    mode: str, x: Array | None, taps: Array, padded_g: Array, wanted: Wanted, onto: Array | None = None
) -> tuple[Array | None, Array | None, Array | None]:
    """The gradients of x, taps and bias, None for those that are not wanted.

    Args:
      x: the operation's input; needed for the taps' gradient alone.
      padded_g: the gradient of its output, with :func:`margins_of_gradient` around it: one copy serves all three.
      onto: what else there is of the gradient of x.
    """
    sizes, stride, out = taps.shape[:-1], _stride(mode), out_sizes(mode, wanted.sizes)
    dx = d_taps = d_bias = None
    by_kernels = _kernels_take_gradient(mode, padded_g, taps)
    if wanted.x and by_kernels:
        backwards = {"same": "same", "down": "up", "up": "down"}[mode]
        seen = _mirrored(taps) if mode == "same" else taps
        more = onto if mode == "same" else None
        dx = gpu_depthwise.convolve(backwards, padded_g, seen, None, wanted.sizes, _plain, more)
    elif wanted.x and mode == "down":
        dx = _interleaved_phases(padded_g, taps, out, wanted.sizes)
    elif wanted.x:
        dx = _sum_of_shifts(padded_g, _mirrored(taps) if mode == "same" else taps, wanted.sizes, stride)
    if wanted.x and onto is not None and not (by_kernels and mode == "same"):
        dx = dx + onto
    if wanted.taps and by_kernels:
        pair = (padded_g, x) if mode == "up" else (x, padded_g)
        d_taps = gpu_tap_sums.tap_sums(*pair, taps, stride, _plain).astype(taps.dtype)
    elif wanted.taps:
        smaller = wanted.sizes if mode == "up" else out
        rows = missing_rows(smaller[-2])
        # Not before the gradient: XLA would find the forward pass's copy to be the same, and keep that.
        seen, padded_g = not_before(x, padded_g)
        seen = padded(seen, margins(sizes, rows if mode == "up" else stride * rows))
        pair = (padded_g, seen) if mode == "up" else (seen, padded_g)
        d_taps = tap_sums(*pair, taps, smaller, stride)
    if wanted.bias:
        d_bias = padded_g.astype(accumulator(padded_g)).sum(tuple(range(padded_g.ndim - 1))).astype(taps.dtype)
    return dx, d_taps, d_bias


def out_sizes(mode: str, sizes: Sequence[int]) -> tuple[int, ...]:
    """Spatial sizes after the operation."""
    if mode == "up":
        return tuple(2 * n - 1 for n in sizes)
    return tuple((n - 1) // _stride(mode) + 1 for n in sizes)


def margins_of_gradient(mode: str, taps: Array, g: Array) -> list[tuple[int, int]]:
    """The zeros that :func:`gradients` wants around the output's gradient, for one like ``g`` (B, *out, C)."""
    sizes = g.shape[1:-1]
    if _kernels_take_gradient(mode, g, taps):
        return [(0, 0)] * len(sizes)
    rows = 2 * missing_rows((sizes[-2] + 1) // 2) if mode == "up" else missing_rows(sizes[-2])
    return margins(taps.shape[:-1], rows)


def _kernels_take_gradient(mode: str, g: Array, taps: Array) -> bool:
    return gpu_depthwise.usable(g, taps, grows=mode == "down")


def _stride(mode: str) -> int:
    return 1 if mode == "same" else 2


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _conv(mode: str, x: Array, taps: Array, bias: Array | None) -> Array:
    return convolve(mode, x, taps, bias)


def _conv_forward(mode: str, x: Any, taps: Any, bias: Any):
    """Keeps the input alone, and that only if the kernel learns."""
    wanted = Wanted(x.perturbed, taps.perturbed, bias is not None and bias.perturbed, x.value.shape[1:-1])
    y = convolve(mode, x.value, taps.value, bias and bias.value)
    return y, (x.value if wanted.taps else None, taps.value, wanted)


def _conv_backward(mode: str, saved: tuple, g: Any):
    x, taps, wanted = saved
    if isinstance(g, SymbolicZero):
        return None, None, None
    return gradients(mode, x, taps, padded(g, margins_of_gradient(mode, taps, g)), wanted)


_conv.defvjp(_conv_forward, _conv_backward, symbolic_zeros=True)


def _plain(mode: str, x: Array, taps: Array, out: Sequence[int]) -> Array:
    """The operation as a sum of shifts, without bias: (B, *out, C)."""
    seen = padded(x, margins(taps.shape[:-1]))
    if mode == "up":
        return _interleaved_phases(seen, taps, x.shape[1:-1], out)
    return _sum_of_shifts(seen, taps, out, _stride(mode))


def _mirrored(taps: Array) -> Array:
    return jnp.flip(taps, tuple(range(taps.ndim - 1)))


def _sum_of_shifts(x: Array, taps: Array, out: tuple[int, ...], stride: int) -> Array:
    """The convolution of a padded array: one shifted product per tap, all in one fused pass."""
    dtype = accumulator(x, taps)
    dims, channels = taps.ndim - 1, taps.shape[-1]
    # One split for all taps, and no ``jnp``: each of its operators is a function that JAX traces anew for every tap.
    one_each = jax.lax.split(taps.astype(dtype).reshape(-1, *(1,) * dims, channels), (1,) * (taps.size // channels))
    shape = (x.shape[0], *out, channels)
    weights = (jax.lax.broadcast_in_dim(weight, shape, range(dims + 2)) for weight in one_each)
    seen = (window(x, tap, out, stride).astype(dtype) for tap in every_tap(taps.shape[:-1]))
    total = functools.reduce(jax.lax.add, map(jax.lax.mul, seen, weights))
    return total.astype(x.dtype)


def _interleaved_phases(x: Array, taps: Array, counts: Sequence[int], sizes: Sequence[int]) -> Array:
    """The transposed stride-2 convolution of a padded array, whose spatial sizes were ``counts``, cut to ``sizes``
    (2n - 1 or 2n).

    Along one axis, output ``2 j + r`` is the sum over a of ``x[j + a] * taps[r + p - 2 a]`` with p = k // 2. Written
    with the two r as an axis of their own, that is an ordinary sum of few shifts whose result already lies
    interleaved: no zeros between the inputs, and no pass that puts the phases in place.
    """
    dims = len(sizes)
    reach = [reach_of_transposed(k) for k in taps.shape[:-1]]
    dtype = accumulator(x, taps)
    by_parity = _taps_by_parity(taps.astype(dtype), reach)  # (a..., r..., C)
    total = jnp.zeros((), dtype)
    for step in every_tap([len(steps) for steps in reach]):
        start = [k // 2 + steps[a] for k, steps, a in zip(taps.shape, reach, step, strict=False)]
        seen = jnp.expand_dims(window(x, start, counts, 1).astype(dtype), [2 + 2 * d for d in range(dims)])
        kernel = by_parity[step].reshape(*(size for _ in range(dims) for size in (1, 2)), -1)
        total = total + seen * kernel  # (B, n0, 2, n1, 2, ..., C)
    batch, channels = x.shape[0], x.shape[-1]
    full = total.astype(x.dtype).reshape(batch, *(2 * n for n in counts), channels)
    return jax.lax.slice(full, (0,) * full.ndim, (batch, *sizes, channels))


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



"""Padding and shifted windows, which the depthwise operations and their gradients are made of."""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

# Rows added up in one pass. A slice with more than 15 uses is not fused into them by XLA on CPU; fused, its moving
# start would keep the pass from being vectorised (three times slower with 8 rows; twice with 32, whose sum is cut).
ROWS = 16


def accumulator(*arrays: Array) -> jnp.dtype:
    """float32, or wider when the operands are."""
    return jnp.promote_types(jnp.float32, jnp.result_type(*arrays))


def halved(x: Array, stride: int) -> tuple[int, ...]:
    """Spatial sizes of what a convolution of x (B, *spatial, C) with this stride gives: ceil(n / stride)."""
    return tuple((n - 1) // stride + 1 for n in x.shape[1:-1])


def padded(x: Array, sizes: Sequence[int], more_rows: int = 0) -> Array:
    """x with k // 2 zeros on both sides of every spatial axis, and ``more_rows`` behind the last but one."""
    widths = [[k // 2, k // 2] for k in sizes]
    widths[-2][1] += more_rows
    return jnp.pad(x, ((0, 0), *widths, (0, 0)))


def padded_input(x: Array, taps: Array, stride: int) -> Array:
    """x padded for the convolution, with the rows that its kernel gradient wants."""
    return padded(x, taps.shape[:-1], stride * missing_rows(halved(x, stride)[-2]))


def padded_like_rows(g: Array, taps: Array) -> Array:
    """An output's gradient padded alike: one copy for the input's, the kernel's and the bias's gradient."""
    return padded(g, taps.shape[:-1], missing_rows(g.shape[-3]))


def missing_rows(height: int) -> int:
    """Rows that fill the last piece of the kernel gradient's loop."""
    return -height % ROWS if jax.default_backend() == "cpu" else 0


def window(padded: Array, start: Sequence[int], sizes: Sequence[int], stride: int) -> Array:
    """``padded[:, start : start + stride * (n - 1) + 1 : stride, ..., :]`` with n given by ``sizes``."""
    limits = [s + stride * (n - 1) + 1 for s, n in zip(start, sizes, strict=True)]
    return jax.lax.slice(
        padded, (0, *start, 0), (padded.shape[0], *limits, padded.shape[-1]), (1, *(stride,) * len(sizes), 1)
    )


def every_tap(sizes: Sequence[int]):
    return itertools.product(*(range(k) for k in sizes))

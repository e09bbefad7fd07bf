"""Padding and shifted windows, which the depthwise operations and their gradients are made of."""

import itertools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from jax import Array


def accumulator(*arrays: Array) -> jnp.dtype:
    """float32, or wider when the operands are."""
    return jnp.promote_types(jnp.float32, jnp.result_type(*arrays))


def margins(sizes: Sequence[int], more_rows: int = 0) -> list[tuple[int, int]]:
    """Zeros in front of and behind every spatial axis: k // 2, and ``more_rows`` behind the last but one."""
    widths = [(k // 2, k // 2) for k in sizes]
    widths[-2] = (sizes[-2] // 2, sizes[-2] // 2 + more_rows)
    return widths


def padded(x: Array, widths: Sequence[tuple[int, int]]) -> Array:
    """x (B, *spatial, C) with that many zeros in front of and behind every spatial axis."""
    return jnp.pad(x, ((0, 0), *widths, (0, 0)))


def rows_at_once() -> int:
    """Rows whose products the kernel gradient adds up in one pass.

    On CPU eight are as fast as sixteen and compile faster; more do not stay in cache together. For a GPU, a program
    with eight moves 178 GB where one with sixteen moves 168 (MedNeXt-S, 128^3, batch 2, bfloat16, without kernels).
    """
    return 8 if jax.default_backend() == "cpu" else 16


def missing_rows(height: int) -> int:
    """Rows that fill the last piece of the kernel gradient's loop."""
    return -height % rows_at_once()


def window(padded: Array, start: Sequence[int], sizes: Sequence[int], stride: int | Sequence[int]) -> Array:
    """``padded[:, start : start + stride * (n - 1) + 1 : stride, ..., :]`` with n given by ``sizes``."""
    strides = (stride,) * len(sizes) if isinstance(stride, int) else stride
    limits = [first + step * (n - 1) + 1 for first, step, n in zip(start, strides, sizes, strict=True)]
    return jax.lax.slice(
        padded, (0, *start, 0), (padded.shape[0], *limits, padded.shape[-1]), (1, *strides, 1)
    )


def reach_of_transposed(k: int) -> range:
    """The a for which ``x[j + a]`` is part of outputs ``2 j`` or ``2 j + 1`` of the transposed operation, along one
    axis of ``k`` taps."""
    return range(-(k // 4), (k // 2 + 1) // 2 + 1)


def every_tap(sizes: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """The index of every tap of a kernel of these spatial sizes, last axis fastest."""
    return itertools.product(*(range(k) for k in sizes))

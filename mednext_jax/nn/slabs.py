"""Loops over slabs of an array's first spatial axis, so that on CPU what is made on the way stays in cache.

What such a loop returns has a second use: XLA on CPU computes an elementwise result again inside every consumer that
it fuses it into, a sum of 27 shifted products too (four times per block, seen in compiled programs). A loop's result
is never computed twice. Elsewhere the slab is the whole array, and there is no loop.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

SLAB_BYTES = 2**20  # about half of one core's second-level cache


def thickness_of(x: Array, width: int) -> int:
    """Planes in a slab of x (B, *spatial, C), if ``width`` channels are made of it.

    A divisor of the depth; all planes where slabs do not help.
    """
    depth = x.shape[1]
    if jax.default_backend() != "cpu":
        return depth
    plane_bytes = 4 * width * x.shape[0] * math.prod(x.shape[2:-1])
    return max([d for d in range(1, depth + 1) if depth % d == 0 and d * plane_bytes <= SLAB_BYTES], default=1)


def each_slab(slab: Callable[[Any, Any], Any], count: int, start: Any) -> Any:
    """``slab(i, carry) -> carry`` for every i; a single slab is no loop."""
    return slab(jnp.uint32(0), start) if count == 1 else counted_loop(count, slab, start)


def counted_loop(count: int, body: Callable[[Array, Any], Any], start: Any) -> Any:
    """``fori_loop`` from 0 to ``count`` whose body gets an unsigned counter: no index needs a check for being negative.

    Each such check is a kernel of its own to XLA on CPU, to be compiled and, every time around, to be called.
    """
    return jax.lax.fori_loop(0, count, lambda i, carry: body(i.astype(jnp.uint32), carry), start)


def cut(array: Array, i: Array, thickness: int) -> Array:
    """Slab i."""
    if thickness == array.shape[1]:
        return array
    return jax.lax.dynamic_slice_in_dim(array, i * thickness, thickness, axis=1)


def put(array: Array, slab: Array, i: Array, thickness: int) -> Array:
    """The array with slab i replaced."""
    if thickness == array.shape[1]:
        return slab
    return jax.lax.dynamic_update_slice_in_dim(array, slab, i * thickness, axis=1)

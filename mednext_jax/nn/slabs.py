"""Loops over slabs of an array's first spatial axis, so that on CPU what is made on the way stays in cache.

What such a loop returns has a second use: XLA on CPU computes an elementwise result again inside every consumer that
it fuses it into, a sum of 27 shifted products too (four times per block, seen in compiled programs). A loop's result
is never computed twice. Elsewhere the slab is the whole array, and there is no loop.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

Margins = Sequence[tuple[int, int]]  # planes in front of and behind what counts, per spatial axis

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


def cut(array: Array, i: Array, thickness: int, margins: Margins = ()) -> Array:
    """Slab i of what lies within the margins."""
    if not margins:
        if thickness == array.shape[1]:
            return array
        return jax.lax.dynamic_slice_in_dim(array, i * thickness, thickness, axis=1)
    sizes = [n - sum(widths) for n, widths in zip(array.shape[1:-1], margins, strict=True)]
    sizes = (array.shape[0], thickness, *sizes[1:], array.shape[-1])
    return jax.lax.dynamic_slice(array, _start(i, thickness, margins), sizes)


def put(array: Array, slab: Array, i: Array, thickness: int, margins: Margins = ()) -> Array:
    """The array with slab i of what lies within the margins replaced."""
    if margins:
        return jax.lax.dynamic_update_slice(array, slab, _start(i, thickness, margins))
    if thickness == array.shape[1]:
        return slab
    return jax.lax.dynamic_update_slice_in_dim(array, slab, i * thickness, axis=1)


def room(shape: tuple[int, ...], g: Array) -> Array:
    """Zeros of this shape, but not before g is known: the gradient (B, ...) that they are made for.

    Plain zeros depend on nothing, so XLA would make them at the very start of a step and keep them.
    """
    never, first = _never(g)
    return jnp.broadcast_to(jnp.where(never, first, 0).reshape(-1, *(1,) * (len(shape) - 1)), shape)


def not_before(x: Array, g: Array) -> tuple[Array, Array]:
    """x and g (B, ...), bit for bit, but x not known before g is.

    What is computed from it in the backward pass can then be neither made early nor merged with the same result of
    the forward pass, which would have to be kept. ``optimization_barrier`` is gone on CPU when XLA merges; on a GPU it
    holds, without the copy of x that a kernel of ours would be given, and for less memory if g goes through it too.
    """
    if jax.default_backend() == "gpu":
        return jax.lax.optimization_barrier((x, g))
    never, first = (a.reshape(-1, *(1,) * (x.ndim - 1)) for a in _never(g))
    return jnp.where(never, first.astype(x.dtype), x), g


def _never(g: Array) -> tuple[Array, Array]:
    """False, in a way that XLA does not see through, and the first element of each sample, so that a batch that is
    split over devices stays where it is."""
    first = jax.lax.slice(g, (0,) * g.ndim, (g.shape[0], *(1,) * (g.ndim - 1)))
    return (first < 0) & (first > 0), first


def _start(i: Array, thickness: int, margins: Margins) -> tuple[Array, ...]:
    zero = jnp.uint32(0)
    (before, _), *others = margins
    return (zero, i * thickness + before, *(zero + width for width, _ in others), zero)

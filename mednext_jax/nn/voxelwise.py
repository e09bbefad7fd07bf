"""Functions of one voxel's channels, applied slab by slab, with a backward pass that keeps only the input.

Memory is what limits 3-D training, and the expanded activations (2 to 8 times the block's input) are the hog. They
are never stored: the backward pass computes them again. On CPU, where a slab of them fits the cache, both passes run
slab by slab along the first spatial axis, so that they never even reach memory; elsewhere the slab is the whole array.

The norm in front of the function has its gradient in closed form: with ``n = x_hat * scale + bias`` and N voxels,
``dx = scale * rstd * (dn - sum(dn) / N - x_hat * sum(dn * x_hat) / N)``; both sums are the norm's own gradients and
fall out of the loop that makes dn, so no further pass over memory is needed for them.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero

from mednext_jax.nn.layers import EPSILON, Weights, channel_norm
from mednext_jax.nn.slabs import cut, each_slab, put, thickness_of

Statistics = tuple[Array, Array]  # mean and reciprocal standard deviation per sample and channel


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def add_voxelwise(
    f: Callable[[Array, Any], Array], width: int, x: Array, onto: Array | None, norm: Weights | None, weights: Any
) -> Array:
    """``onto + f(norm(x), weights)``.

    Shapes: x (B, *spatial, C); onto (B, *spatial, out), in the dtype of x, or None for nothing; returns
    (B, *spatial, out).

    Args:
      f: treats voxels independently; hashable, so a function of a module.
      width: channels that f makes of a voxel at most; it decides how thick a slab is.
      norm: of one channel per group, or None for none.
      weights: what f needs, differentiable; any tree of arrays.
    """
    return _forward(f, width, x, onto, norm, weights)[0]


def _forward(f: Callable, width: int, x: Array, onto: Array | None, norm: Weights | None, weights: Any):
    statistics = None if norm is None else channel_statistics(x)
    thickness = thickness_of(x, width)

    def slab(i: Array, out: Array) -> Array:
        here = f(_normed(cut(x, i, thickness), statistics, norm), weights)
        return put(out, here if onto is None else cut(out, i, thickness) + here, i, thickness)

    out = onto
    if onto is None:
        out = jnp.zeros((*x.shape[:-1], jax.eval_shape(f, x[:, :1], weights).shape[-1]), x.dtype)
    return each_slab(slab, x.shape[1] // thickness, out), statistics


def _saving_forward(f: Callable, width: int, *arguments: Any) -> tuple[Array, tuple]:
    """The forward pass, told of every leaf whether it takes part in differentiation.

    What does and what does not is handed on by where None stands in two trees: structure, so it is static.
    """

    def values(keep: Callable[[Any], bool]) -> Any:
        return jax.tree.map(lambda leaf: leaf.value if keep(leaf) else None, arguments, is_leaf=_is_primal)

    out, statistics = _forward(f, width, *values(lambda leaf: True))
    x, onto, *wanted = values(lambda leaf: leaf.perturbed)
    other_x, _, *others = values(lambda leaf: not leaf.perturbed)
    onto = None if onto is None else jnp.zeros((0,), onto.dtype)  # only whether it is wanted
    return out, ((x, onto, *wanted), (other_x, *others), statistics)


def _is_primal(leaf: Any) -> bool:
    return hasattr(leaf, "perturbed")


def _backward(f: Callable, width: int, saved: tuple, g: Any) -> tuple:
    (wanted_x, wanted_onto, wanted_norm, wanted), (other_x, other_norm, others), statistics = saved
    if isinstance(g, SymbolicZero):
        return None, None, None, None
    x, norm = other_x if wanted_x is None else wanted_x, _joined(wanted_norm, other_norm)
    thickness = thickness_of(x, width)
    needs_sums = norm is not None and (wanted_x is not None or bool(jax.tree.leaves(wanted_norm)))

    def slab(i: Array, carry: tuple) -> tuple:
        d_n, sums, d_weights = carry
        here = cut(x, i, thickness)

        def function(n: Array, weights: Any) -> Array:
            return f(n, _joined(weights, others))

        n = _normed(here, statistics, norm)
        d_here, d_here_weights = jax.vjp(function, n, wanted)[1](cut(g, i, thickness))
        d_weights = jax.tree.map(jnp.add, d_weights, d_here_weights)
        if needs_sums:
            sums = jax.tree.map(jnp.add, sums, _norm_sums(d_here, here, statistics))
        return (None if d_n is None else put(d_n, d_here, i, thickness)), sums, d_weights

    zero = jnp.zeros((x.shape[0], *(1,) * (x.ndim - 2), x.shape[-1]), jnp.float32)
    # Not zeros: those depend on nothing, so XLA would make them at the very start of a step and keep them. One element
    # of each sample, so that a batch that is split over devices stays where it is.
    first = jax.lax.slice(g, (0,) * g.ndim, (g.shape[0], *(1,) * (g.ndim - 1))).astype(x.dtype)
    room = None if wanted_x is None else jnp.broadcast_to(first, x.shape)
    start = room, (zero, zero) if needs_sums else None, jax.tree.map(jnp.zeros_like, wanted)
    d_n, sums, d_weights = each_slab(slab, x.shape[1] // thickness, start)
    d_x = d_n if d_n is None or norm is None else _through_norm(d_n, x, statistics, norm.scale, *sums)
    d_norm = wanted_norm if norm is None else _norm_gradient(wanted_norm, sums)
    return d_x, None if wanted_onto is None else g, d_norm, d_weights


add_voxelwise.defvjp(_saving_forward, _backward, symbolic_zeros=True)


def _normed(x: Array, statistics: Statistics | None, norm: Weights | None) -> Array:
    return x if norm is None else channel_norm(x, *statistics, norm)


def channel_statistics(x: Array) -> Statistics:
    """Mean and reciprocal standard deviation over space, each (B, 1, ..., 1, C) float32.

    Slab by slab, each about its own mean, merged as by Chan et al. (1983): one pass over memory, and exact where the
    mean is large beside the deviation.
    """
    thickness = thickness_of(x, x.shape[-1])
    axes = tuple(range(1, x.ndim - 1))
    voxels = thickness * math.prod(x.shape[2:-1])

    def slab(i: Array, sofar: Statistics) -> Statistics:
        here = cut(x, i, thickness).astype(jnp.float32)
        mean = here.mean(axes, keepdims=True)
        squares = jnp.square(here - mean).sum(axes, keepdims=True)
        difference, share = mean - sofar[0], 1 / (jnp.asarray(i, jnp.float32) + 1)
        return (sofar[0] + difference * share,
                sofar[1] + squares + jnp.square(difference) * (voxels * (1 - share)))  # fmt: skip

    zero = jnp.zeros((x.shape[0], *(1,) * len(axes), x.shape[-1]), jnp.float32)
    mean, squares = each_slab(slab, x.shape[1] // thickness, (zero, zero))
    return mean, jax.lax.rsqrt(squares / math.prod(x.shape[1:-1]) + EPSILON)


def _norm_sums(d_n: Array, x: Array, statistics: Statistics) -> tuple[Array, Array]:
    """``sum(dn)`` and ``sum(dn * x_hat)`` over space, each (B, 1, ..., 1, C)."""
    mean, rstd = statistics
    axes = tuple(range(1, x.ndim - 1))
    d_n, x_hat = d_n.astype(jnp.float32), (x.astype(jnp.float32) - mean) * rstd
    return d_n.sum(axes, keepdims=True), (d_n * x_hat).sum(axes, keepdims=True)


def _norm_gradient(wanted: Weights, sums: tuple[Array, Array] | None) -> Weights:
    """The gradients of those of the norm's parameters that are wanted."""

    def over_batch(parameter: Array | None, total: Callable[[], Array]) -> Array | None:
        return None if parameter is None else total().reshape(-1, parameter.size).sum(0).astype(parameter.dtype)

    bias, scale = over_batch(wanted.bias, lambda: sums[0]), over_batch(wanted.scale, lambda: sums[1])
    return wanted.replace(bias=bias, scale=scale)


def _through_norm(d_n: Array, x: Array, statistics: Statistics, scale: Array, total: Array, moment: Array) -> Array:
    """The gradient with respect to the norm's input, in the place of ``d_n``."""
    mean, rstd = statistics
    voxels = math.prod(x.shape[1:-1])
    thickness = thickness_of(x, x.shape[-1])

    def slab(i: Array, d_x: Array) -> Array:
        x_hat = (cut(x, i, thickness).astype(jnp.float32) - mean) * rstd
        here = cut(d_x, i, thickness).astype(jnp.float32) - total / voxels - x_hat * (moment / voxels)
        return put(d_x, (scale * rstd * here).astype(x.dtype), i, thickness)

    return each_slab(slab, x.shape[1] // thickness, d_n)


def _joined(some: Any, others: Any) -> Any:
    """Two trees that have None where the other has a leaf, as one."""
    return jax.tree.map(lambda a, b: b if a is None else a, some, others, is_leaf=lambda leaf: leaf is None)

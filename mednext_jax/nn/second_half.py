"""The second half of a block, norm, expansion, GELU and compression, with a backward pass of its own.

Memory is what limits 3-D training, and the expanded activations (2 to 8 times the block's input) are the hog. They
are never stored: the backward pass computes them again. On CPU, where a slab of them fits the cache, both passes run
slab by slab along the first spatial axis, so that they never even reach memory; elsewhere the slab is the whole array.

The norm's gradient is the closed form: with ``n = x_hat * scale + bias`` and N voxels,
``dy = scale * rstd * (dn - sum(dn) / N - x_hat * sum(dn * x_hat) / N)``; both sums are the norm's own gradients and
fall out of the loop that makes dn, so no further pass over memory is needed for them.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from mednext_jax.nn.layers import Weights, channel_norm, channel_statistics, gelu, pointwise

SLAB_BYTES = 2**20  # of expanded activations; about half of one core's second-level cache

Layers = tuple[Weights, Weights, Weights]  # norm, expand, compress


@jax.custom_vjp
def norm_mlp(y: Array, onto: Array | None, layers: Layers) -> Array:
    """``onto + compress(gelu(expand(norm(y))))`` with a norm of one channel per group.

    Shapes: y (B, *spatial, C); onto (B, *spatial, out) or None for nothing; returns (B, *spatial, out), dtype of y.
    """
    return _forward(y, onto, layers)[0]


def _forward(y: Array, onto: Array | None, layers: Layers) -> tuple[Array, tuple[Array, Array]]:
    norm, expand, compress = layers
    mean, rstd = channel_statistics(y)
    thickness = _thickness(y, expand.kernel.shape[-1])

    def slab(i: Array | int, out: Array) -> Array:
        n = channel_norm(_cut(y, i, thickness), mean, rstd, norm)
        return _put(out, _cut(out, i, thickness) + _mlp(n, expand, compress), i, thickness)

    out = jnp.zeros((*y.shape[:-1], compress.kernel.shape[-1]), y.dtype) if onto is None else onto
    return _each_slab(slab, y.shape[1] // thickness, out), (mean, rstd)


def _saving_forward(y: Any, onto: Any, layers: Any) -> tuple[Array, tuple]:
    """The forward pass, told of every argument's leaf whether it takes part in differentiation."""

    def is_leaf(leaf: Any) -> bool:
        return hasattr(leaf, "perturbed")

    def values(keep: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.value if keep(leaf) else None, (y, onto, layers), is_leaf=is_leaf)

    everything = values(lambda leaf: True)
    out, statistics = _forward(*everything)
    # What is differentiated and what is not is told by where None stands: that is structure, so it is static.
    (wanted_y, wanted_onto, wanted), (other_y, _, other) = values(lambda p: p.perturbed), values(
        lambda p: not p.perturbed)
    # Of ``onto`` only whether it is wanted: an empty array says so.
    wanted_onto = None if wanted_onto is None else jnp.zeros((0,), wanted_onto.dtype)
    return out, ((wanted_y, wanted_onto, wanted), (other_y, other), statistics)


def _backward(saved: tuple, g: Any) -> tuple:
    (wanted_y, wanted_onto, wanted), (other_y, other), (mean, rstd) = saved
    if isinstance(g, jax.custom_derivatives.SymbolicZero):
        return None, None, None
    y = other_y if wanted_y is None else wanted_y
    norm, *_ = _joined(wanted, other)
    thickness = _thickness(y, _joined(wanted, other)[1].kernel.shape[-1])
    axes = tuple(range(1, y.ndim - 1))
    norm_wanted = wanted_y is not None or jax.tree.leaves(wanted[0])

    def slab(i: Array | int, carry: tuple) -> tuple:
        d_n, sums, d_layers = carry
        here = _cut(y, i, thickness)

        def mlp(n: Array, layers: tuple) -> Array:
            return _mlp(n, *_joined(layers, other[1:]))

        n = channel_norm(here, mean, rstd, norm)
        d_here, d_here_layers = jax.vjp(mlp, n, wanted[1:])[1](_cut(g, i, thickness))
        d_layers = jax.tree.map(jnp.add, d_layers, d_here_layers)
        if norm_wanted:
            wide = d_here.astype(jnp.float32)
            x_hat = (here.astype(jnp.float32) - mean) * rstd
            sums = (sums[0] + wide.sum(axes, keepdims=True), sums[1] + (wide * x_hat).sum(axes, keepdims=True))
        return (None if d_n is None else _put(d_n, d_here, i, thickness)), sums, d_layers

    zero = jnp.zeros(mean.shape, jnp.float32)
    start = (None if wanted_y is None else jnp.zeros(y.shape, y.dtype),
             (zero, zero) if norm_wanted else None,
             jax.tree.map(jnp.zeros_like, wanted[1:]))  # fmt: skip
    d_n, sums, d_layers = _each_slab(slab, y.shape[1] // thickness, start)
    d_y = None if wanted_y is None else _through_norm(d_n, y, mean, rstd, norm.scale, *sums)
    return d_y, None if wanted_onto is None else g, (_of_norm(wanted[0], sums), *d_layers)


norm_mlp.defvjp(_saving_forward, _backward, symbolic_zeros=True)


def _of_norm(wanted: Weights, sums: tuple[Array, Array] | None) -> Weights:
    """The gradients of the norm's wanted parameters: sums over the batch of what the loop has summed over space."""
    found = wanted
    if wanted.bias is not None:
        found = found.replace(bias=sums[0].reshape(-1, wanted.bias.shape[0]).sum(0).astype(wanted.bias.dtype))
    if wanted.scale is not None:
        found = found.replace(scale=sums[1].reshape(-1, wanted.scale.shape[0]).sum(0).astype(wanted.scale.dtype))
    return found


def _through_norm(d_n: Array, y: Array, mean: Array, rstd: Array, scale: Array, total: Array, moment: Array) -> Array:
    """The gradient with respect to the norm's input."""
    voxels = math.prod(y.shape[1:-1])
    x_hat = (y.astype(jnp.float32) - mean) * rstd
    d_y = (scale * rstd) * (d_n.astype(jnp.float32) - total / voxels - x_hat * (moment / voxels))
    return d_y.astype(y.dtype)


def _mlp(n: Array, expand: Weights, compress: Weights) -> Array:
    return pointwise(gelu(pointwise(n, expand)), compress)


def _joined(some: Any, others: Any) -> Any:
    """Two trees that have None where the other has a leaf, as one."""
    return jax.tree.map(lambda a, b: b if a is None else a, some, others, is_leaf=lambda leaf: leaf is None)


def _thickness(y: Array, expanded: int) -> int:
    """Planes in a slab: a divisor of the depth; all of them where slabs do not help."""
    depth = y.shape[1]
    if jax.default_backend() != "cpu":
        return depth
    wanted = SLAB_BYTES / (4 * expanded * y.shape[0] * math.prod(y.shape[2:-1]))
    return max([d for d in range(1, depth + 1) if depth % d == 0 and d <= wanted], default=1)


def _each_slab(slab: Any, count: int, start: Any) -> Any:
    return slab(0, start) if count == 1 else jax.lax.fori_loop(0, count, slab, start)


def _cut(array: Array, i: Array | int, thickness: int) -> Array:
    if thickness == array.shape[1]:
        return array
    return jax.lax.dynamic_slice_in_dim(array, i * thickness, thickness, axis=1)


def _put(array: Array, slab: Array, i: Array | int, thickness: int) -> Array:
    if thickness == array.shape[1]:
        return slab
    return jax.lax.dynamic_update_slice_in_dim(array, slab, i * thickness, axis=1)

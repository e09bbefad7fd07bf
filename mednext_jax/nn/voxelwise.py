"""Functions of one voxel's channels, applied slab by slab, with a backward pass that keeps what they were applied to.

Memory is what limits 3-D training, and the expanded activations (2 to 8 times the block's input) are the hog. They
are never stored: the backward pass computes them again. On CPU, where a slab of them fits the cache, both passes run
slab by slab along the first spatial axis, so that they never even reach memory; elsewhere the slab is the whole array.

The norm in front of the function has its gradient in closed form: with ``n = x_hat * scale + bias`` and N voxels,
``dx = scale * rstd * (dn - sum(dn) / N - x_hat * sum(dn * x_hat) / N)``; both sums are the norm's own gradients and
fall out of the loop that makes dn, so no further pass over memory is needed for them.

On an NVIDIA GPU in bfloat16 the kernels of mednext_jax/nn/gpu do both passes where they can.

A depthwise convolution in front of the norm can be part of the same operation. Its gradients then read what that loop
wrote, which already has the zeros around it that they need, and its result may be computed again instead of kept.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero

from mednext_jax.nn import depthwise
from mednext_jax.nn.gpu import mlp, per_voxel
from mednext_jax.nn.gpu import statistics as gpu_statistics
from mednext_jax.nn.layers import EPSILON, Weights, channel_norm
from mednext_jax.nn.slabs import Margins, cut, each_slab, not_before, put, room, thickness_of
from mednext_jax.nn.windows import padded

Statistics = tuple[Array, Array]  # mean and reciprocal standard deviation per sample and channel


@dataclass(frozen=True)
class Before:
    """The depthwise convolution in front.

    Attributes:
      mode: what it does to the size, one of ``depthwise.MODES``.
      recompute: its input is kept anyway, so its result is computed again for the backward pass. What doubles the
        size always is: its result is eight times its input.
      residual: its input is also what the function's result is added to.
    """

    mode: str
    recompute: bool = False
    residual: bool = False


def add_voxelwise(
    f: Callable[[Array, Any], Array], width: int, x: Array, onto: Array | None, norm: Weights | None, weights: Any
) -> Array:
    """``onto + f(norm(x), weights)``.

    Shapes: x (B, *spatial, C); onto (B, *spatial, out), in the dtype of x, or None for nothing; returns
    (B, *spatial, out).

    Args:
      f: treats voxels independently; hashable, so a function of a module or a ``per_voxel.PerVoxel``.
      width: channels that f makes of a voxel at most; it decides how thick a slab is.
      norm: of one channel per group, or None for none.
      weights: what f needs, differentiable; any tree of arrays.
    """
    return _add(f, width, None, x, onto, None, norm, weights)


def add_convolved_voxelwise(
    f: Callable[[Array, Any], Array], width: int, before: Before, x: Array, onto: Array | None, kernel: Array,
    bias: Array | None, norm: Weights | None, weights: Any,
) -> Array:  # fmt: skip
    """``onto + f(norm(depthwise(x)), weights)``: what :func:`add_voxelwise` gives for the convolution's result.

    Shapes: x (B, *n, C); kernel (*k, 1, C), bias (C,) or None; onto and the result (B, *m, out), m by the mode.

    Raises:
      ValueError: for a kernel that does not fit ``x`` or has an even size.
    """
    if onto is x:  # told, so that both of its gradients are added where the second is made
        before, onto = dataclasses.replace(before, residual=True), None
    return _add(f, width, before, x, onto, (depthwise.checked_taps(x, kernel), bias), norm, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _add(
    f: Callable, width: int, before: Before | None, x: Array, onto: Array | None, convolution: tuple | None,
    norm: Weights | None, weights: Any,
) -> Array:  # fmt: skip
    return _forward(f, width, before, x, onto, convolution, norm, weights)[0]


# Both passes are jitted so that they are traced once per shape, not once per block.
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _forward(
    f: Callable, width: int, before: Before | None, x: Array, onto: Array | None, convolution: tuple | None,
    norm: Weights | None, weights: Any,
) -> tuple[Array, Array, Statistics | None]:  # fmt: skip
    """The result, what the norm saw, and its statistics."""
    y = x if before is None else depthwise.convolve(before.mode, x, *convolution)
    onto = x if before is not None and before.residual else onto
    statistics = None if norm is None else channel_statistics(y)
    if (matrices := per_voxel.taken(f, y, weights)) is not None:
        return mlp.forward(y, onto, per_voxel.norm_of(statistics, norm), matrices), y, statistics
    thickness = thickness_of(y, width)

    def slab(i: Array, out: Array) -> Array:
        here = f(_normed(cut(y, i, thickness), statistics, norm), weights)
        return put(out, here if onto is None else cut(out, i, thickness) + here, i, thickness)

    out = onto
    if onto is None:
        out = jnp.zeros((*y.shape[:-1], jax.eval_shape(f, y[:, :1], weights).shape[-1]), y.dtype)
    return each_slab(slab, y.shape[1] // thickness, out), y, statistics


def _saving_forward(f: Callable, width: int, before: Before | None, x: Any, onto: Any, *parameters: Any):
    """The forward pass, told of every leaf whether it takes part in differentiation.

    What does and what does not is handed on by where None stands in two trees: structure, so it is static.
    """

    def values(keep: Callable[[Any], bool]) -> Any:
        return jax.tree.map(lambda leaf: leaf.value if keep(leaf) else None, parameters, is_leaf=_is_primal)

    out, y, statistics = _forward(f, width, before, x.value, onto and onto.value, *values(lambda leaf: True))
    learnt, frozen = values(lambda leaf: leaf.perturbed), values(lambda leaf: not leaf.perturbed)
    taps, bias = learnt[0] or (None, None)
    wanted = depthwise.Wanted(x.perturbed, taps is not None, bias is not None, x.value.shape[1:-1])
    recompute = before is not None and (before.recompute or before.mode == "up")
    kept_x = x.value if recompute or wanted.taps else None
    return out, (wanted, kept_x, None if recompute else y, learnt, frozen, statistics, _mark(onto))


def _is_primal(leaf: Any) -> bool:
    return hasattr(leaf, "perturbed")


def _mark(onto: Any) -> Array | None:
    """Something if the gradient of ``onto`` is wanted."""
    return jnp.zeros((0,)) if onto is not None and onto.perturbed else None


def _backward(f: Callable, width: int, before: Before | None, saved: tuple, g: Any) -> tuple:
    *saved, onto = saved
    if isinstance(g, SymbolicZero):
        return None, None, None, None, None
    d_x, *d_parameters = _gradients(f, width, before, tuple(saved), g)
    return d_x, None if onto is None else g, *d_parameters


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _gradients(f: Callable, width: int, before: Before | None, saved: tuple, g: Array) -> tuple:
    """The gradients of x, convolution, norm and weights; None for leaves that are frozen."""
    wanted, x, y, learnt, frozen, statistics = saved
    convolution, norm, weights = _joined(learnt, frozen)
    if y is None:
        seen, g = not_before(x, g)
        y = depthwise.convolve(before.mode, seen, *convolution)
    needs_d_y = wanted.x or bool(jax.tree.leaves(learnt[0]))
    margins = () if before is None else depthwise.margins_of_gradient(before.mode, convolution[0], y)
    if by_kernels := per_voxel.taken(f, y, weights) is not None:
        needs_d_n = needs_d_y or bool(jax.tree.leaves(learnt[1]))
        d_y, sums, d_weights = per_voxel.gradients(
            lambda some: f.matrices(_joined(some, frozen[2])), learnt[2], per_voxel.norm_of(statistics, norm), y, g,
            needs_d_n,
        )  # fmt: skip
    else:
        d_y, sums, d_weights = _through_function(f, width, y, norm, statistics, learnt, frozen, g, needs_d_y, margins)
    if needs_d_y and norm is not None:
        d_y = _through_norm(d_y, () if by_kernels else margins, y, statistics, norm.scale, *sums)
    if needs_d_y and by_kernels and margins:
        d_y = padded(d_y, margins)
    d_norm = learnt[1] if norm is None else _norm_gradient(learnt[1], sums)
    if before is None:
        return d_y, None, d_norm, d_weights
    d_x = g.astype(y.dtype) if before.residual and wanted.x else None
    d_taps = d_bias = None
    if needs_d_y:
        normed = norm is not None  # takes a constant per channel away again: the bias's gradient is zero
        own = dataclasses.replace(wanted, bias=wanted.bias and not normed)
        d_x, d_taps, d_bias = depthwise.gradients(before.mode, x, convolution[0], d_y, own, d_x)
        d_bias = jnp.zeros_like(convolution[1]) if wanted.bias and normed else d_bias
    return d_x, (d_taps, d_bias), d_norm, d_weights


def _through_function(
    f: Callable, width: int, y: Array, norm: Weights | None, statistics: Statistics | None, learnt: tuple,
    frozen: tuple, g: Array, needs_d_n: bool, margins: Margins,
) -> tuple:  # fmt: skip
    """The gradient of the norm's result, with margins of zeros; that of the norm, in two sums; that of the weights."""
    needs_sums = norm is not None and (needs_d_n or bool(jax.tree.leaves(learnt[1])))
    thickness = thickness_of(y, width)

    def slab(i: Array, carry: tuple) -> tuple:
        d_n, sums, d_weights = carry
        here = cut(y, i, thickness)

        def function(n: Array, weights: Any) -> Array:
            return f(n, _joined(weights, frozen[2]))

        n = _normed(here, statistics, norm)
        d_here, d_here_weights = jax.vjp(function, n, learnt[2])[1](cut(g, i, thickness))
        d_weights = jax.tree.map(jnp.add, d_weights, d_here_weights)
        if needs_sums:
            sums = jax.tree.map(jnp.add, sums, _norm_sums(d_here, here, statistics))
        return (put(d_n, d_here, i, thickness, margins) if needs_d_n else None), sums, d_weights

    zero = jnp.zeros((y.shape[0], *(1,) * (y.ndim - 2), y.shape[-1]), jnp.float32)
    d_n = None
    if needs_d_n:
        sizes = y.shape[1:-1]
        if margins:
            sizes = tuple(n + sum(widths) for n, widths in zip(sizes, margins, strict=True))
        d_n = room((y.shape[0], *sizes, y.shape[-1]), g.astype(y.dtype))
    start = d_n, (zero, zero) if needs_sums else None, jax.tree.map(jnp.zeros_like, learnt[2])
    return each_slab(slab, y.shape[1] // thickness, start)


_add.defvjp(_saving_forward, _backward, symbolic_zeros=True)


def _normed(x: Array, statistics: Statistics | None, norm: Weights | None) -> Array:
    return x if norm is None else channel_norm(x, *statistics, norm)


def channel_statistics(x: Array) -> Statistics:
    """Mean and reciprocal standard deviation over space, each (B, 1, ..., 1, C) float32.

    Slab by slab, each about its own mean, merged as by Chan et al. (1983): one pass over memory, and exact where the
    mean is large beside the deviation.
    """
    if gpu_statistics.usable(x):
        mean, squares = (a.reshape(x.shape[0], *(1,) * (x.ndim - 2), -1) for a in gpu_statistics.mean_and_squares(x))
        return mean, jax.lax.rsqrt(squares / math.prod(x.shape[1:-1]) + EPSILON)
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


def _through_norm(
    d_n: Array, margins: Margins, y: Array, statistics: Statistics, scale: Array, total: Array, moment: Array
) -> Array:
    """The gradient with respect to the norm's input, in the place of ``d_n``."""
    mean, rstd = statistics
    voxels = math.prod(y.shape[1:-1])
    thickness = thickness_of(y, y.shape[-1])

    def slab(i: Array, d_y: Array) -> Array:
        y_hat = (cut(y, i, thickness).astype(jnp.float32) - mean) * rstd
        here = cut(d_y, i, thickness, margins).astype(jnp.float32) - total / voxels - y_hat * (moment / voxels)
        return put(d_y, (scale * rstd * here).astype(y.dtype), i, thickness, margins)

    return each_slab(slab, y.shape[1] // thickness, d_n)


def _joined(some: Any, others: Any) -> Any:
    """Two trees that have None where the other has a leaf, as one."""
    return jax.tree.map(lambda a, b: b if a is None else a, some, others, is_leaf=lambda leaf: leaf is None)

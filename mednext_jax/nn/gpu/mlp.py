"""Norm, expansion, GELU and compression of a block as GPU kernels (mednext_jax/nn/gpu/triton.py), forward and backward.

The expanded voxels, two to eight times the block's input, stay on the chip: a program takes some voxels through both
matrix products. XLA writes them to memory after the first product and reads them for the second, and in the backward
pass again for their gradients and for those of the matrices.

The kernels see no norm: for each sample it is made part of the expansion, ``y @ folded + bias`` with ``folded = rstd *
scale * expand`` rounded to the type of y, and the bias such that the mean falls out to float32's digits however large
it is.

Shapes: y (B, V, C), V voxels; statistics (B, C); expansion (C, E), compression (E, O).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mednext_jax.nn.gpu import mlp_kernels, triton
from mednext_jax.nn.layers import gelu

MOST_CHANNELS = 128  # in and out; those with more have few voxels


class Norm(NamedTuple):
    """What turns y into the expansion's input, ``(y - mean) * rstd * scale + shift``: (B, C), (B, C), (C,), (C,)."""

    mean: Array
    rstd: Array
    scale: Array
    shift: Array


class Matrices(NamedTuple):
    """Expansion (C, E) with bias (E,), compression (E, O) with bias (O,); float32."""

    expand: Array
    expand_bias: Array
    compress: Array
    compress_bias: Array


def usable(y: Array, matrices: Matrices) -> bool:
    """Whether the kernels take y (B, *spatial, C) and these matrices."""
    (channels, expanded), out = matrices.expand.shape, matrices.compress.shape[1]
    sums = y.shape[0] * mlp_kernels.most_sums((math.prod(y.shape[1:-1]), channels, expanded, out))
    if not triton.usable(y) or max(y.size // channels * out, sums) > triton.MOST_ELEMENTS:
        return False
    powers = all(size & (size - 1) == 0 for size in (channels, out))
    return powers and 16 <= channels <= MOST_CHANNELS and 16 <= out <= MOST_CHANNELS and expanded % 16 == 0


def forward(y: Array, onto: Array | None, norm: Norm | None, matrices: Matrices) -> Array:
    """``onto + compress(gelu(expand(norm(y))))``: y (B, *spatial, C), onto and result (B, *spatial, O)."""
    rows = y.reshape(y.shape[0], -1, y.shape[-1])
    out = matrices.compress.shape[1]
    more = () if onto is None else (onto.reshape(*rows.shape[:2], out),)
    sizes = (*rows.shape[1:], matrices.expand.shape[1], out)
    kernel = mlp_kernels.forward(sizes, onto is not None)

    def fast(y: Array, *others: Array) -> list[Array]:
        grid = (y.shape[0] * -(-y.shape[1] // mlp_kernels.VOXELS),)
        result = jax.ShapeDtypeStruct((*y.shape[:2], out), y.dtype)
        warps = 4 if sizes[1] <= 32 else 8
        return triton.launch(kernel, grid, [result], (y, *others), flops=_flops(y, sizes, 1), warps=warps)

    def reference(
        y: Array, expand: Array, expand_bias: Array, compress: Array, compress_bias: Array, *onto: Array
    ) -> tuple[Array]:
        h = jnp.einsum("bvc,bce->bve", y, expand, preferred_element_type=jnp.float32) + expand_bias[:, None]
        result = jnp.dot(gelu(h).astype(y.dtype), compress, preferred_element_type=jnp.float32) + compress_bias
        return ((result + onto[0].astype(jnp.float32) if onto else result).astype(y.dtype),)

    split = (True, True, True, False, False, *(True for _ in more))
    given = (*_folded(norm, matrices, y), matrices.compress.astype(y.dtype), matrices.compress_bias.astype(jnp.float32))
    (result,) = triton.with_reference(fast, reference, split, 1)(rows, *given, *more)
    return result.reshape(*y.shape[:-1], out)


class Gradients(NamedTuple):
    """Of the expansion's input d_n (B, *spatial, C); sums of d_n and of d_n * x_hat, (B, C); of the matrices.

    ``x_hat`` is the normed y, before scale and shift. None for what is not asked for.
    """

    d_n: Array | None
    total: Array | None
    moment: Array | None
    matrices: Matrices | None


def gradients(y: Array, g: Array, norm: Norm | None, matrices: Matrices, d_n: bool, d_matrices: bool) -> Gradients:
    """The gradients for g (B, *spatial, O), that of the result; ``d_n`` with the norm's sums.

    Where the matrices learn, the kernels add up the sums of ``y * d_h`` and H of d_h, the gradient before the GELU. Of
    them comes G, that of ``x_hat * d_h``, and what else is a sum over voxels: with n = x_hat * scale + shift, the
    expansion's gradient is ``scale * G + shift * H``; with d_n = d_h @ expand^T, its sum is ``H @ expand^T``, and that
    of ``d_n * x_hat`` is ``sum_e(G * expand)``.
    """
    together = mlp_kernels.chunk_of(matrices.expand.shape[1]) == matrices.expand.shape[1]
    found: dict[str, Array] = {}
    if d_n and not (together and d_matrices):
        found = _run_backward(y, g, norm, matrices, True, norm is not None and not d_matrices, False)
    if d_matrices:
        found |= _run_backward(y, g, norm, matrices, d_n and together, False, True)
    total, moment, d_weights = found.get("total"), found.get("moment"), None
    if moment is not None:
        moment = norm.rstd * moment
    if d_matrices:
        own, before_gelu = found["expand"], found["before_gelu"]
        if norm is not None:
            own = norm.rstd[:, :, None] * (own - norm.mean[:, :, None] * before_gelu[:, None])
        if d_n and norm is not None:
            expand = matrices.expand.astype(y.dtype).astype(jnp.float32)  # as the kernels have it
            total, moment = (before_gelu[:, None] * expand).sum(2), (own * expand).sum(2)
        d_expand, d_bias = own.sum(0), before_gelu.sum(0)
        if norm is not None:
            d_expand = norm.scale[:, None] * d_expand + norm.shift[:, None] * d_bias
        d_weights = Matrices(d_expand, d_bias, found["compress"].sum(0), found["out"].sum(0))
    return Gradients(found.get("d_n"), total, moment, d_weights)


def _flops(y: Array, sizes: mlp_kernels.Sizes, times: float) -> int:
    """Operations: both products and the GELU between them, so many times over."""
    _, channels, expanded, out = sizes
    return int(times * y.shape[0] * y.shape[1] * expanded * (2 * (channels + out) + 8))


def _exact(axes: str, a: Array, b: Array) -> Array:
    return jnp.einsum(axes, a, b, precision=jax.lax.Precision.HIGHEST)


def _run_backward(
    y: Array, g: Array, norm: Norm | None, matrices: Matrices, d_n: bool, norm_sums: bool, d_matrices: bool
) -> dict[str, Array]:
    """One kernel for what is asked for: "d_n" (B, *spatial, C); "total" and "moment" (B, C), the sums of d_n and of
    d_n * (y - mean); "expand" (B, C, E), that of y * d_h, "before_gelu" (B, E), "compress" (B, E, O), "out" (B, O).
    """
    batch, channels = y.shape[0], y.shape[-1]
    expanded, out = matrices.compress.shape
    rows, g_rows = y.reshape(batch, -1, channels), g.reshape(batch, -1, out)
    sizes = (*rows.shape[1:], expanded, out)
    kernel, programs, groups = mlp_kernels.backward(sizes, d_n, norm_sums, d_matrices)
    stages = 3 if channels + out <= 128 else 1  # voxels are read ahead where a small card's shared memory is enough
    shapes = mlp_kernels.sums_of(sizes, norm_sums, d_matrices)
    width = mlp_kernels.width_of(shapes)

    def fast(y: Array, g: Array, *others: Array) -> list[Array]:
        own = [jax.ShapeDtypeStruct(y.shape, y.dtype)] if d_n else []
        parts = [jax.ShapeDtypeStruct((y.shape[0], programs, width), jnp.float32)] if shapes else []
        return triton.launch(
            kernel, (y.shape[0] * programs, groups), own + parts, (y, g, *others),
            flops=_flops(y, sizes, 1 + d_n / 2 + d_matrices), warps=4, stages=stages,
        )  # fmt: skip

    def reference(y: Array, g: Array, folded: Array, expand_bias: Array, compress: Array, *others: Array):
        y, g, folded, compress, *others = (a.astype(jnp.float32) for a in (y, g, folded, compress, *others))
        a, to_h = jax.vjp(gelu, _exact("bvc,bce->bve", y, folded) + expand_bias[:, None])
        (d_h,) = to_h(_exact("bvo,eo->bve", g, compress))
        found, parts = [], []
        if d_n:
            own = _exact("bve,ce->bvc", d_h, others[0])
            found = [own.astype(rows.dtype)]
        if norm_sums:
            parts = [own.sum(1), (own * (y - others[1][:, None])).sum(1)]
        if d_matrices:
            parts += [_exact("bvc,bve->bce", y, d_h), d_h.sum(1), _exact("bve,bvo->beo", a, g), g.sum(1)]
        if parts:  # the sums in the place of the first program's, zeros in those of the others
            sums = jnp.concatenate([part.reshape(batch, -1) for part in parts], 1)
            found.append(jnp.pad(sums[:, None], ((0, 0), (0, programs - 1), (0, 0))))
        return tuple(found)

    given, split = [*_folded(norm, matrices, y), matrices.compress.astype(y.dtype)], [True, True, False]
    if d_n:
        given, split = [*given, matrices.expand.astype(y.dtype)], [*split, False]
    if norm_sums:
        given, split = [*given, norm.mean.astype(jnp.float32)], [*split, True]
    run = triton.with_reference(fast, reference, (True, True, *split), d_n + bool(shapes))
    results = list(run(rows, g_rows, *given))
    found = {"d_n": results.pop(0).reshape(y.shape)} if d_n else {}
    if shapes:
        ends = np.cumsum([math.prod(shape) for shape in shapes.values()])[:-1]
        parts = jnp.split(results.pop().sum(1), ends, axis=1)
        found |= {name: part.reshape(batch, *shapes[name]) for name, part in zip(shapes, parts, strict=True)}
    return found


def _folded(norm: Norm | None, matrices: Matrices, y: Array) -> tuple[Array, Array]:
    """The expansion with the norm folded in, (B, C, E) in the type of y, and its bias, (B, E) float32."""
    expand, bias = (a.astype(jnp.float32) for a in (matrices.expand, matrices.expand_bias))
    if norm is None:
        every = (expand.astype(y.dtype), bias)
        return tuple(jnp.broadcast_to(a, (y.shape[0], *a.shape)) for a in every)
    mean, rstd, scale, shift = (a.astype(jnp.float32) for a in norm)
    folded = ((rstd * scale)[:, :, None] * expand).astype(y.dtype)
    through = shift[:, None] * expand - mean[:, :, None] * folded.astype(jnp.float32)  # the rounded one meets the mean
    return folded, bias + through.sum(1)

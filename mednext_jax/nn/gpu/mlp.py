"""Norm, expansion, GELU and compression of a block as GPU kernels (mednext_jax/nn/gpu/triton.py), forward and backward.

The expanded voxels, two to eight times the block's input, stay on the chip: a program takes some voxels through both
matrix products. XLA writes them to memory after the first product and reads them for the second, and in the backward
pass again for their gradients and for those of the matrices.

Shapes: y (B, V, C), V voxels; statistics (B, C); expansion (C, E), compression (E, O).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from mednext_jax.nn.gpu import mlp_kernels, triton
from mednext_jax.nn.layers import Weights, channel_norm, gelu

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
    sizes = (*matrices.expand.shape, matrices.compress.shape[1])
    channels, expanded, out = sizes
    sums = y.shape[0] * mlp_kernels.most_sums(channels, expanded, out)
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
    kernel = mlp_kernels.forward(sizes, norm is not None, onto is not None)

    def fast(y: Array, *others: Array) -> list[Array]:
        grid = (y.shape[0] * -(-y.shape[1] // mlp_kernels.VOXELS),)
        result = jax.ShapeDtypeStruct((*y.shape[:2], out), y.dtype)
        warps = 4 if sizes[1] <= 32 else 8
        return triton.launch(kernel, grid, [result], (y, *others), flops=_flops(y, sizes, 1), warps=warps)

    def reference(y: Array, *others: Array) -> tuple[Array]:
        norm_, matrices_, rest = _taken(others, norm is not None)
        result = _reference(y, norm_, matrices_)
        return ((result + rest[0].astype(jnp.float32) if rest else result).astype(y.dtype),)

    split = (True, *_split(norm), *(True for _ in more))
    (result,) = triton.with_reference(fast, reference, split, 1)(rows, *_given(norm, matrices, y.dtype), *more)
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

    Where the matrices learn, the kernels add up the sums G of ``x_hat * d_h`` and H of d_h, the gradient before the
    GELU. What else is a sum over voxels follows from them: with n = x_hat * scale + shift, the expansion's gradient is
    ``scale * G + shift * H``; with d_n = d_h @ expand^T, its sum is ``H @ expand^T``, and that of ``d_n * x_hat`` is
    ``sum_e(G * expand)``.
    """
    together = mlp_kernels.chunk_of(matrices.expand.shape[1]) == matrices.expand.shape[1]
    found: dict[str, Array] = {}
    if d_n and not (together and d_matrices):
        found = _run_backward(y, g, norm, matrices, True, norm is not None and not d_matrices, False)
    if d_matrices:
        found |= _run_backward(y, g, norm, matrices, d_n and together, False, True)
    total, moment, d_weights = found.get("total"), found.get("moment"), None
    if d_n and d_matrices and norm is not None:
        expand = matrices.expand.astype(y.dtype).astype(jnp.float32)  # as the kernels have it
        total = _exact("be,ce->bc", found["before_gelu"], expand)
        moment = (found["expand"] * expand).sum(2)
    if d_matrices:
        d_expand = found["expand"].sum(0)
        if norm is not None:
            d_expand = norm.scale[:, None] * d_expand + norm.shift[:, None] * found["before_gelu"].sum(0)
        d_weights = Matrices(d_expand, found["before_gelu"].sum(0), found["compress"].sum(0), found["out"].sum(0))
    return Gradients(found.get("d_n"), total, moment, d_weights)


def _flops(y: Array, sizes: tuple[int, int, int, int], times: float) -> int:
    """Operations: both products and the GELU between them, so many times over."""
    _, channels, expanded, out = sizes
    return int(times * y.shape[0] * y.shape[1] * expanded * (2 * (channels + out) + 8))


def _exact(axes: str, a: Array, b: Array) -> Array:
    return jnp.einsum(axes, a, b, precision=jax.lax.Precision.HIGHEST)


def _run_backward(
    y: Array, g: Array, norm: Norm | None, matrices: Matrices, d_n: bool, norm_sums: bool, d_matrices: bool
) -> dict[str, Array]:
    """One kernel for what is asked for: "d_n" (B, *spatial, C); "total" and "moment" (B, C), the sums of d_n and of
    d_n * x_hat; "expand" (B, C, E), "before_gelu" (B, E), "compress" (B, E, O) and "out" (B, O).
    """
    batch, channels = y.shape[0], y.shape[-1]
    expanded, out = matrices.compress.shape
    rows, g_rows = y.reshape(batch, -1, channels), g.reshape(batch, -1, out)
    sizes = (*rows.shape[1:], expanded, out)
    kernel, programs, groups = mlp_kernels.backward(sizes, norm is not None, d_n, norm_sums, d_matrices)
    stages = 3 if channels + out <= 128 else 1  # voxels are read ahead where a small card's shared memory is enough
    shapes = {}
    if norm_sums:
        shapes |= {"total": (channels,), "moment": (channels,)}
    if d_matrices:
        shapes |= {"expand": (channels, expanded), "before_gelu": (expanded,)}
        shapes |= {"compress": (expanded, out), "out": (out,)}

    def fast(y: Array, g: Array, *others: Array) -> list[Array]:
        own = [jax.ShapeDtypeStruct(y.shape, y.dtype)] if d_n else []
        parts = [jax.ShapeDtypeStruct((y.shape[0], programs, *shape), jnp.float32) for shape in shapes.values()]
        return triton.launch(
            kernel, (y.shape[0] * programs, groups), own + parts, (y, g, *others),
            flops=_flops(y, sizes, 1 + d_n / 2 + d_matrices), warps=4, stages=stages,
        )  # fmt: skip

    def reference(y: Array, g: Array, *others: Array) -> tuple[Array, ...]:
        norm_, matrices_, _ = _taken(others, norm is not None)
        n = y if norm_ is None else _normed(y, norm_)
        hat = (y if norm_ is None else _normed(y, norm_._replace(scale=jnp.ones(channels), shift=jnp.zeros(channels))))
        (n, hat, g), matrices_ = (a.astype(jnp.float32) for a in (n, hat, g)), Matrices(*matrices_)
        a, to_h = jax.vjp(gelu, _exact("bvc,ce->bve", n, matrices_.expand) + matrices_.expand_bias)
        (d_h,) = to_h(_exact("bvo,eo->bve", g, matrices_.compress))
        own = _exact("bve,ce->bvc", d_h, matrices_.expand)
        found = [own.astype(y.dtype)] if d_n else []
        parts = [own.sum(1), (own * hat).sum(1)] if norm_sums else []
        if d_matrices:
            parts += [_exact("bvc,bve->bce", hat, d_h), d_h.sum(1), _exact("bve,bvo->beo", a, g), g.sum(1)]
        # The sum in the place of the first program's, zeros in those of the others.
        return (*found, *(jnp.pad(p[:, None], ((0, 0), (0, programs - 1), *((0, 0),) * (p.ndim - 1))) for p in parts))

    split = (True, True, *_split(norm))
    run = triton.with_reference(fast, reference, split, len(shapes) + d_n)
    results = list(run(rows, g_rows, *_given(norm, matrices, y.dtype)))
    found = {"d_n": results.pop(0).reshape(y.shape)} if d_n else {}
    return found | {name: part.sum(1) for name, part in zip(shapes, results, strict=True)}


def _given(norm: Norm | None, matrices: Matrices, dtype: jnp.dtype) -> tuple[Array, ...]:
    """The kernels' arguments: the norm's in float32, the matrices in the type of the products, biases in float32."""
    numbers = () if norm is None else tuple(a.astype(jnp.float32) for a in norm)
    expand, expand_bias, compress, compress_bias = matrices
    biases = expand_bias.astype(jnp.float32), compress_bias.astype(jnp.float32)
    return (*numbers, expand.astype(dtype), biases[0], compress.astype(dtype), biases[1])


def _split(norm: Norm | None) -> tuple[bool, ...]:
    """Of those arguments, whether their first axis is the batch."""
    return (*(() if norm is None else (True, True, False, False)), False, False, False, False)


def _taken(others: tuple[Array, ...], normed: bool) -> tuple[Norm | None, Matrices, tuple[Array, ...]]:
    norm = Norm(*others[:4]) if normed else None
    others = others[4:] if normed else others
    return norm, Matrices(*others[:4]), others[4:]


def _normed(y: Array, norm: Norm) -> Array:
    return channel_norm(y, norm.mean[:, None], norm.rstd[:, None], Weights(None, norm.shift, norm.scale))


def _reference(y: Array, norm: Norm | None, matrices: Matrices) -> Array:
    """The same by XLA, float32."""
    n = y if norm is None else _normed(y, norm)
    h = jnp.dot(n, matrices.expand, preferred_element_type=jnp.float32) + matrices.expand_bias
    a = gelu(h).astype(y.dtype)
    return jnp.dot(a, matrices.compress, preferred_element_type=jnp.float32) + matrices.compress_bias

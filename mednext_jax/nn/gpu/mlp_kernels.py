"""The kernels of mednext_jax/nn/gpu/mlp.py, which says what they compute and how their arrays are laid out."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from mednext_jax.nn.gpu import triton

VOXELS, VOXELS_BACK = 128, 64  # that a program takes at once, forward and backward
PROGRAMS = 768  # per sample, at most, of which each adds up the sums of its voxels
SUMS = 2**22  # numbers that a sample's programs write in all, unless there are PROGRAMS_LEAST of them
PROGRAMS_LEAST = 64


def most_sums(channels: int, expanded: int, out: int) -> int:
    """Numbers that a sample's programs write at most of the matrices' gradients."""
    return max(SUMS, PROGRAMS_LEAST * expanded * (channels + out))


def chunk_of(expanded: int) -> int:
    """Expanded channels that are worked on at once."""
    return min(expanded & -expanded, 64)


def _tail(h: Array) -> tuple[Array, Array]:
    """Phi(-|h|) and exp(-h^2 / 2): Abramowitz & Stegun 7.1.26, within 1e-7; one exponential serves both."""
    bell = triton.power_of_two(h * h * (-0.5 * math.log2(math.e)))
    t = triton.reciprocal(triton.multiply_add(jnp.abs(h), 0.3275911 * 0.5**0.5, 1.0))
    polynomial = jnp.full_like(h, 0.5 * 1.061405429)
    for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        polynomial = triton.multiply_add(t, polynomial, 0.5 * coefficient)
    return polynomial * t * bell, bell


def _gelu(h: Array) -> Array:
    return triton.multiply_add(-jnp.abs(h), _tail(h)[0], jnp.maximum(h, 0.0))


def _gelu_and_slope(h: Array) -> tuple[Array, Array]:
    tail, bell = _tail(h)
    share = jnp.where(h >= 0, 1.0 - tail, tail)
    return h * share, triton.multiply_add(h * (0.5 / math.pi) ** 0.5, bell, share)


def _dot(a: Array, b: Array, axes: tuple[int, int] = (1, 0)) -> Array:
    return jax.lax.dot_general(a, b, (((axes[0],), (axes[1],)), ((), ())), preferred_element_type=jnp.float32)


def _norm_of(refs: list, sample: Array, channels: int) -> tuple[Array, ...]:
    """Mean, rstd, scale and shift of one sample, each (1, C)."""
    channel = jnp.arange(channels)
    own = sample * channels + channel
    return tuple(ref[at][None, :] for ref, at in zip(refs, (own, own, channel, channel), strict=True))


@triton.kept
def forward(sizes: tuple[int, int, int, int], normed: bool, has_onto: bool) -> Callable:
    """The kernel: a program makes VOXELS voxels of the result."""
    voxels, channels, expanded, out = sizes
    pieces = -(-voxels // VOXELS)
    chunk = chunk_of(expanded)

    def bottleneck(y_ref, *refs):
        refs, out_ref = list(refs[:-1]), refs[-1]
        sample, piece = triton.divided(triton.place(0), pieces)
        row = piece * VOXELS + jnp.arange(VOXELS)
        real = (row < voxels)[:, None]
        at = (sample * voxels + row)[:, None]
        channel, outward = jnp.arange(channels), jnp.arange(out)
        n = triton.load(y_ref.at[at * channels + channel[None, :]], mask=real, other=0.0)
        if normed:
            mean, rstd, scale, shift = _norm_of(refs[:4], sample, channels)
            n = ((n.astype(jnp.float32) - mean) * (rstd * scale) + shift).astype(n.dtype)
            refs = refs[4:]
        expand_ref, expand_bias_ref, compress_ref, compress_bias_ref, *onto_ref = refs
        total = jnp.zeros((VOXELS, out), jnp.float32) + compress_bias_ref[outward][None, :]
        if has_onto:
            onto = triton.load(onto_ref[0].at[at * out + outward[None, :]], mask=real, other=0.0)
            total = total + onto.astype(jnp.float32)
        for first in range(0, expanded, chunk):
            middle = first + jnp.arange(chunk)
            expand = expand_ref[channel[:, None] * expanded + middle[None, :]]
            h = _dot(n, expand) + expand_bias_ref[middle][None, :]
            a = _gelu(h).astype(n.dtype)
            total = total + _dot(a, compress_ref[middle[:, None] * out + outward[None, :]])
        triton.store(out_ref.at[at * out + outward[None, :]], total.astype(out_ref.dtype), mask=real)

    return bottleneck


@triton.kept
def backward(
    sizes: tuple[int, int, int, int], normed: bool, wants_d_n: bool, norm_sums: bool, d_matrices: bool
) -> tuple[Callable, int, int]:
    """The kernel, its programs per sample, and the groups of expanded channels among which they are divided.

    Args: ``norm_sums``: of d_n and of d_n * x_hat, with ``wants_d_n`` and a norm, without ``d_matrices``.
    """
    voxels, channels, expanded, out = sizes
    chunk = chunk_of(expanded)
    each, programs = _shares(sizes, d_matrices)
    carried = _carried_shapes(channels, chunk, out, norm_sums, d_matrices)

    def bottleneck_gradients(y_ref, g_ref, *refs):
        place, group = triton.place(0), triton.place(1)
        sample, begin = triton.divided(place, programs)
        norm = _norm_of(list(refs[:4]), sample, channels) if normed else None
        expand, expand_bias, compress, _, *results = refs[4:] if normed else refs
        matrices = _Matrices(expand, expand_bias, compress, channels, expanded, out)
        ones = jnp.ones((16, VOXELS_BACK), y_ref.dtype)  # a sum over voxels is a product with them
        own = matrices.chunk(group * chunk + jnp.arange(chunk)) if d_matrices else None

        def step(i, carry):
            row = (begin * each + i) * VOXELS_BACK + jnp.arange(VOXELS_BACK)
            real, at = (row < voxels)[:, None], (sample * voxels + row)[:, None]
            y_at = at * channels + jnp.arange(channels)[None, :]
            y = triton.load(y_ref.at[y_at], mask=real, other=0.0)
            g = triton.load(g_ref.at[at * out + jnp.arange(out)[None, :]], mask=real, other=0.0)
            n, hat = _normed(y, norm)

            def add(number, d_n):
                """``d_n`` with what comes through one chunk of the expanded channels."""
                here = matrices.chunk(number * chunk + jnp.arange(chunk))
                return d_n + _dot(_back(n, g, here)[1], here[0], (1, 1))

            d_n = jnp.zeros((VOXELS_BACK, channels), jnp.float32)
            if d_matrices:
                a, d_h = _back(n, g, own)
                carry = _with_matrix_sums(carry, hat, a.astype(y.dtype), d_h, g, ones)
                d_n = d_n + _dot(d_h, own[0], (1, 1)) if wants_d_n else d_n
            else:
                d_n = jax.lax.fori_loop(0, expanded // chunk, add, d_n)
            d_n = d_n.astype(y.dtype)
            if norm_sums:
                carry = {"total": carry["total"] + _dot(ones, d_n), "moment": carry["moment"] + _dot(ones, d_n * hat)}
            if wants_d_n:
                triton.store(results[0].at[y_at], d_n, mask=real)
            return carry

        start = {name: jnp.zeros(shape, jnp.float32) for name, shape in carried.items()}
        carry = jax.lax.fori_loop(0, each, step, start)
        parts = dict(zip(carried, results[int(wants_d_n) :], strict=True))
        for name, total in carry.items():
            _write_sum(name, parts[name], total, place, matrices, group * chunk + jnp.arange(chunk))

    return bottleneck_gradients, programs, expanded // chunk if d_matrices else 1  # each has one chunk's sums


def _shares(sizes: tuple[int, int, int, int], d_matrices: bool) -> tuple[int, int]:
    """Blocks of voxels for each program, and programs per sample."""
    voxels, channels, expanded, out = sizes
    most = PROGRAMS
    if d_matrices:
        most = min(most_sums(channels, expanded, out) // (expanded * (channels + out)), PROGRAMS)
    each = -(-voxels // (VOXELS_BACK * most))
    return each, -(-voxels // (VOXELS_BACK * each))


def _carried_shapes(
    channels: int, chunk: int, out: int, norm_sums: bool, d_matrices: bool
) -> dict[str, tuple[int, int]]:
    """The sums that a program carries, in the order of its results; those over voxels alone in sixteen equal rows."""
    norms = {"total": (16, channels), "moment": (16, channels)}
    matrices = {"expand": (channels, chunk), "before_gelu": (16, chunk), "compress": (chunk, out), "out": (16, out)}
    return (norms if norm_sums else {}) | (matrices if d_matrices else {})


class _Matrices(NamedTuple):
    """Where the matrices lie, and their sizes."""

    expand: Any
    expand_bias: Any
    compress: Any
    channels: int
    expanded: int
    out: int

    def expand_at(self, middle: Array) -> Array:
        return jnp.arange(self.channels)[:, None] * self.expanded + middle[None, :]

    def compress_at(self, middle: Array) -> Array:
        return middle[:, None] * self.out + jnp.arange(self.out)[None, :]

    def chunk(self, middle: Array) -> tuple[Array, Array, Array]:
        """Expansion (C, E'), its bias (1, E') and compression (E', O) of these expanded channels."""
        bias = self.expand_bias[middle][None, :]
        return self.expand[self.expand_at(middle)], bias, self.compress[self.compress_at(middle)]


def _normed(y: Array, norm: tuple[Array, ...] | None) -> tuple[Array, Array]:
    """What the expansion sees, and x_hat: both (voxels, C), in the type of y."""
    if norm is None:
        return y, y
    mean, rstd, scale, shift = norm
    hat = (y.astype(jnp.float32) - mean) * rstd
    return (hat * scale + shift).astype(y.dtype), hat.astype(y.dtype)


def _back(n: Array, g: Array, weights: tuple[Array, Array, Array]) -> tuple[Array, Array]:
    """The GELU's result, float32, and the gradient in front of it, in the type of n: (voxels, E')."""
    expand, expand_bias, compress = weights
    a, slope = _gelu_and_slope(_dot(n, expand) + expand_bias)
    return a, (_dot(g, compress, (1, 1)) * slope).astype(n.dtype)


def _with_matrix_sums(
    carry: dict[str, Array], hat: Array, a: Array, d_h: Array, g: Array, ones: Array
) -> dict[str, Array]:
    """The sums that the matrices' gradients are made of, with those of one block of voxels."""
    return {"expand": carry["expand"] + _dot(hat, d_h, (0, 0)), "before_gelu": carry["before_gelu"] + _dot(ones, d_h),
            "compress": carry["compress"] + _dot(a, g, (0, 0)), "out": carry["out"] + _dot(ones, g)}  # fmt: skip


def _write_sum(name: str, ref: Any, total: Array, place: Array, matrices: _Matrices, middle: Array) -> None:
    """Writes one of a program's sums to its place among those of all programs; ``middle``: its expanded channels."""
    channels, expanded, out = matrices.channels, matrices.expanded, matrices.out
    if name == "expand":
        ref[place * (channels * expanded) + matrices.expand_at(middle)] = total
    elif name == "compress":
        ref[place * (expanded * out) + matrices.compress_at(middle)] = total
    else:  # "out" is the same in every group of programs
        widths = {"before_gelu": (expanded, middle), "out": (out, jnp.arange(out))}
        width, column = widths.get(name, (channels, jnp.arange(channels)))
        ref[place * width + column] = total.sum(0) * (1 / 16)

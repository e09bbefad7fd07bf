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
Sizes = tuple[int, int, int, int]  # voxels, channels, expanded channels, channels of the result
# log2 of the normal distribution's tail, by powers of the distance
TAIL = (-1.0, -1.14767552, -0.468181103, -0.045238802, 0.00498827703, -0.000241197157)


def most_sums(sizes: Sizes) -> int:
    """Numbers that a sample's programs write at most for the matrices' gradients."""
    return max(SUMS, PROGRAMS_LEAST * width_of(sums_of(sizes, False, True)))


def chunk_of(expanded: int) -> int:
    """Expanded channels that are worked on at once."""
    return min(expanded & -expanded, 64)


def _tail(distance: Array) -> Array:
    """Phi(-distance): two to the power of a polynomial, whose relative error, 3e-4 up to 5.5, is a tenth of what
    bfloat16 rounds away; beyond, Phi is below 2e-8 and the polynomial falls faster still. The exact value at 0.
    """
    polynomial = jnp.full_like(distance, TAIL[-1])
    for coefficient in reversed(TAIL[:-1]):
        polynomial = triton.multiply_add(polynomial, distance, coefficient)
    return triton.power_of_two(polynomial)


def _gelu(h: Array) -> Array:
    distance = jnp.abs(h)
    return triton.multiply_add(-distance, _tail(distance), jnp.maximum(h, 0.0))


def _gelu_and_slope(h: Array) -> tuple[Array, Array]:
    tail = _tail(jnp.abs(h))
    share = jnp.where(h >= 0, 1.0 - tail, tail)
    bell = triton.power_of_two(triton.multiply_add(h * (-0.5 * math.log2(math.e)), h, -0.5 * math.log2(2 * math.pi)))
    return h * share, triton.multiply_add(h, bell, share)


def _dot(a: Array, b: Array, axes: tuple[int, int] = (1, 0)) -> Array:
    return jax.lax.dot_general(a, b, (((axes[0],), (axes[1],)), ((), ())), preferred_element_type=jnp.float32)


@triton.kept
def forward(sizes: Sizes, has_onto: bool) -> Callable:
    """The kernel: a program makes VOXELS voxels of the result."""
    voxels, channels, expanded, out = sizes
    pieces = -(-voxels // VOXELS)
    chunk = chunk_of(expanded)

    def bottleneck(y_ref, expand_ref, expand_bias_ref, compress_ref, compress_bias_ref, *others):
        onto_ref, out_ref = others if has_onto else (None, *others)
        sample, piece = triton.divided(triton.place(0), pieces)
        row = piece * VOXELS + jnp.arange(VOXELS)
        real, at = (row < voxels)[:, None], (sample * voxels + row)[:, None]
        outward = jnp.arange(out)
        y = triton.load(y_ref.at[at * channels + jnp.arange(channels)[None, :]], mask=real, other=0.0)
        matrices = _Matrices(expand_ref, expand_bias_ref, compress_ref, None, sample, sizes)
        total = jnp.zeros((VOXELS, out), jnp.float32) + compress_bias_ref[outward][None, :]
        if has_onto:
            total = total + triton.load_wide(onto_ref.at[at * out + outward[None, :]], real)
        for first in range(0, expanded, chunk):
            here = matrices.chunk(first + jnp.arange(chunk))
            a = _gelu(_dot(y, here.folded) + here.bias).astype(y.dtype)
            total = total + _dot(a, here.compress)
        triton.store(out_ref.at[at * out + outward[None, :]], total.astype(out_ref.dtype), mask=real)

    return bottleneck


def sums_of(sizes: Sizes, norm_sums: bool, d_matrices: bool) -> dict[str, tuple[int, ...]]:
    """The sums over voxels that the backward kernel makes, with their shapes: each program writes them one after
    another."""
    _, channels, expanded, out = sizes
    found: dict[str, tuple[int, ...]] = {"total": (channels,), "moment": (channels,)} if norm_sums else {}
    if d_matrices:
        found |= {"expand": (channels, expanded), "before_gelu": (expanded,)}
        found |= {"compress": (expanded, out), "out": (out,)}
    return found


def width_of(sums: dict[str, tuple[int, ...]]) -> int:
    """Numbers that one program writes."""
    return sum(math.prod(shape) for shape in sums.values())


@triton.kept
def backward(sizes: Sizes, wants_d_n: bool, norm_sums: bool, d_matrices: bool) -> tuple[Callable, int, int]:
    """The kernel, its programs per sample, and the groups of expanded channels among which they are divided.

    Args: ``norm_sums``: of d_n and of d_n * (y - mean), with ``wants_d_n``, without ``d_matrices``.
    """
    voxels, channels, expanded, out = sizes
    chunk = chunk_of(expanded)
    each, programs = _shares(sizes, d_matrices)
    sums = sums_of(sizes, norm_sums, d_matrices)
    width = width_of(sums)

    def bottleneck_gradients(y_ref, g_ref, folded_ref, expand_bias_ref, compress_ref, *others):
        others, results = list(others), list(others[wants_d_n + norm_sums :])
        place, group = triton.place(0), triton.place(1)
        sample, begin = triton.divided(place, programs)
        expand_ref = others.pop(0) if wants_d_n else None
        mean = others[0][sample * channels + jnp.arange(channels)][None, :] if norm_sums else None
        matrices = _Matrices(folded_ref, expand_bias_ref, compress_ref, expand_ref, sample, sizes)
        ones = jnp.ones((16, VOXELS_BACK), y_ref.dtype)  # a sum over voxels is a product with them
        middle = group * chunk + jnp.arange(chunk)
        own = matrices.chunk(middle) if d_matrices else None

        def step(i, carry):
            row = (begin * each + i) * VOXELS_BACK + jnp.arange(VOXELS_BACK)
            real, at = (row < voxels)[:, None], (sample * voxels + row)[:, None]
            y_at = at * channels + jnp.arange(channels)[None, :]
            y = triton.load(y_ref.at[y_at], mask=real, other=0.0)
            g = triton.load(g_ref.at[at * out + jnp.arange(out)[None, :]], mask=real, other=0.0)

            def add(number, d_n):
                """``d_n`` with what comes through one chunk of the expanded channels."""
                here = matrices.chunk(number * chunk + jnp.arange(chunk))
                return d_n + _dot(_back(y, g, here)[1], here.expand, (1, 1))

            d_n = jnp.zeros((VOXELS_BACK, channels), jnp.float32)
            if d_matrices:
                a, d_h = _back(y, g, own)
                carry = _with_matrix_sums(carry, y, a.astype(y.dtype), d_h, g, ones)
                d_n = d_n + _dot(d_h, own.expand, (1, 1)) if wants_d_n else d_n
            else:
                d_n = jax.lax.fori_loop(0, expanded // chunk, add, d_n)
            d_n = d_n.astype(y.dtype)
            if norm_sums:
                apart = (y.astype(jnp.float32) - mean).astype(y.dtype)
                carry = {"total": carry["total"] + _dot(ones, d_n), "moment": carry["moment"] + _dot(ones, d_n * apart)}
            if wants_d_n:
                triton.store(results[0].at[y_at], d_n, mask=real)
            return carry

        # Sums over voxels alone are carried in sixteen equal rows.
        carried = {"expand": (channels, chunk), "compress": (chunk, out), "before_gelu": (16, chunk), "out": (16, out)}
        start = {name: jnp.zeros(carried.get(name, (16, channels)), jnp.float32) for name in sums}
        carry = jax.lax.fori_loop(0, each, step, start)
        places = {"expand": matrices.expand_at(middle), "before_gelu": middle, "compress": matrices.compress_at(middle),
                  "out": jnp.arange(out)}  # fmt: skip (the last is the same in every group)
        begins = place * width
        for name, shape in sums.items():
            at = places.get(name, jnp.arange(channels))
            results[-1][begins + at] = carry[name] if at.ndim == 2 else carry[name].sum(0) * (1 / 16)
            begins += math.prod(shape)

    return bottleneck_gradients, programs, expanded // chunk if d_matrices else 1  # each has one chunk's sums


def _shares(sizes: Sizes, d_matrices: bool) -> tuple[int, int]:
    """Blocks of voxels for each program, and programs per sample."""
    voxels = sizes[0]
    most = PROGRAMS
    if d_matrices:
        most = min(most_sums(sizes) // width_of(sums_of(sizes, False, True)), PROGRAMS)
    each = -(-voxels // (VOXELS_BACK * most))
    return each, -(-voxels // (VOXELS_BACK * each))


class _Chunk(NamedTuple):
    """Of some expanded channels: expansion (C, E') and bias (1, E') with the norm in them, compression (E', O), and the
    expansion without the norm, if there is one."""

    folded: Array
    bias: Array
    compress: Array
    expand: Array | None


class _Matrices(NamedTuple):
    """Where a sample's matrices lie, as in :class:`_Chunk`."""

    folded: Any
    bias: Any
    compress: Any
    expand: Any
    sample: Array
    sizes: Sizes

    def expand_at(self, middle: Array) -> Array:
        _, channels, expanded, _ = self.sizes
        return jnp.arange(channels)[:, None] * expanded + middle[None, :]

    def compress_at(self, middle: Array) -> Array:
        return middle[:, None] * self.sizes[3] + jnp.arange(self.sizes[3])[None, :]

    def chunk(self, middle: Array) -> _Chunk:
        _, channels, expanded, _ = self.sizes
        return _Chunk(
            self.folded[self.sample * (channels * expanded) + self.expand_at(middle)],
            self.bias[self.sample * expanded + middle][None, :],
            self.compress[self.compress_at(middle)],
            None if self.expand is None else self.expand[self.expand_at(middle)],
        )


def _back(y: Array, g: Array, chunk: _Chunk) -> tuple[Array, Array]:
    """The GELU's result, float32, and the gradient in front of it, in the type of y: (voxels, E')."""
    a, slope = _gelu_and_slope(_dot(y, chunk.folded) + chunk.bias)
    return a, (_dot(g, chunk.compress, (1, 1)) * slope).astype(y.dtype)


def _with_matrix_sums(
    carry: dict[str, Array], y: Array, a: Array, d_h: Array, g: Array, ones: Array
) -> dict[str, Array]:
    """The sums that the matrices' gradients are made of, with those of one block of voxels."""
    return {"expand": carry["expand"] + _dot(y, d_h, (0, 0)), "before_gelu": carry["before_gelu"] + _dot(ones, d_h),
            "compress": carry["compress"] + _dot(a, g, (0, 0)), "out": carry["out"] + _dot(ones, g)}  # fmt: skip

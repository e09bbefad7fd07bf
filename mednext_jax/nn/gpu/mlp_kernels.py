"""The kernels of mednext_jax/nn/gpu/mlp.py, which says what they compute and how their arrays are laid out."""

import math
from collections.abc import Callable

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
    groups = expanded // chunk if d_matrices else 1  # a program holds the sums of one chunk
    most = PROGRAMS
    if d_matrices:
        most = min(most_sums(channels, expanded, out) // (expanded * (channels + out)), PROGRAMS)
    each = -(-voxels // (VOXELS_BACK * most))
    programs = -(-voxels // (VOXELS_BACK * each))

    def bottleneck_gradients(y_ref, g_ref, *refs):
        refs = list(refs)
        place, group = triton.place(0), triton.place(1)
        sample, begin = triton.divided(place, programs)
        channel, outward = jnp.arange(channels), jnp.arange(out)
        if normed:
            mean, rstd, scale, shift = _norm_of(refs[:4], sample, channels)
            refs = refs[4:]
        expand_ref, expand_bias_ref, compress_ref, _, *results = refs
        ones = jnp.ones((16, VOXELS_BACK), y_ref.dtype)  # a sum over voxels is a product with them

        def part(number):
            return number * chunk + jnp.arange(chunk)

        def expand_at(middle):
            return channel[:, None] * expanded + middle[None, :]

        def compress_at(middle):
            return middle[:, None] * out + outward[None, :]

        def weights(middle):
            return expand_ref[expand_at(middle)], expand_bias_ref[middle][None, :], compress_ref[compress_at(middle)]

        own = weights(part(group)) if d_matrices else None

        def step(i, carry):
            row = (begin * each + i) * VOXELS_BACK + jnp.arange(VOXELS_BACK)
            real = (row < voxels)[:, None]
            at = (sample * voxels + row)[:, None]
            y = triton.load(y_ref.at[at * channels + channel[None, :]], mask=real, other=0.0)
            g = triton.load(g_ref.at[at * out + outward[None, :]], mask=real, other=0.0)
            n = hat = y
            if normed:
                hat = (y.astype(jnp.float32) - mean) * rstd
                n, hat = (hat * scale + shift).astype(y.dtype), hat.astype(y.dtype)

            def back(expand, expand_bias, compress):
                """The GELU, and the gradient in front of it."""
                a, slope = _gelu_and_slope(_dot(n, expand) + expand_bias)
                return a, (_dot(g, compress, (1, 1)) * slope).astype(y.dtype)

            def add(number, d_n):
                """``d_n`` with what comes through one chunk of the expanded channels."""
                expand, *others = weights(part(number))
                return d_n + _dot(back(expand, *others)[1], expand, (1, 1))

            d_n = jnp.zeros((VOXELS_BACK, channels), jnp.float32)
            carry = dict(carry)
            if d_matrices:
                a, d_h = back(*own)
                carry["expand"] = carry["expand"] + _dot(hat, d_h, (0, 0))
                carry["before_gelu"] = carry["before_gelu"] + _dot(ones, d_h)
                carry["compress"] = carry["compress"] + _dot(a.astype(y.dtype), g, (0, 0))
                if wants_d_n:
                    d_n = d_n + _dot(d_h, own[0], (1, 1))
                carry["out"] = carry["out"] + _dot(ones, g)
            else:
                d_n = jax.lax.fori_loop(0, expanded // chunk, add, d_n)
            if norm_sums:
                narrow = d_n.astype(y.dtype)
                carry["total"] = carry["total"] + _dot(ones, narrow)
                carry["moment"] = carry["moment"] + _dot(ones, narrow * hat)
            if wants_d_n:
                triton.store(results[0].at[at * channels + channel[None, :]], d_n.astype(y.dtype), mask=real)
            return carry

        shapes = {}
        if norm_sums:
            shapes |= {"total": (16, channels), "moment": (16, channels)}
        if d_matrices:
            shapes |= {"expand": (channels, chunk), "before_gelu": (16, chunk)}
            shapes |= {"compress": (chunk, out), "out": (16, out)}
        carry = {name: jnp.zeros(shape, jnp.float32) for name, shape in shapes.items()}
        carry = jax.lax.fori_loop(0, each, step, carry)
        parts, middle = results[int(wants_d_n) :], part(group)
        if norm_sums:
            parts[0][place * channels + channel] = _one_of(carry["total"])
            parts[1][place * channels + channel] = _one_of(carry["moment"])
        if d_matrices:
            parts[0][place * (channels * expanded) + expand_at(middle)] = carry["expand"]
            parts[1][place * expanded + middle] = _one_of(carry["before_gelu"])
            parts[2][place * (expanded * out) + compress_at(middle)] = carry["compress"]
            parts[3][place * out + outward] = _one_of(carry["out"])  # every group writes the same

    return bottleneck_gradients, programs, groups


def _one_of(rows: Array) -> Array:
    """One of sixteen equal rows."""
    return rows.sum(0) * (1 / 16)

"""Initial weights: torch's distribution, drawn by a hash that is quick to compile."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


def torch_uniform(fan_in: int):
    """Uniform within ``1 / sqrt(fan_in)``: torch's default for convolutions, kernel and bias alike."""

    bound = fan_in**-0.5

    def initializer(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array | np.ndarray:
        return uniform_by_hash(key, shape, bound).astype(dtype)

    return initializer


def uniform_by_hash(key: Array, shape: tuple[int, ...], bound: float) -> Array | np.ndarray:
    """Uniform float32 numbers in [-bound, bound): two rounds of an integer hash (murmur3's finaliser) of key and
    position.

    For initial weights only. A network draws some two hundred arrays, and as many calls of ``jax.random.uniform`` take
    14 s to compile on CPU. This takes 1 s in a compiled program, and outside of one NumPy does it, with the same bits.
    """
    if isinstance(key, jax.core.Tracer):
        return _traced_hash(jax.random.key_data(key), shape, bound)
    return _hash(np, np.asarray(jax.random.key_data(key)), shape, bound)


def _hash(numpy: Any, key_data: Any, shape: tuple[int, ...], bound: float) -> Any:
    """The numbers by NumPy or by ``jax.numpy``."""
    first, second = key_data[:2]
    bits = numpy.arange(math.prod(shape), dtype=numpy.uint32) * numpy.uint32(0x9E3779B9)
    for word in (first, second):
        bits = bits + word
        bits = (bits ^ (bits >> 16)) * numpy.uint32(0x85EBCA6B)
        bits = (bits ^ (bits >> 13)) * numpy.uint32(0xC2B2AE35)
        bits = bits ^ (bits >> 16)
    unit = ((bits >> 8).astype(numpy.float32) * 2.0**-24).reshape(shape)
    return (2 * unit - 1) * numpy.float32(bound)


# Traced once per shape: every ``apply`` asks for all shapes again.
_traced_hash = jax.jit(functools.partial(_hash, jnp), static_argnums=(1, 2))

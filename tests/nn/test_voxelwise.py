"""Norm and voxelwise function with their own backward pass, against JAX's derivative of the plain formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mednext_jax.nn import slabs
from mednext_jax.nn.layers import EPSILON, Weights
from mednext_jax.nn.voxelwise import add_voxelwise, channel_statistics

SHAPE, OUT = (2, 6, 5, 7, 3), 4


def squashed(n, kernel):
    return jnp.tanh(n) @ kernel


def plain(x, onto, norm, kernel):
    axes = (1, 2, 3)
    mean, variance = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
    return onto + squashed((x - mean) / jnp.sqrt(variance + EPSILON) * norm.scale + norm.bias, kernel)


def inputs(offset=0.0):
    rng = np.random.default_rng(3)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    norm = Weights(kernel=None, bias=draw(SHAPE[-1]), scale=draw(SHAPE[-1]))
    return draw(*SHAPE) + offset, draw(*SHAPE[:-1], OUT), norm, draw(SHAPE[-1], OUT)


@pytest.mark.parametrize("planes", [1, 3, 6])
@pytest.mark.parametrize("wanted", [(0, 1, 2, 3), (0,), (3,), (2,), (1, 2)])
def test_gradients_equal_those_of_the_plain_formula_whatever_is_frozen_and_however_thick_the_slabs(
    monkeypatch, planes, wanted
):
    monkeypatch.setattr(slabs, "SLAB_BYTES", planes * 4 * OUT * SHAPE[0] * SHAPE[2] * SHAPE[3])
    arguments = inputs()
    g = np.random.default_rng(4).standard_normal((*SHAPE[:-1], OUT)).astype(np.float32)

    def pulled(f):
        def of_wanted(*some):
            every = list(arguments)
            for position, value in zip(wanted, some, strict=True):
                every[position] = value
            return f(*every)

        y, pull = jax.vjp(of_wanted, *(arguments[i] for i in wanted))
        return y, pull(g)

    found, expected = jax.jit(lambda: (pulled(lambda *a: add_voxelwise(squashed, OUT, *a)), pulled(plain)))()
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=2e-4, atol=2e-5)


def test_statistics_are_right_where_the_mean_is_large_beside_the_deviation(monkeypatch):
    monkeypatch.setattr(slabs, "SLAB_BYTES", 1)
    x = np.asarray(inputs(offset=1000.0)[0])
    mean, rstd = jax.jit(channel_statistics)(x)
    exact = x.astype(np.float64)
    np.testing.assert_allclose(mean[:, 0, 0, 0], exact.mean((1, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(rstd[:, 0, 0, 0], 1 / np.sqrt(exact.var((1, 2, 3)) + EPSILON), rtol=1e-3)


def test_a_batch_split_over_devices_stays_where_it_is():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    x, onto, norm, kernel = inputs()
    split = NamedSharding(mesh, PartitionSpec("data"))
    step = jax.jit(
        jax.grad(lambda x, onto: jnp.sum(add_voxelwise(squashed, OUT, x, onto, norm, kernel) ** 2)),
        in_shardings=(split, split), out_shardings=split,
    )  # fmt: skip
    text = step.lower(x, onto).compile().as_text()
    assert "all-gather" not in text and "all-to-all" not in text
    expected = jax.jit(jax.grad(lambda x: jnp.sum(plain(x, onto, norm, kernel) ** 2)))(x)
    np.testing.assert_allclose(np.asarray(step(x, onto)), expected, rtol=1e-3, atol=1e-3)

"""Norm and voxelwise function with their own backward pass, against JAX's derivative of the plain formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mednext_jax.nn import depthwise, slabs
from mednext_jax.nn.layers import EPSILON, Weights
from mednext_jax.nn.voxelwise import Before, add_convolved_voxelwise, add_voxelwise, channel_statistics

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


def set_slabs(monkeypatch, planes):
    """Slabs of that many planes of the input; what was traced with others is forgotten."""
    monkeypatch.setattr(slabs, "SLAB_BYTES", planes * 4 * OUT * SHAPE[0] * SHAPE[2] * SHAPE[3])
    jax.clear_caches()


def assert_same_gradients(ours, formula, arguments, wanted):
    """Value, and the gradients of the ``wanted`` arguments with all others frozen."""
    g = np.random.default_rng(4).standard_normal(arguments[1].shape).astype(np.float32)

    def pulled(f):
        def of_wanted(*some):
            every = list(arguments)
            for position, value in zip(wanted, some, strict=True):
                every[position] = value
            return f(*every)

        y, pull = jax.vjp(of_wanted, *(arguments[i] for i in wanted))
        return y, pull(g)

    found, expected = jax.jit(lambda: (pulled(ours), pulled(formula)))()
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=2e-4, atol=5e-5)


@pytest.mark.parametrize("planes", [1, 3, 6])
@pytest.mark.parametrize("wanted", [(0, 1, 2, 3), (0,), (3,), (2,), (1, 2)])
def test_gradients_equal_those_of_the_plain_formula_whatever_is_frozen_and_however_thick_the_slabs(
    monkeypatch, planes, wanted
):
    set_slabs(monkeypatch, planes)
    assert_same_gradients(lambda *a: add_voxelwise(squashed, OUT, *a), plain, inputs(), wanted)


@pytest.mark.parametrize("mode", depthwise.MODES)
@pytest.mark.parametrize(
    "wanted, recompute, planes",
    [((0, 1, 2, 3, 4, 5), False, 1), ((0, 3), True, 1), ((0,), False, 99), ((2,), True, 99)],
)
def test_a_convolution_in_front_gives_the_gradients_of_the_plain_formula_kept_or_recomputed(
    monkeypatch, mode, wanted, recompute, planes
):
    set_slabs(monkeypatch, planes)
    x, _, norm, weights = inputs()
    rng = np.random.default_rng(5)
    kernel, bias, onto = (
        rng.standard_normal(shape).astype(np.float32)
        for shape in ((3, 3, 3, 1, 3), (3,), (2, *depthwise.out_sizes(mode, SHAPE[1:-1]), OUT))
    )

    def ours(x, onto, kernel, bias, norm, weights):
        return add_convolved_voxelwise(squashed, OUT, Before(mode, recompute), x, onto, kernel, bias, norm, weights)

    def formula(x, onto, kernel, bias, norm, weights):
        stride, dilation = 2 if mode == "down" else 1, 2 if mode == "up" else 1
        y = jax.lax.conv_general_dilated(
            x, kernel[::-1, ::-1, ::-1] if mode == "up" else kernel, (stride,) * 3, [(1, 1)] * 3, (dilation,) * 3,
            dimension_numbers=("NDHWC", "DHWIO", "NDHWC"), feature_group_count=3,
        )  # fmt: skip
        return plain(y + bias, onto, norm, weights)

    assert_same_gradients(ours, formula, (x, onto, kernel, bias, norm, weights), wanted)


def test_what_waits_for_a_gradient_keeps_its_bits_whatever_the_gradient_holds():
    x = np.float32([[[1, -0.0, np.inf]], [[0, 2, 3]]])
    for first in (0, -1, np.inf, np.nan):
        g = np.full((2, 4, 1, 2), first, np.float32)
        kept, zeros = jax.jit(lambda x, g: (slabs.not_before(x, g)[0], slabs.room((2, 3, 1), g)))(x, g)
        np.testing.assert_array_equal(np.asarray(kept).view(np.uint32), x.view(np.uint32))
        assert not np.asarray(zeros).view(np.uint32).any()


def test_statistics_are_right_where_the_mean_is_large_beside_the_deviation(monkeypatch):
    set_slabs(monkeypatch, 0)
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

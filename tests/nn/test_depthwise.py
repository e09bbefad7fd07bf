"""The depthwise operations against XLA's grouped convolution, finite differences, and under every transformation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mednext_jax.nn import tap_sums, windows
from mednext_jax.nn.depthwise import depthwise_conv, depthwise_conv_transpose

HIGHEST = jax.lax.Precision.HIGHEST
CASES = [  # spatial size, kernel
    ((7, 6, 5), (3, 3, 3)),
    ((6, 4, 5), (5, 5, 5)),
    ((5, 9, 4), (1, 3, 5)),
    ((9, 6), (3, 3)),
    ((8, 5), (7, 7)),
]


def arrays(spatial, kernel, channels=3, batch=2, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((batch, *spatial, channels)).astype(np.float32)
    return x, rng.standard_normal((*kernel, 1, channels)).astype(np.float32)


def numbers(spatial):
    axes = "DHW"[-len(spatial):]
    return (f"N{axes}C", f"{axes}IO", f"N{axes}C")


def by_xla(x, kernel, stride):
    spatial = x.shape[1:-1]
    return jax.lax.conv_general_dilated(
        x, kernel, (stride,) * len(spatial), [(k // 2, k // 2) for k in kernel.shape[:-2]],
        dimension_numbers=numbers(spatial), feature_group_count=x.shape[-1], precision=HIGHEST,
    )  # fmt: skip


def transposed_by_xla(x, kernel):
    """The transposed convolution as a convolution over the zero-dilated input with the mirrored kernel."""
    spatial = x.shape[1:-1]
    mirrored = jnp.flip(kernel, tuple(range(len(spatial))))
    return jax.lax.conv_general_dilated(
        x, mirrored, (1,) * len(spatial), [(k // 2, k // 2) for k in kernel.shape[:-2]],
        lhs_dilation=(2,) * len(spatial), dimension_numbers=numbers(spatial),
        feature_group_count=x.shape[-1], precision=HIGHEST,
    )  # fmt: skip


def assert_same_value_and_gradients(ours, theirs, x, kernel):
    @jax.jit
    def both(x, kernel, g):
        y, pull = jax.vjp(ours, x, kernel)
        z, pull_theirs = jax.vjp(theirs, x, kernel)
        return (y, *pull(g)), (z, *pull_theirs(g))

    shape = jax.eval_shape(theirs, x, kernel).shape
    g = np.random.default_rng(9).standard_normal(shape).astype(np.float32)
    for mine, other in zip(*both(x, kernel, g), strict=True):
        assert mine.shape == other.shape
        np.testing.assert_allclose(mine, other, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("spatial", "kernel"), CASES)
def test_depthwise_conv_and_its_gradients_equal_xlas_grouped_convolution(spatial, kernel, stride):
    x, w = arrays(spatial, kernel)
    assert_same_value_and_gradients(
        lambda x, w: depthwise_conv(x, w, stride), lambda x, w: by_xla(x, w, stride), x, w
    )


@pytest.mark.parametrize(("spatial", "kernel"), CASES)
def test_depthwise_conv_transpose_and_its_gradients_equal_a_dilated_convolution(spatial, kernel):
    assert_same_value_and_gradients(depthwise_conv_transpose, transposed_by_xla, *arrays(spatial, kernel))


def test_transposed_convolution_is_the_adjoint_of_the_strided_one():
    x, w = arrays((4, 3, 5), (3, 3, 3))
    y = np.random.default_rng(4).standard_normal((2, 7, 5, 9, 3)).astype(np.float32)
    left = jnp.vdot(depthwise_conv_transpose(x, w), y)
    right = jnp.vdot(x, depthwise_conv(y, w, 2))
    np.testing.assert_allclose(left, right, rtol=1e-5)


def test_kernel_gradient_agrees_with_finite_differences():
    x, w = arrays((5, 4, 3), (3, 3, 3), channels=2, batch=1)

    @jax.jit
    def loss(w):
        return jnp.sum(jnp.sin(depthwise_conv(x, w, 2))) + jnp.sum(jnp.cos(depthwise_conv_transpose(x, w)))

    gradient = jax.jit(jax.grad(loss))(w)
    rng = np.random.default_rng(1)
    for _ in range(4):
        way = rng.standard_normal(w.shape).astype(np.float32)
        step = 1e-2
        slope = (loss(w + step * way) - loss(w - step * way)) / (2 * step)
        np.testing.assert_allclose(jnp.vdot(gradient, way), slope, rtol=2e-2, atol=2e-2)


def test_both_ways_to_sum_the_kernel_gradient_agree():
    x, w = arrays((5, 19, 6), (3, 5, 3))
    out = (3, 10, 3)
    g = np.random.default_rng(2).standard_normal((2, *out, 3)).astype(np.float32)
    rows = windows.missing_rows(out[1])
    padded = [windows.padded(a, windows.margins(w.shape[:3], more)) for a, more in ((x, 2 * rows), (g, rows))]
    ways = (tap_sums._tap_sums_by_rows, tap_sums._tap_sums_by_planes)
    by_rows, by_planes = (jax.jit(lambda x, g, way=way: way(x, g, w.shape[:3], out, 2))(*padded) for way in ways)
    np.testing.assert_allclose(by_rows, by_planes.reshape(by_rows.shape), rtol=1e-5, atol=1e-5)


def test_frozen_kernel_keeps_no_input_and_a_frozen_input_gets_no_gradient():
    x, w = arrays((4, 5, 6), (3, 3, 3))
    for argument, kept in ((0, 0), (1, 1)):
        _, pull = jax.eval_shape(lambda *a, i=argument: jax.vjp(lambda v: depthwise_conv(
            *(v if j == i else other for j, other in enumerate(a))), a[i]), x, w)  # fmt: skip
        sizes = [leaf.shape for leaf in jax.tree.leaves(pull)]
        assert sum(len(size) == 5 and size[0] == 2 for size in sizes) == kept


@pytest.mark.usefixtures("either_formulation")
def test_depthwise_works_under_vmap_remat_and_a_second_derivative():
    x, w = arrays((4, 5, 3), (3, 3, 3), channels=2)

    @jax.jit
    def through(x, w):
        mapped = jax.vmap(lambda one: depthwise_conv(one[None], w)[0])(x)
        return jnp.sum(jax.checkpoint(depthwise_conv)(jnp.tanh(mapped), w) ** 2)

    direct = jax.jit(lambda x, w: jnp.sum(depthwise_conv(jnp.tanh(depthwise_conv(x, w)), w) ** 2))
    for argument in (0, 1):
        np.testing.assert_allclose(
            jax.grad(through, argument)(x, w), jax.grad(direct, argument)(x, w), rtol=1e-4, atol=1e-4
        )


def test_bfloat16_keeps_its_dtype_and_accumulates_in_float32():
    x, w = arrays((6, 5, 4), (3, 3, 3))
    low = jnp.asarray(x, jnp.bfloat16), jnp.asarray(w, jnp.bfloat16)
    y, pull = jax.vjp(depthwise_conv, *low)
    exact = by_xla(*(a.astype(jnp.float32) for a in low), 1)
    assert y.dtype == jnp.bfloat16 and [g.dtype for g in pull(y)] == [jnp.bfloat16] * 2
    assert np.max(np.abs(y.astype(np.float32) - exact) / (1 + np.abs(exact))) < 2**-8


@pytest.mark.usefixtures("either_formulation")
def test_depthwise_sharded_over_the_batch_gives_the_same_and_moves_nothing_but_the_kernel_gradient():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    x, w = arrays((4, 6, 5), (3, 3, 3), batch=4)
    split = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    whole = jax.device_put(w, NamedSharding(mesh, PartitionSpec()))
    gradient = jax.jit(jax.grad(lambda x, w: jnp.sum(depthwise_conv(x, w) ** 2), argnums=(0, 1)))
    compiled = gradient.lower(split, whole).compile()
    text = compiled.as_text()
    assert "all-gather" not in text and "all-to-all" not in text
    for mine, other in zip(compiled(split, whole), gradient(x, w), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("x", "kernel", "stride", "words"),
    [
        ((1, 4, 4, 4, 3), (2, 3, 3, 1, 3), 1, "odd"),
        ((1, 4, 4, 4, 3), (3, 3, 3, 1, 2), 1, "does not fit"),
        ((1, 4, 4, 4, 3), (3, 3, 3, 1, 3), 3, "stride"),
        ((4, 3), (3, 1, 3), 1, "must be"),
    ],
)
def test_depthwise_refuses_what_it_cannot_do(x, kernel, stride, words):
    with pytest.raises(ValueError, match=words):
        depthwise_conv(jnp.zeros(x), jnp.zeros(kernel), stride)

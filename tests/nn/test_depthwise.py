"""The depthwise operations against XLA's grouped convolution, finite differences, and under every transformation."""

import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mednext_jax.nn import tap_sums, windows
from mednext_jax.nn.depthwise import depthwise_conv, depthwise_conv_transpose

sys.path.insert(0, str(Path(__file__).parents[2] / "launch"))
from benchmarks.traffic import moved_bytes  # noqa: E402

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


@pytest.mark.parametrize("argument", [0, 1])
def test_gradients_agree_with_finite_differences(argument):
    arguments = arrays((5, 4, 3), (3, 1, 5), channels=2, batch=1)

    @jax.jit
    def loss(x, w):
        there = jnp.sum(jnp.sin(depthwise_conv(x, w))) + jnp.sum(jnp.sin(depthwise_conv(x, w, 2)))
        return there + jnp.sum(jnp.cos(depthwise_conv_transpose(x, w)))

    def along(way):
        return loss(*(a + way if i == argument else a for i, a in enumerate(arguments)))

    gradient = jax.jit(jax.grad(loss, argument))(*arguments)
    rng = np.random.default_rng(1)
    for _ in range(4):
        way = 1e-2 * rng.standard_normal(arguments[argument].shape).astype(np.float32)
        np.testing.assert_allclose(jnp.vdot(gradient, way), (along(way) - along(-way)) / 2, rtol=2e-2, atol=2e-4)


def test_both_ways_to_sum_the_kernel_gradient_agree():
    x, w = arrays((5, 19, 6), (3, 5, 3))
    out = (3, 10, 3)
    g = np.random.default_rng(2).standard_normal((2, *out, 3)).astype(np.float32)
    rows = windows.missing_rows(out[1])
    padded = [windows.padded(a, windows.margins(w.shape[:3], more)) for a, more in ((x, 2 * rows), (g, rows))]
    ways = (tap_sums._tap_sums_by_rows, tap_sums._tap_sums_by_planes)
    by_rows, by_planes = (jax.jit(lambda x, g, way=way: way(x, g, w.shape[:3], out, 2))(*padded) for way in ways)
    np.testing.assert_allclose(by_rows, by_planes.reshape(by_rows.shape), rtol=1e-5, atol=1e-5)


def test_frozen_kernel_keeps_no_input():
    x, w = arrays((4, 5, 6), (3, 3, 3))
    for argument, kept in ((0, 0), (1, 1)):
        _, pull = jax.eval_shape(lambda *a, i=argument: jax.vjp(lambda v: depthwise_conv(
            *(v if j == i else other for j, other in enumerate(a))), a[i]), x, w)  # fmt: skip
        sizes = [leaf.shape for leaf in jax.tree.leaves(pull)]
        assert sum(len(size) == 5 and size[0] == 2 for size in sizes) == kept


MODES = (depthwise_conv, functools.partial(depthwise_conv, stride=2), depthwise_conv_transpose)
XLAS = (functools.partial(by_xla, stride=1), functools.partial(by_xla, stride=2), transposed_by_xla)


@pytest.mark.parametrize("mode", MODES)
def test_each_gradient_is_written_alone_and_what_is_frozen_gets_none(mode):
    x, w = arrays((4, 5, 6), (3, 3, 3))

    def products(*wanted):
        """Multiplications of the trace, in which nothing is dead code yet."""

        def pulled(*arguments):
            def of_wanted(*some):
                return mode(*(some[wanted.index(i)] if i in wanted else a for i, a in enumerate(arguments)))

            y, pull = jax.vjp(of_wanted, *(arguments[i] for i in wanted))
            return pull(jnp.ones_like(y)) if wanted else y

        return str(jax.make_jaxpr(pulled)(x, w)).count(" = mul ")

    forward, of_input, of_kernel, both = products(), products(0), products(1), products(0, 1)
    assert forward < min(of_input, of_kernel) and both == of_input + of_kernel - forward


@pytest.mark.parametrize("mode", MODES)
def test_equal_operations_are_written_once_in_a_program_and_so_are_their_gradients(mode):
    x, w = arrays((4, 5, 6), (3, 3, 3))

    def products(count):
        both = jax.value_and_grad(lambda x, kernels: sum(jnp.sum(mode(x, kernel)) for kernel in kernels), (0, 1))
        return jax.jit(both).lower(x, [w] * count).as_text().count("stablehlo.multiply")

    assert products(5) == products(2) > 0


@pytest.mark.parametrize("mode", MODES)
def test_an_empty_batch_has_gradients_of_zero(mode):
    x, kernel = jnp.zeros((0, 5, 4, 3, 2)), jnp.ones((3, 3, 3, 1, 2))
    dx, d_kernel = jax.grad(lambda x, w: mode(x, w).sum(), (0, 1))(x, kernel)
    assert dx.shape == x.shape and not d_kernel.any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.usefixtures("either_formulation")
def test_depthwise_works_under_vmap_and_remat(mode):
    x, w = arrays((4, 5, 3), (3, 3, 3), channels=2)
    kernels = jnp.stack([w, 2 * w])  # one for each sample

    @jax.jit
    def through(x, kernels):
        mapped = jax.vmap(lambda one, w: mode(one[None], w)[0])(x, kernels)
        return jnp.sum(jax.checkpoint(mode)(jnp.tanh(mapped), kernels[1]) ** 2)

    @jax.jit
    def direct(x, kernels):
        one_by_one = jnp.concatenate([mode(x[i : i + 1], kernels[i]) for i in range(2)])
        return jnp.sum(mode(jnp.tanh(one_by_one), kernels[1]) ** 2)

    both = (jax.jit(jax.grad(f, (0, 1)))(x, kernels) for f in (through, direct))
    for mine, other in zip(*both, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("either_formulation")
def test_second_derivative_is_that_of_xlas_grouped_convolution():
    x, w = arrays((4, 5, 3), (3, 3, 3), channels=2)
    ways = arrays((4, 5, 3), (3, 3, 3), channels=2, seed=5)

    def curvature(conv):
        gradient = jax.grad(lambda x, w: jnp.sum(jnp.sin(conv(x, w, 1))), argnums=(0, 1))
        return jax.jit(jax.grad(lambda *a: sum(map(jnp.vdot, gradient(*a), ways)), argnums=(0, 1)))(x, w)

    for mine, other in zip(curvature(depthwise_conv), curvature(by_xla), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_value_and_input_gradient_pass_over_memory_once_and_over_a_padded_copy(mode):
    """The least is to read the one array and to write the other; a pass per tap would be 27 times that."""
    x, w = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 24, 22, 21, 32), (3, 3, 3, 1, 32)))
    y = jax.eval_shape(mode, x, w)
    for work, operand in ((mode, x), (lambda g, w: jax.vjp(lambda x: mode(x, w), jnp.zeros(x.shape))[1](g)[0], y)):
        moved = moved_bytes(jax.jit(work).lower(operand, w).compile().as_text())
        assert moved < 3.5 * 4 * (x.size + y.size)


@pytest.mark.parametrize(("mode", "most"), [*zip(MODES, (57, 25, 19), strict=True)])
def test_kernel_gradient_passes_over_memory_less_often_than_by_planes(mode, most):
    """Most of it within a cache: eight rows at a time, for all taps. By planes they are 64, 55 and 41 passes."""
    x, w = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 24, 22, 21, 32), (3, 3, 3, 1, 32)))
    y = jax.eval_shape(mode, x, w)
    gradient = jax.jit(lambda x, w, g: jax.vjp(lambda w: mode(x, w), w)[1](g))
    assert moved_bytes(gradient.lower(x, w, y).compile().as_text()) < most * 4 * (x.size + y.size)


@pytest.mark.parametrize("kernel_dtype", ["bfloat16", "float32"])  # the network's kernels are float32
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.usefixtures("either_formulation")
def test_bfloat16_keeps_its_dtype_and_accumulates_in_float32(mode, kernel_dtype):
    x, w = arrays((16, 13, 12), (3, 3, 3))
    low = jnp.asarray(x, jnp.bfloat16), jnp.asarray(w, jnp.bfloat16).astype(kernel_dtype)

    def value_and_gradients(x, w):
        y, pull = jax.vjp(mode, x, w)
        return y, *pull(jnp.ones_like(y))

    mine = jax.jit(value_and_gradients)(*low)
    exact = jax.jit(value_and_gradients)(*(a.astype(jnp.float32) for a in low))
    assert [a.dtype for a in mine] == ["bfloat16", "bfloat16", kernel_dtype]
    for rounded, sums in zip(mine, exact, strict=True):
        assert np.max(np.abs(rounded.astype(np.float32) - sums) / (1 + np.abs(sums))) < 2**-8


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 2**-11), ("float64", 1e-13)])
def test_other_types_are_kept_and_summed_in_float32_at_least(dtype, tolerance):
    x, w = arrays((9, 13, 12), (3, 5, 3))
    with jax.enable_x64(True):
        x, w = (jnp.asarray(a, dtype) for a in (x, w))
        rng = np.random.default_rng(6)

        def value_and_gradients(operation, x, w, g):
            y, pull = jax.vjp(operation, x, w)
            return y, *pull(g)

        for mode, theirs in zip(MODES, XLAS, strict=True):
            g = jnp.asarray(rng.standard_normal(jax.eval_shape(mode, x, w).shape), dtype)
            mine = jax.jit(value_and_gradients, static_argnums=0)(mode, x, w, g)
            wide = (a.astype(jnp.float64) for a in (x, w, g))
            exact = jax.jit(value_and_gradients, static_argnums=0)(theirs, *wide)
            for found, wanted in zip(mine, exact, strict=True):
                assert (found.dtype, wanted.dtype) == (dtype, "float64")
                assert np.max(np.abs(found.astype(jnp.float64) - wanted) / (1 + np.abs(wanted))) < tolerance


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.usefixtures("either_formulation")
def test_depthwise_sharded_over_the_batch_gives_the_same_and_moves_nothing_but_the_kernel_gradient(mode):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    x, w = arrays((4, 6, 5), (3, 3, 3), batch=4)
    split = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    whole = jax.device_put(w, NamedSharding(mesh, PartitionSpec()))
    gradient = jax.jit(jax.grad(lambda x, w: jnp.sum(mode(x, w) ** 2), argnums=(0, 1)))
    compiled = gradient.lower(split, whole).compile()
    text = compiled.as_text()
    assert text.count(" all-reduce(") == 1
    assert not any(word in text for word in ("all-gather", "all-to-all", "collective-permute", "reduce-scatter"))
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

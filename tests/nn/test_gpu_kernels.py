"""The kernels for GPUs: what XLA computes in float32, within bfloat16's rounding.

Interpreted on a CPU. On a machine with a card they run themselves:

    JAX_PLATFORMS=cuda python -m pytest -W ignore tests/nn/test_gpu_kernels.py
"""

from contextlib import nullcontext
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mednext_jax.nn import depthwise
from mednext_jax.nn.gpu import depthwise as gpu_depthwise
from mednext_jax.nn.gpu import mlp, mlp_kernels, statistics, tap_sums, triton
from mednext_jax.peft.flops import flops

ROUNDING = 2**-8  # of one bfloat16 number, relative


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setattr(triton, "interpreted", jax.default_backend() != "gpu")


def noise(*shape, dtype=jnp.bfloat16, seed=0):
    return jnp.asarray(np.random.default_rng(seed + sum(shape)).standard_normal(shape), dtype)


def assert_close(found, wanted, tolerance):
    found, wanted = (np.asarray(a, np.float64) for a in (found, wanted))
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max()


SHAPES = [  # of x, kernel
    ((2, 18, 5, 24, 32), (3, 3, 3)),  # more planes than one program walks through
    ((1, 3, 4, 20, 64), (5, 5, 5)),
    ((1, 5, 6, 7, 48), (3, 5, 3)),  # channels that are no power of two, an unequal kernel
    ((2, 6, 48, 16), (3, 3)),
    ((1, 1, 2, 16, 32), (3, 3, 3)),
    ((1, 4, 3, 80, 16), (7, 3, 3)),  # several blocks in a row
]


@pytest.fixture
def few_programs(monkeypatch):
    """Each goes around its loop several times."""
    kept = (tap_sums._by_rows, tap_sums._walking, statistics._statistics, mlp_kernels.backward)
    for module in (tap_sums, statistics, mlp_kernels):
        monkeypatch.setattr(module, "PROGRAMS", 3)
    monkeypatch.setattr(tap_sums, "WALKS", 3)
    monkeypatch.setattr(tap_sums, "PLANES", 5)
    for each in kept:
        each.cache_clear()
    yield
    for each in kept:
        each.cache_clear()


def by_xla(mode, x, taps, out):
    """XLA's grouped convolution: x (B, D, H, W, C), taps (kz, ky, kx, C)."""
    up = mode == "up"
    twice = [2 if up and (n > 1 or m > 1) else 1 for n, m in zip(x.shape[1:-1], out, strict=True)]
    behind = [m - (s * (n - 1) + 1) if up else 0 for m, s, n in zip(out, twice, x.shape[1:-1], strict=True)]
    return jax.lax.conv_general_dilated(
        x.astype(jnp.float32), (jnp.flip(taps, (0, 1, 2)) if up else taps)[..., None, :],
        [2 if mode == "down" else 1] * 3,
        [(k // 2, k // 2 + more) for k, more in zip(taps.shape[:-1], behind, strict=True)], lhs_dilation=twice,
        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"), feature_group_count=x.shape[-1],
        precision=jax.lax.Precision.HIGHEST,
    )  # fmt: skip


def sizes_after(mode, sizes):
    return tuple({"same": n, "down": (n - 1) // 2 + 1, "up": 2 * n - 1, "up to even": 2 * n}[mode] for n in sizes)


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize(("shape", "kernel"), SHAPES)
@pytest.mark.parametrize("mode", ["same", "down", "up", "up to even"])
def test_depthwise_kernels_compute_the_operations_and_their_kernel_gradients(mode, shape, kernel):
    sizes, channels = shape[1:-1], shape[-1]
    out = sizes_after(mode, sizes)
    x, taps, bias = noise(*shape), noise(*kernel, channels, dtype=jnp.float32), noise(channels, dtype=jnp.float32)
    onto = noise(*shape, seed=1) if mode == "same" else None
    operation = mode.split()[0]
    fill = (1,) * (3 - len(sizes))

    def forward(taps):
        y = by_xla(operation, x.reshape(shape[0], *fill, *shape[1:]), taps.reshape(*fill, *taps.shape), fill + out)
        return y.reshape(shape[0], *out, channels)

    wanted, back = jax.vjp(forward, taps)
    found = jax.jit(gpu_depthwise.convolve, static_argnums=(0, 4, 5))(operation, x, taps, bias, out, None, onto)
    assert found.dtype == jnp.bfloat16
    assert_close(found, wanted + bias + (0 if onto is None else onto.astype(jnp.float32)), ROUNDING)
    g = noise(shape[0], *out, channels, seed=2)
    pair = (g, x) if operation == "up" else (x, g)
    sums = jax.jit(tap_sums.tap_sums, static_argnums=(3, 4))(*pair, taps, 1 if mode == "same" else 2, None)
    assert_close(sums, back(g.astype(jnp.float32))[0], 1e-5)


@pytest.mark.usefixtures("few_programs")
def test_statistics_keep_the_digits_of_a_large_mean():
    x = (noise(2, 9, 10, 11, 48, dtype=jnp.float32) + jnp.arange(48) * 4).astype(jnp.bfloat16)
    mean, squares = jax.jit(statistics.mean_and_squares)(x)
    wide = np.asarray(x, np.float64).reshape(2, -1, 48)
    np.testing.assert_allclose(mean, wide.mean(1), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(squares, np.square(wide - wide.mean(1, keepdims=True)).sum(1), rtol=1e-4)


def second_half(y, norm, matrices):
    """Written out in float32, nothing shared with the package."""
    n = y.astype(jnp.float32)
    if norm is not None:
        n = (n - norm.mean[:, None]) * norm.rstd[:, None] * norm.scale + norm.shift
    return jax.nn.gelu(n @ matrices.expand + matrices.expand_bias, approximate=False) @ matrices.compress


MLPS = [  # voxels, channels, expanded, out, with a norm
    (210, 32, 64, 32, True),  # one kernel for all gradients
    (333, 64, 192, 32, True),  # three parts of the expanded channels
    (150, 32, 16, 32, False),  # as a Conv-Adapter has it
    (70, 128, 96, 64, True),
]


def operands(voxels, channels, expanded, out, normed):
    wide = dict(dtype=jnp.float32)
    norm = mlp.Norm(noise(2, channels, **wide), jnp.abs(noise(2, channels, seed=1, **wide)) + 0.5,
                    noise(channels, **wide), noise(channels, seed=1, **wide)) if normed else None  # fmt: skip
    matrices = mlp.Matrices(noise(channels, expanded, **wide) / channels**0.5, noise(expanded, **wide),
                            noise(expanded, out, **wide) / expanded**0.5, noise(out, **wide))  # fmt: skip
    return noise(2, voxels, channels), noise(2, voxels, out, seed=3), norm, matrices


def with_large_means():
    """Twenty standard deviations from zero, and the norm that goes with them."""
    y, g, norm, matrices = operands(210, 32, 64, 32, True)
    y = (y + 20).astype(jnp.bfloat16)
    wide = y.astype(jnp.float32)
    return y, g, norm._replace(mean=wide.mean(1), rstd=1 / wide.std(1)), matrices


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("case", [*MLPS, "large means"])
def test_second_half_and_its_gradients_are_those_of_float32(case):
    y, g, norm, matrices = with_large_means() if case == "large means" else operands(*case)
    wanted = second_half(y, norm, matrices) + matrices.compress_bias + g.astype(jnp.float32)
    assert_close(jax.jit(mlp.forward)(y, g, norm, matrices), wanted, 2 * ROUNDING)
    x_hat = y.astype(jnp.float32)
    if norm is not None:
        x_hat = (x_hat - norm.mean[:, None]) * norm.rstd[:, None]
    n = x_hat if norm is None else x_hat * norm.scale + norm.shift

    def of_normed(n, matrices):
        return second_half(n, None, matrices) + matrices.compress_bias

    d_n, d_matrices = jax.vjp(of_normed, n, matrices)[1](g.astype(jnp.float32))
    for wants in ((True, True), (True, False), (False, True)):
        found = jax.jit(mlp.gradients, static_argnums=(4, 5))(y, g, norm, matrices, *wants)
        if wants[0]:
            assert_close(found.d_n, d_n, 3 * ROUNDING)
            if norm is not None:
                assert_close(found.total, d_n.sum(1), 3 * ROUNDING)
                assert_close(found.moment, (d_n * x_hat).sum(1), 3 * ROUNDING)
        for part, other in zip(found.matrices or (), d_matrices if wants[1] else (), strict=True):
            assert_close(part, other, 3 * ROUNDING)


@pytest.mark.parametrize("case", MLPS)
def test_arithmetic_of_the_second_halfs_kernels_is_counted_as_that_of_its_twin(case):
    y, g, norm, matrices = operands(*case)
    forward = flops(lambda y: mlp.forward(y, None, norm, matrices), y)
    assert forward == pytest.approx(flops(lambda y: second_half(y, norm, matrices), y), rel=0.02)

    def pulled(y, g, wants):
        n = y.astype(jnp.float32) if norm is None else (y - norm.mean[:, None]) * norm.rstd[:, None]
        found = jax.vjp(lambda n, matrices: second_half(n, None, matrices), n, matrices)[1](g.astype(jnp.float32))
        return [part for part, wanted in zip(found, wants, strict=True) if wanted]

    # Where parts of the expanded channels take turns, two kernels share the work, and both expand.
    again = 0.36 if mlp_kernels.chunk_of(case[2]) < case[2] else 0.03
    for wants, most in (((True, True), 1 + again), ((True, False), 1), ((False, True), 1.03)):
        counted = flops(lambda y, g, wants=wants: jax.tree.leaves(mlp.gradients(y, g, norm, matrices, *wants)), y, g)
        assert 0.87 < counted / flops(lambda y, g, wants=wants: pulled(y, g, wants), y, g) < most


def uses_kernels(function, *arguments):
    return "pallas_call" in str(jax.make_jaxpr(function)(*arguments))


def test_kernels_run_on_a_gpu_in_bfloat16_and_nowhere_else(as_on_a_gpu, monkeypatch):
    x, kernel = noise(1, 4, 6, 16, 32), noise(3, 3, 3, 1, 32, dtype=jnp.float32)
    jax.clear_caches()
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert not uses_kernels(depthwise.depthwise_conv, x, kernel)
    as_on_a_gpu()
    assert uses_kernels(depthwise.depthwise_conv, x, kernel)
    jax.clear_caches()
    assert not uses_kernels(depthwise.depthwise_conv, x.astype(jnp.float32), kernel)
    assert not uses_kernels(depthwise.depthwise_conv, x[..., :20], kernel[..., :20])
    jax.clear_caches()
    with monkeypatch.context() as older:
        older.setattr(jax, "devices", lambda: [SimpleNamespace(compute_capability="7.5")])
        assert not uses_kernels(depthwise.depthwise_conv, x, kernel)
    jax.clear_caches()
    monkeypatch.setenv(triton.SWITCH, "off")
    assert not uses_kernels(depthwise.depthwise_conv, x, kernel)


def test_what_kernels_cannot_do_is_done_by_xla(as_on_a_gpu):
    as_on_a_gpu()
    xs, kernel = noise(3, 1, 4, 6, 16, 32), noise(3, 3, 3, 1, 32, dtype=jnp.float32)
    each = jnp.stack([depthwise.depthwise_conv(x, kernel) for x in xs])
    assert_close(jax.vmap(depthwise.depthwise_conv, (0, None))(xs, kernel), each, ROUNDING)

    def size(kernel):
        return jnp.square(depthwise.depthwise_conv(xs[0], kernel).astype(jnp.float32)).sum()

    # Quadratic in the kernel: the second derivative along it is twice the value.
    second = jax.jvp(jax.grad(size), (kernel,), (kernel,))[1]
    assert float((second * kernel).sum()) == pytest.approx(2 * float(size(kernel)), rel=0.02)


several_devices = pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices, which a CPU always has")


@several_devices
@pytest.mark.parametrize("in_context", [True, False])
def test_a_batch_on_four_devices_stays_where_it_is(in_context):
    x, taps = noise(4, 5, 6, 16, 32), noise(3, 3, 3, 32, dtype=jnp.float32)
    matrices = operands(1, 32, 64, 32, False)[-1]
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))

    def work(x, taps):
        y = gpu_depthwise.convolve("same", x, taps, None, x.shape[1:-1], None)
        mean, squares = statistics.mean_and_squares(y)
        norm = mlp.Norm(mean, squares / squares, jnp.ones(32), jnp.zeros(32))
        out = mlp.forward(y, x, norm, matrices)
        found = mlp.gradients(y, x, norm, matrices, True, True)
        return out, mean, found.d_n, found.moment, (tap_sums.tap_sums(x, y, taps, 1, None), found.matrices)

    places = (split, split, split, split, whole)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh) if in_context else nullcontext():
        program = jax.jit(work, in_shardings=(split, whole), out_shardings=places).lower(x, taps).compile()
    text = program.as_text()
    assert "all-gather" not in text and 0 < text.count(" all-reduce(") <= 5  # taps and four of the matrices
    found = program(jax.device_put(x, split), jax.device_put(taps, whole))
    for part, alone in zip(jax.tree.leaves(found), jax.tree.leaves(jax.jit(work)(x, taps)), strict=True):
        assert_close(part, alone, 1e-5)


@several_devices
@pytest.mark.parametrize("mapped", [
    lambda f: jax.shard_map(f, mesh=jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,)),
                            in_specs=(PartitionSpec("data"), PartitionSpec()), out_specs=PartitionSpec("data"),
                            check_vma=False),
    lambda f: lambda x, taps: jax.pmap(f, in_axes=(0, None))(x[:, None], taps)[:, 0],
], ids=["shard_map", "pmap"])  # fmt: skip
def test_within_a_map_over_devices_each_runs_the_kernel_on_what_it_has(mapped):
    x, taps = noise(2, 3, 4, 16, 32), noise(3, 3, 3, 32, dtype=jnp.float32)

    def work(x, taps):
        return gpu_depthwise.convolve("same", x, taps, None, x.shape[1:-1], None)

    assert_close(mapped(work)(x, taps), work(x, taps), 0)


def kernel_calls():
    """name -> (function, operands) that runs each kernel."""
    x, onto, taps = noise(2, 4, 6, 32, 32), noise(2, 4, 6, 32, 32, seed=1), noise(3, 3, 3, 32, dtype=jnp.float32)
    half = noise(2, 2, 3, 16, 32)
    y, g, norm, matrices = operands(*MLPS[0])
    calls = {
        "same": (lambda x, taps: gpu_depthwise.convolve("same", x, taps, None, x.shape[1:-1], None, onto), (x, taps)),
        "down": (lambda x, taps: gpu_depthwise.convolve("down", x, taps, None, (2, 3, 16), None), (x, taps)),
        "up": (lambda x, taps: gpu_depthwise.convolve("up", x, taps, None, (4, 6, 32), None), (half, taps)),
        "kernel gradient": (lambda x, taps: tap_sums.tap_sums(x, onto, taps, 1, None), (x, taps)),
        "its stride 2": (lambda x, taps: tap_sums.tap_sums(x, half, taps, 2, None), (x, taps)),
        "statistics": (statistics.mean_and_squares, (x,)),
        "second half": (lambda y, g: mlp.forward(y, g, norm, matrices), (y, g)),
    }
    for wants in ((True, True), (True, False), (False, True)):
        calls[f"its gradients {wants}"] = (
            lambda y, g, wants=wants: jax.tree.leaves(mlp.gradients(y, g, norm, matrices, *wants)), (y, g)
        )  # fmt: skip
    return calls


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")  # JAX 0.12
@pytest.mark.parametrize("name", kernel_calls())
def test_every_kernel_is_lowered_for_a_card_as_it_stands(name, monkeypatch):
    monkeypatch.setattr(triton, "interpreted", False)
    function, arguments = kernel_calls()[name]
    card = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,), abstract_device=card)
    with jax.sharding.use_abstract_mesh(mesh):
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert "__gpu$xla.gpu.triton" in lowered or "triton_kernel_call" in lowered

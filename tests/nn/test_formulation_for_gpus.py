"""What is written differently for a GPU (whole arrays, kernel gradients by planes, sums behind a barrier; in bfloat16
kernels of our own), traced as for one and run on a CPU: the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mednext_jax import peft
from mednext_jax.nn.mednext import MedNeXt, parameter_shapes
from mednext_jax.nn.paths import flatten, unflatten
from tests.golden.reading import FAST_COMPILE


def loss_and_gradients(dim, dtype, method, n_channels, options):
    blocks = (1, 0, 0, 0, 0, 0, 0, 0, 0)
    network = MedNeXt(n_channels=n_channels, n_classes=3, block_counts=blocks, dim=dim, dtype=dtype, **options)
    random = np.random.default_rng(0)
    sizes = (32, 48) if dim == "2d" else (16, 32, 48)
    x = jnp.asarray(random.standard_normal((2, *sizes, 4)), jnp.float32)
    base = {path: 0.2 * random.standard_normal(leaf.shape, np.float32)
            for path, leaf in parameter_shapes(network).items()}  # fmt: skip
    network, params = method.apply_to(network, unflatten(base), jax.random.key(1))
    params = {path: leaf + 0.1 * random.standard_normal(leaf.shape, np.float32)
              for path, leaf in sorted(flatten(params).items())}  # fmt: skip
    trainable, frozen = peft.split(params, method.rule)

    def loss(trainable, frozen, x):
        return jnp.mean(jnp.square(network.apply({"params": unflatten({**frozen, **trainable})}, x)))

    program = jax.jit(jax.value_and_grad(loss)).lower(trainable, frozen, x).compile(compiler_options=FAST_COMPILE)
    value, gradients = program(trainable, frozen, x)
    gradients = jax.device_get(gradients)
    # The norm takes a bias in front of it away again.
    nothing = [gradients.pop(path) for path in [*gradients] if path.endswith("conv1/bias")]
    assert options.get("remat") == "none" or not any(leaf.any() for leaf in nothing)
    return float(value), gradients


def assert_close(gradients, others, tolerance):
    assert others.keys() == gradients.keys()
    for path, gradient in gradients.items():
        assert np.linalg.norm(others[path] - gradient) <= tolerance * np.linalg.norm(gradient), path


@pytest.mark.parametrize(("dim", "method", "dtype", "n_channels", "tolerance", "options"), [
    ("3d", "full", jnp.float32, 4, 2e-4, {}),
    ("2d", "conv_adapter", jnp.bfloat16, 16, 0.1, {}),  # from 16 channels on the kernels do it
    ("3d", "lora", jnp.bfloat16, 16, 0.05, {}),
    ("2d", "full", jnp.bfloat16, 16, 0.05, {"kernel_size": 5, "exp_r": 3, "remat": "block"}),
    ("2d", "full", jnp.bfloat16, 16, 0.05, {"remat": "none"}),  # its second half is XLA's
])  # fmt: skip
def test_loss_and_gradients_are_those_of_float32_on_a_cpu(
    dim, method, dtype, n_channels, tolerance, options, as_on_a_gpu
):
    value, gradients = loss_and_gradients(dim, jnp.float32, peft.create(method), n_channels, options)
    as_on_a_gpu()
    other_value, others = loss_and_gradients(dim, dtype, peft.create(method), n_channels, options)
    assert other_value == pytest.approx(value, rel=tolerance)
    assert_close(gradients, others, tolerance)


@pytest.mark.parametrize("method", ["full", "ssf", "conv_adapter"])
def test_gradients_in_bfloat16_are_summed_in_float32(method):
    # Summed in bfloat16, a bias that is added to many voxels has a gradient that is 0.2 off.
    exact, found = (
        loss_and_gradients("2d", dtype, peft.create(method), 16, {})[1] for dtype in (jnp.float32, jnp.bfloat16)
    )
    for path in [path for path in exact if "conv1/ssf" in path]:  # the norm takes these away again, but for rounding
        del exact[path], found[path]
    assert_close(exact, found, 0.1)

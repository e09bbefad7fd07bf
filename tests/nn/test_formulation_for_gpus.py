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


def loss_and_gradients(dim, dtype, method, n_channels):
    blocks = (1, 0, 0, 0, 0, 0, 0, 0, 0)
    network = MedNeXt(n_channels=n_channels, n_classes=3, block_counts=blocks, dim=dim, dtype=dtype)
    random = np.random.default_rng(0)
    sizes = (64, 96) if dim == "2d" else (16, 32, 48)
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
    assert not any(gradients.pop(path).any() for path in [*gradients] if path.endswith("conv1/bias"))
    return float(value), gradients


@pytest.mark.parametrize(("dim", "method", "dtype", "n_channels", "tolerance"), [
    ("3d", "full", jnp.float32, 4, 2e-4),
    ("2d", "conv_adapter", jnp.bfloat16, 16, 0.1),  # from 16 channels on the kernels do it
    ("3d", "lora", jnp.bfloat16, 16, 0.05),
])  # fmt: skip
def test_loss_and_gradients_are_those_of_float32_on_a_cpu(dim, method, dtype, n_channels, tolerance, as_on_a_gpu):
    value, gradients = loss_and_gradients(dim, jnp.float32, peft.create(method), n_channels)
    as_on_a_gpu()
    other_value, others = loss_and_gradients(dim, dtype, peft.create(method), n_channels)
    assert other_value == pytest.approx(value, rel=tolerance)
    assert others.keys() == gradients.keys()
    for path, gradient in gradients.items():
        assert np.linalg.norm(others[path] - gradient) <= tolerance * np.linalg.norm(gradient), path

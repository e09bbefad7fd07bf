"""The 1x1 convolution, as a product and as a sum over few inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mednext_jax.nn.layers import Weights, pointwise


@pytest.mark.parametrize("inputs", [1, 4])
@pytest.mark.parametrize("as_sum", [True, False])
def test_result_and_gradients_are_those_of_a_product_over_channels(inputs, as_sum):
    random = np.random.default_rng(inputs)
    x = random.standard_normal((2, 3, 5, 4, inputs)).astype(np.float32)
    kernel = random.standard_normal((1, 1, 1, inputs, 7)).astype(np.float32)
    bias = random.standard_normal(7).astype(np.float32)
    g = random.standard_normal((2, 3, 5, 4, 7)).astype(np.float32)

    y, backward = jax.vjp(lambda x, k, b: pointwise(x, Weights(kernel=k, bias=b), as_sum), x, kernel, bias)
    dx, d_kernel, d_bias = backward(g)

    matrix = kernel[0, 0, 0].astype(float)
    assert y == pytest.approx(np.einsum("bdhwi,io->bdhwo", x, matrix) + bias, abs=1e-5)
    assert dx == pytest.approx(np.einsum("bdhwo,io->bdhwi", g, matrix), abs=1e-5)
    assert d_kernel[0, 0, 0] == pytest.approx(np.einsum("bdhwi,bdhwo->io", x, g), abs=1e-4)
    assert d_bias == pytest.approx(g.sum((0, 1, 2, 3)), abs=1e-4)


def test_a_sum_of_few_inputs_is_rounded_once_in_bfloat16():
    x = jnp.array([[1.0, 2.0**-9, 2.0**-9, 2.0**-9]], jnp.bfloat16)  # added one by one, the small ones would be lost
    kernel = jnp.ones((1, 4, 1), jnp.float32)
    y = pointwise(x, Weights(kernel=kernel, bias=jnp.zeros(1)), few_inputs=True)
    assert y.dtype == jnp.bfloat16 and float(y[0, 0]) == 1 + 2.0**-7

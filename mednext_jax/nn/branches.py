"""Branches: the adapters that are added around a module, ``f + A(.)``.

Both start by adding exactly zero, because the layer they end in starts at zero.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from mednext_jax.nn.gpu.mlp import Matrices
from mednext_jax.nn.gpu.per_voxel import PerVoxel
from mednext_jax.nn.layers import Conv, Weights, gelu, pointwise, voxelwise_product, widened, with_bias
from mednext_jax.nn.voxelwise import Before, add_convolved_voxelwise


class ConvAdapter(nn.Module):
    """Conv-Adapter: ``scale * up(gelu(down(x)))``, a depthwise-separable bottleneck without norm or residual.

    ``down`` is a convolution of C to C / gamma channels in C / gamma groups, so that each output sees its own gamma
    inputs; that is a depthwise convolution followed by a sum over each group, and runs on the depthwise operation.
    ``up`` is a 1x1 convolution.

    Shapes: x (B, *spatial, C); returns (B, *out, features) with out = n, ceil(n / 2) or 2n - 1 by ``mode``; ``onto``,
    of that shape, is added if given.

    Parameters: ``down/kernel`` (*k, 1, C), ``down/bias`` (C / gamma,), ``up/kernel`` (1, .., C / gamma, features),
    ``up/bias`` (features,), ``scale`` (features,) when learnable.

    Source: Chen et al., "Conv-Adapter", arXiv 2208.07463, section 3; differs from the released code in the start:
    ``up`` is zero, so that the adapted network is the pre-trained one.

    Attributes:
      features: output channels.
      gamma: divides the channels; it must divide them evenly.
      sizes: kernel size per spatial axis.
      mode: "same", "down" or "up".
      learnable_scale: ends in a scale per channel that starts at one.
    """

    features: int
    gamma: int
    sizes: tuple[int, ...]
    mode: str = "same"
    learnable_scale: bool = True

    @nn.compact
    def __call__(self, x: Array, onto: Array | None = None) -> Array:
        channels = x.shape[-1]
        if channels % self.gamma:
            raise ValueError(f"conv_adapter: gamma {self.gamma} does not divide the {channels} channels of "
                             f"{'/'.join(self.path)}")
        hidden = channels // self.gamma
        down = _GroupedDown(hidden, self.sizes, name="down")(channels)
        # Each group's sum as a product with a matrix of zeros and ones.
        grouping = jnp.repeat(jnp.eye(hidden, dtype=x.dtype), self.gamma, axis=0)
        up = Conv(self.features, (1,) * len(self.sizes), zero=True, name="up")(hidden)
        scale = self.param("scale", nn.initializers.ones, (self.features,)) if self.learnable_scale else None
        width = max(channels, self.features)
        weights = grouping, down[1], up, scale
        return add_convolved_voxelwise(
            GROUPED_BOTTLENECK, width, Before(self.mode, recompute=True), x, onto, down[0], None, None, weights
        )


def _grouped_bottleneck(y: Array, weights: tuple[Array, Array, Weights, Array | None]) -> Array:
    grouping, bias, up, scale = weights
    out = pointwise(gelu(with_bias(voxelwise_product(y, grouping), bias)), up)
    return out if scale is None else (widened(out) * scale).astype(out.dtype)


def _matrices(weights: tuple[Array, Array, Weights, Array | None]) -> Matrices:
    """With zeros up to a multiple of 16 between the two products, which is what a GPU multiplies at least."""
    grouping, bias, up, scale = weights
    more = -grouping.shape[-1] % 16
    compress = jnp.pad(up.kernel.reshape(up.kernel.shape[-2:]), ((0, more), (0, 0)))
    scale = jnp.ones_like(up.bias) if scale is None else scale
    grouping = jnp.pad(grouping.astype(jnp.float32), ((0, 0), (0, more)))
    return Matrices(grouping, jnp.pad(bias, (0, more)), compress * scale, up.bias * scale)


GROUPED_BOTTLENECK = PerVoxel(_grouped_bottleneck, _matrices)


class _GroupedDown(nn.Module):
    """Parameters of the grouped convolution: kernel (*k, 1, C) and bias (hidden,)."""

    hidden: int
    sizes: tuple[int, ...]

    @nn.compact
    def __call__(self, channels: int) -> tuple[Array, Array]:
        weights_init = nn.initializers.truncated_normal(0.02)  # the published initialisation
        return (
            self.param("kernel", weights_init, (*self.sizes, 1, channels)),
            self.param("bias", nn.initializers.zeros, (self.hidden,)),
        )


class LinearAdapter(nn.Module):
    """Bottleneck over channels: ``fc2(relu(fc1(x)))``, voxel by voxel.

    Shapes: (B, *spatial, C) in and out. Parameters: ``fc1/kernel`` (C, H), ``fc2/kernel`` (H, C) and biases, with
    H = max(1, int(C * ratio)).

    Source: linear_adapter_block.py of the released code of arXiv 2412.14100. There, the channels-first array was
    flattened without moving the channels last, so that neighbouring voxels were mixed instead of channels, and a ReLU
    followed ``fc2``; ``legacy=True`` does that (three spatial axes only), the default does not and starts at zero.
    """

    ratio: float
    legacy: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        channels = x.shape[-1]
        if self.legacy and x.ndim != 5:
            raise ValueError("linear_adapter: legacy=True exists for three spatial axes only, as in the original")
        hidden = max(1, int(channels * self.ratio))
        fc1 = Conv(hidden, (), name="fc1")(channels)
        fc2 = Conv(channels, (), zero=not self.legacy, name="fc2")(hidden)
        if not self.legacy:
            return pointwise(jax.nn.relu(pointwise(x, fc1)), fc2)
        rows = jnp.moveaxis(x, -1, 1).reshape(-1, channels)
        rows = jax.nn.relu(pointwise(jax.nn.relu(pointwise(rows, fc1)), fc2))
        return jnp.moveaxis(rows.reshape(x.shape[0], channels, *x.shape[1:-1]), 1, -1)

"""Layers: their parameters (Linen modules) and their arithmetic (functions of arrays).

A layer module only declares its parameters and hands them out as a :class:`Weights`; what is computed with them is
plain functions, so that blocks can run expansion, GELU and compression slab by slab without lifted transforms.
LoRA and SSF live here, as further leaves of the layer they adapt.

What every block does is written in ``jax.lax``: JAX traces each function of ``jax.numpy`` anew for every shape, and a
network has a dozen shapes of blocks.
"""

import functools
import math

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from mednext_jax.nn import depthwise
from mednext_jax.nn.adapters import Adapter, at_site
from mednext_jax.nn.initial_weights import torch_uniform

EPSILON = 1e-5  # torch's GroupNorm and upstream's LayerNorm
FEW_INPUTS = 4  # modalities up to which the stem is bound by bytes, not by arithmetic


@flax.struct.dataclass
class LowRank:
    """LoRA factors: the layer's kernel changes by ``scale * a @ b`` (Hu et al., arXiv 2106.09685)."""

    a: Array  # (inputs, rank); for a depthwise kernel (taps, rank)
    b: Array  # (rank, outputs)
    scale: float = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class ScaleShift:
    """SSF (Lian et al., arXiv 2210.08823): ``y * scale + shift`` per channel."""

    scale: Array  # (C,)
    shift: Array  # (C,)


@flax.struct.dataclass
class Weights:
    """What one layer holds: kernel (*k, in, out) or None for a norm, bias (C,), and what adapters add."""

    kernel: Array | None
    bias: Array
    scale: Array | None = None  # of a norm
    low_rank: LowRank | None = None
    ssf: ScaleShift | None = None
    branch: Array | None = None  # kernel of a parallel linear depthwise branch


class Conv(nn.Module):
    """Parameters of a convolution: ``kernel`` (*k, in / groups, out) and ``bias`` (out,).

    Attributes:
      features: output channels.
      sizes: kernel size per spatial axis.
      groups: 1 is dense; as many as channels is depthwise.
      adapters: the network's adapters; "lora", "ssf" and "depthwise" ones aimed at this layer add leaves here.
      zero: starts at zero, so that a branch that ends in this layer starts by adding nothing.
    """

    features: int
    sizes: tuple[int, ...]
    groups: int = 1
    adapters: tuple[Adapter, ...] = ()
    zero: bool = False

    @nn.compact
    def __call__(self, inputs: int) -> Weights:
        return self.declare(inputs)

    def declare(self, inputs: int) -> Weights:
        """The layer's weights for ``inputs`` channels; to be called inside a compact method."""
        taps = math.prod(self.sizes)
        initializer = nn.initializers.zeros if self.zero else torch_uniform(taps * inputs // self.groups)
        kernel = self.param("kernel", initializer, (*self.sizes, inputs // self.groups, self.features))
        bias = self.param("bias", initializer, (self.features,))
        depthwise_layer = self.groups > 1
        low_rank = ssf = branch = None
        for adapter in at_site(self.adapters, self.path, "layer"):
            if adapter.kind == "lora":
                rows = taps if depthwise_layer else inputs
                low_rank = self._low_rank(adapter, rows)
            elif adapter.kind == "ssf":
                ssf = scale_shift(self, self.features)
            elif adapter.kind == "depthwise" and depthwise_layer:
                sizes = (adapter.kernel_size or self.sizes[0],) * len(self.sizes)
                branch = self.param("branch", nn.initializers.zeros, (*sizes, 1, self.features))
        return Weights(kernel=kernel, bias=bias, low_rank=low_rank, ssf=ssf, branch=branch)

    def _low_rank(self, adapter: Adapter, rows: int) -> LowRank:
        a = self.param("lora_a", torch_uniform(rows), (rows, adapter.rank))
        b = self.param("lora_b", nn.initializers.zeros, (adapter.rank, self.features))
        return LowRank(a=a, b=b, scale=adapter.alpha / adapter.rank)


class Norm(nn.Module):
    """Parameters of a norm: ``scale`` and ``bias``, (C,)."""

    adapters: tuple[Adapter, ...] = ()

    @nn.compact
    def __call__(self, channels: int) -> Weights:
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        if any(adapter.kind == "ssf" for adapter in at_site(self.adapters, self.path, "layer")):
            ssf = scale_shift(self, channels)  # a norm is affine already, so SSF costs nothing at run time
            scale, bias = scale * ssf.scale, bias * ssf.scale + ssf.shift
        return Weights(kernel=None, bias=bias, scale=scale)


def scale_shift(module: nn.Module, channels: int) -> ScaleShift:
    """Declares ``ssf_scale`` (ones) and ``ssf_shift`` (zeros) in ``module``."""
    return ScaleShift(
        scale=module.param("ssf_scale", nn.initializers.ones, (channels,)),
        shift=module.param("ssf_shift", nn.initializers.zeros, (channels,)),
    )


def pointwise(x: Array, weights: Weights, few_inputs: bool = False) -> Array:
    """A 1x1 convolution as a matrix product: (..., in) -> (..., out), in the dtype of ``x``.

    Args:
      few_inputs: as a sum over the inputs instead, which then are few.
    """
    matrix = jax.lax.reshape(weights.kernel, weights.kernel.shape[-2:])
    y = with_bias((sum_over_inputs if few_inputs else voxelwise_product)(x, matrix), weights.bias)
    if weights.low_rank is not None:
        low = weights.low_rank
        y = y + voxelwise_product(voxelwise_product(x, low.a), low.b) * low.scale
    return scaled_and_shifted(y, weights.ssf)


def effective_matrix(weights: Weights) -> tuple[Array, Array]:
    """Matrix (in, out) and bias (out,) of a 1x1 convolution with what LoRA and SSF make of them."""
    matrix, bias = jax.lax.reshape(weights.kernel, weights.kernel.shape[-2:]), weights.bias
    if weights.low_rank is not None:
        matrix = matrix + weights.low_rank.a @ weights.low_rank.b * weights.low_rank.scale
    if weights.ssf is not None:
        matrix, bias = matrix * weights.ssf.scale, bias * weights.ssf.scale + weights.ssf.shift
    return matrix, bias


def voxelwise_product(x: Array, matrix: Array) -> Array:
    """``x @ matrix`` over the channels: (*voxels, in) and (in, out) to (*voxels, out), in the dtype of ``x``.

    On rows, since the matrix's gradient is a sum over voxels: if those are several axes, XLA on CPU writes a
    transposed copy of an operand first, a fifth of the time of a training step.
    """
    product = jax.lax.dot(_rows(x), jax.lax.convert_element_type(matrix, x.dtype))
    return jax.lax.reshape(product, (*x.shape[:-1], matrix.shape[-1]))


def _rows(x: Array) -> Array:
    return jax.lax.reshape(x, (math.prod(x.shape[:-1]), x.shape[-1]))


@jax.custom_vjp
def sum_over_inputs(x: Array, matrix: Array) -> Array:
    """What :func:`voxelwise_product` gives, of few inputs: a product is written, read and written again with its bias,
    a sum is made again wherever it is used.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    columns = jnp.split(x.astype(wide), x.shape[-1], -1)
    rows = matrix.astype(x.dtype).astype(wide)
    products = (column * row for column, row in zip(columns, rows, strict=True))
    return functools.reduce(jax.lax.add, products).astype(x.dtype)


def _sum_over_inputs_backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    return jax.vjp(voxelwise_product, *saved)[1](g)


sum_over_inputs.defvjp(lambda *operands: (sum_over_inputs(*operands), operands), _sum_over_inputs_backward)


@jax.custom_vjp
def with_bias(y: Array, bias: Array) -> Array:
    """``y + bias`` over the channels, in the dtype of y; the bias's gradient is summed in float32 at least."""
    bias = jax.lax.convert_element_type(bias, y.dtype)
    return jax.lax.add(y, jax.lax.broadcast_in_dim(bias, y.shape, (y.ndim - 1,)))


def _with_bias_backward(bias: Array, g: Array) -> tuple[Array, Array]:
    """On CPU the bias's gradient is a matrix product, not a sum.

    XLA would fuse the sum with the convolution gradient that makes g, but only its additions, and keep an array per
    kernel tap (1.6 GB in a step that trains norms and biases at 64^3; without, 0.43).
    """
    rows = _rows(g)
    if jax.default_backend() == "cpu":
        ones = jax.lax.full((rows.shape[0],), 1, rows.dtype)
        total = jax.lax.dot(ones, rows, preferred_element_type=jnp.promote_types(g.dtype, jnp.float32))
    else:
        # Behind the barrier g is what its dtype says; XLA would keep a float32 copy of it for the sum.
        g = jax.lax.optimization_barrier(g)
        total = g.reshape(rows.shape).sum(0, dtype=jnp.promote_types(g.dtype, jnp.float32))
    return g, total.astype(bias.dtype)


with_bias.defvjp(lambda y, bias: (with_bias(y, bias), bias), _with_bias_backward)


def gelu(x: Array) -> Array:
    """The exact GELU, ``x * Phi(x)`` (torch's default), in at least float32 and the dtype of ``x``.

    By erf; ``jax.nn.gelu`` goes by erfc, which keeps digits of values below 1e-7 and costs half as much again on CPU.
    """
    wide = widened(x)
    gate = jax.lax.add(1.0, jax.lax.erf(jax.lax.mul(wide, math.sqrt(0.5))))
    return jax.lax.convert_element_type(jax.lax.mul(jax.lax.mul(0.5, wide), gate), x.dtype)


def scaled_and_shifted(y: Array, ssf: ScaleShift | None) -> Array:
    """SSF where there is one."""
    return y if ssf is None else (widened(y) * ssf.scale + ssf.shift).astype(y.dtype)


def widened(x: Array) -> Array:
    """In float32 at least: what is then multiplied by a parameter, or takes its place, gives that parameter's gradient
    as a sum in float32. JAX sums in the type of the gradient, and XLA adds up bfloat16 in bfloat16.
    """
    return jax.lax.convert_element_type(x, jnp.promote_types(x.dtype, jnp.float32))


def spatial_conv(x: Array, weights: Weights, groups: int, stride: int, transposed: bool = False) -> Array:
    """The block's first convolution with its bias: depthwise by our own operation, otherwise grouped by XLA.

    Shapes: x (B, *spatial, C); returns (B, *out, C) with out = n, ceil(n / 2) or 2n - 1.
    """
    if groups == x.shape[-1]:
        kernel, bias = effective_depthwise_kernel(weights), weights.bias
        if transposed:
            y = depthwise.depthwise_conv_transpose(x, kernel, bias)
        else:
            y = depthwise.depthwise_conv(x, kernel, stride, bias)
    else:
        axes = "DHW"[-(x.ndim - 2):]
        y = with_bias(jax.lax.conv_general_dilated(
            x, weights.kernel.astype(x.dtype), (stride,) * (x.ndim - 2),
            [(k // 2, k // 2) for k in weights.kernel.shape[:-2]],
            dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"), feature_group_count=groups,
        ), weights.bias)  # fmt: skip
    return scaled_and_shifted(y, weights.ssf)


def effective_depthwise_kernel(weights: Weights) -> Array:
    """The depthwise kernel with what linear adapters add to it, (*k, 1, C); the larger of the two sizes."""
    kernel = weights.kernel
    if weights.low_rank is not None:
        low = weights.low_rank
        kernel = kernel + (low.a @ low.b * low.scale).reshape(kernel.shape)
    if weights.branch is not None:
        size = max(kernel.shape[0], weights.branch.shape[0])
        kernel = _centred(kernel, size) + _centred(weights.branch, size)
    return kernel


def _centred(kernel: Array, size: int) -> Array:
    """The kernel with zeros around it up to ``size``: the same convolution."""
    return jnp.pad(kernel, [((size - k) // 2,) * 2 for k in kernel.shape[:-2]] + [(0, 0), (0, 0)])


def layer_norm(y: Array, norm: Weights) -> Array:
    """Normalises every voxel over its channels."""
    x = y.astype(jnp.float32)
    x = x - jnp.mean(x, -1, keepdims=True)
    x = x / jnp.sqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + EPSILON)
    return (x * norm.scale + norm.bias).astype(y.dtype)


def channel_norm(y: Array, mean: Array, rstd: Array, norm: Weights) -> Array:
    """GroupNorm with one channel per group, given its statistics."""
    return ((y.astype(jnp.float32) - mean) * (rstd * norm.scale) + norm.bias).astype(y.dtype)


def response_norm(h: Array, gamma: Array, beta: Array) -> Array:
    """Global response normalisation as upstream has it: divided by the channel MEAN of the spatial norms."""
    axes = tuple(range(1, h.ndim - 1))
    x = h.astype(jnp.float32)
    # The norm's gradient is 0 / 0 where a channel is zero everywhere; torch defines it as 0 there, so do we.
    squares = jnp.sum(jnp.square(x), axes, keepdims=True)
    norms = jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)
    ratio = norms / (jnp.mean(norms, -1, keepdims=True) + 1e-6)
    return (gamma * (x * ratio) + beta + x).astype(h.dtype)

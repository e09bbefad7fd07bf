"""The inverted bottleneck that every MedNeXt block is: depthwise convolution, norm, expansion, GELU, compression."""

from collections.abc import Sequence

import flax.linen as nn
import jax
from jax import Array

from mednext_jax.nn.adapters import Adapter, at_site
from mednext_jax.nn.branches import ConvAdapter
from mednext_jax.nn.gpu.mlp import Matrices
from mednext_jax.nn.gpu.per_voxel import PerVoxel
from mednext_jax.nn.layers import (
    Conv,
    Norm,
    Weights,
    channel_norm,
    effective_depthwise_kernel,
    effective_matrix,
    gelu,
    layer_norm,
    pointwise,
    response_norm,
    spatial_conv,
)
from mednext_jax.nn.voxelwise import Before, add_convolved_voxelwise, add_voxelwise, channel_statistics

NORMS = ("group", "layer")


class InvertedBottleneck(nn.Module):
    """``conv3(grn(gelu(conv2(norm(conv1(x))))))``, without a residual.

    Shapes: x (B, *spatial, C), two or three spatial axes; returns (B, *out, out_channels) with out = n,
    ceil(n / 2) or 2n - 1 for the modes "same", "down" and "up".

    Parameters: ``conv1/{kernel,bias}``, ``norm/{scale,bias}``, ``conv2/...``, ``conv3/...``, ``grn_gamma`` and
    ``grn_beta`` (exp_r * C,) with ``grn``.

    Source: MedNeXt (Roy et al., arXiv 2303.09975), mednextv1/blocks.py.

    Attributes:
      out_channels: channels after compression.
      exp_r: expansion ratio.
      kernel_size: of conv1, odd.
      norm_type: "group" (each channel its own group, over space) or "layer" (each voxel over its channels).
      n_groups: groups of conv1; None means depthwise.
      grn: global response normalisation after GELU.
      mode: what conv1 does to the size.
      adapters: adapters of the network; those aimed at this module or its layers are hosted here.
      zero: conv3 starts at zero (for a block that serves as adapter).
      remat: "none" stores what autodiff asks for, "mlp" recomputes the second half, "block" the convolution too, where
        neither SSF nor an adapter sits on its result.
      shares_input: something beside the block keeps its input as well, so conv1 is recomputed from it.
    """

    out_channels: int
    exp_r: int = 4
    kernel_size: int = 7
    norm_type: str = "group"
    n_groups: int | None = None
    grn: bool = False
    mode: str = "same"
    adapters: tuple[Adapter, ...] = ()
    zero: bool = False
    remat: str = "mlp"
    shares_input: bool = False

    @nn.compact
    def __call__(self, x: Array, onto: Array | None = None) -> Array:
        return self.branch(x, onto)

    def branch(self, x: Array, onto: Array | None = None) -> Array:
        """The block, added to ``onto`` (its residual) if given; to be called inside a compact method."""
        if self.norm_type not in NORMS:
            raise ValueError(f"norm_type must be one of {', '.join(NORMS)}; got {self.norm_type!r}")
        channels, ones = x.shape[-1], (1,) * (x.ndim - 2)
        groups = channels if self.n_groups is None else self.n_groups
        sizes = (self.kernel_size,) * (x.ndim - 2)
        conv1 = Conv(channels, sizes, groups, self.adapters, name="conv1")(channels)
        norm = Norm(self.adapters, name="norm")(channels)
        expand = Conv(self.exp_r * channels, ones, 1, self.adapters, name="conv2")(channels)
        compress = Conv(self.out_channels, ones, 1, self.adapters, self.zero, name="conv3")(self.exp_r * channels)
        grn = None
        if self.grn:
            width = (self.exp_r * channels,)
            grn = (self.param("grn_gamma", nn.initializers.zeros, width),
                   self.param("grn_beta", nn.initializers.zeros, width))  # fmt: skip
        adapters = at_site(self.adapters, self.path, "module", "convolution")
        slabwise = self.remat != "none" and self.norm_type == "group" and grn is None
        if slabwise and groups == channels and conv1.ssf is None and not adapters:
            beside = any(a.placement == "parallel" for a in at_site(self.adapters, self.path, "module"))
            before = Before(self.mode, self.shares_input or beside or self.remat == "block")
            return add_convolved_voxelwise(
                MLP, self.exp_r * channels, before, x, onto, effective_depthwise_kernel(conv1), conv1.bias, norm,
                (expand, compress),
            )  # fmt: skip
        y = spatial_conv(x, conv1, groups, 2 if self.mode == "down" else 1, self.mode == "up")
        y = self._convolution_adapters(adapters, x, y)
        if slabwise:
            return add_voxelwise(MLP, self.exp_r * channels, y, onto, norm, (expand, compress))
        run = _plain_second_half if self.remat == "none" else jax.checkpoint(_plain_second_half, static_argnums=5)
        out = run(y, norm, expand, compress, grn, self.norm_type)
        return out if onto is None else onto + out

    def _convolution_adapters(self, adapters: Sequence[Adapter], x: Array, y: Array) -> Array:
        base = y
        for adapter in adapters:
            if adapter.kind != "conv":
                raise ValueError(f"{adapter.kind} adapters cannot sit at position 'convolution' of {self.path}")
            sizes = (adapter.kernel_size or self.kernel_size,) * (x.ndim - 2)
            mode = self.mode if adapter.placement == "parallel" else "same"
            module = ConvAdapter(y.shape[-1], adapter.gamma, sizes, mode, adapter.scale, name=adapter.name)
            y = module(x if adapter.placement == "parallel" else base, y)
        return y


def _mlp(n: Array, layers: tuple[Weights, Weights]) -> Array:
    expand, compress = layers
    return pointwise(gelu(pointwise(n, expand)), compress)


def _matrices(layers: tuple[Weights, Weights]) -> Matrices:
    return Matrices(*effective_matrix(layers[0]), *effective_matrix(layers[1]))


MLP = PerVoxel(_mlp, _matrices)


def _plain_second_half(y: Array, norm: Weights, expand: Weights, compress: Weights, grn, norm_type: str) -> Array:
    """The whole array at once, differentiated by JAX: what response norm and layer norm need."""
    n = layer_norm(y, norm) if norm_type == "layer" else channel_norm(y, *channel_statistics(y), norm)
    h = gelu(pointwise(n, expand))
    return pointwise(h if grn is None else response_norm(h, *grn), compress)

"""The inverted bottleneck that every MedNeXt block is: depthwise convolution, norm, expansion, GELU, compression.

Memory is what limits 3-D training, and the expanded activations (2 to 8 times the block's input) are the hog. They
are never stored: the second half of the block is recomputed in the backward pass, and on CPU, where a slab of them
fits the cache, it runs slab by slab so that they never even reach memory.
"""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from mednext_jax.nn.adapters import Adapter, at_site
from mednext_jax.nn.branches import ConvAdapter
from mednext_jax.nn.layers import (
    Conv,
    Norm,
    Weights,
    channel_norm,
    channel_statistics,
    layer_norm,
    pointwise,
    response_norm,
    spatial_conv,
)

NORMS = ("group", "layer")
SLAB_BYTES = 2**20  # of expanded activations; about half of one core's second-level cache


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
      remat: "none" stores what autodiff asks for, anything else recomputes the second half.
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

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return self.branch(x)

    def branch(self, x: Array) -> Array:
        """The block without its residual; to be called inside a compact method."""
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
        y = spatial_conv(x, conv1, groups, 2 if self.mode == "down" else 1, self.mode == "up")
        y = self._convolution_adapters(x, y)
        return self._second_half(y, norm, expand, compress, grn)

    def _convolution_adapters(self, x: Array, y: Array) -> Array:
        base = y
        for adapter in at_site(self.adapters, self.path, "module", "convolution"):
            if adapter.kind != "conv":
                raise ValueError(f"{adapter.kind} adapters cannot sit at position 'convolution' of {self.path}")
            sizes = (adapter.kernel_size or self.kernel_size,) * (x.ndim - 2)
            mode = self.mode if adapter.placement == "parallel" else "same"
            module = ConvAdapter(y.shape[-1], adapter.gamma, sizes, mode, adapter.scale, name=adapter.name)
            y = y + module(x if adapter.placement == "parallel" else base)
        return y

    def _second_half(self, y: Array, norm: Weights, expand: Weights, compress: Weights, grn) -> Array:
        """Norm, expansion, GELU, response norm and compression."""
        if self.norm_type == "layer":
            arguments = (norm, expand, compress, grn)
            run = _layer_norm_mlp
        else:
            arguments = (*channel_statistics(y), norm, expand, compress, grn)
            run = _channel_norm_mlp
        if self.remat == "none":
            return run(y, *arguments)
        run = jax.checkpoint(run)
        if grn is not None:  # needs whole-volume statistics of the expanded activations
            return run(y, *arguments)
        return by_slabs(lambda slab: run(slab, *arguments), y, self.exp_r * y.shape[-1] * 4)


def _layer_norm_mlp(y: Array, norm: Weights, expand: Weights, compress: Weights, grn) -> Array:
    return _mlp(layer_norm(y, norm), expand, compress, grn)


def _channel_norm_mlp(
    y: Array, mean: Array, rstd: Array, norm: Weights, expand: Weights, compress: Weights, grn
) -> Array:
    return _mlp(channel_norm(y, mean, rstd, norm), expand, compress, grn)


def _mlp(x: Array, expand: Weights, compress: Weights, grn) -> Array:
    h = jax.nn.gelu(pointwise(x, expand), approximate=False)
    if grn is not None:
        h = response_norm(h, *grn)
    return pointwise(h, compress)


def by_slabs(f: Callable[[Array], Array], y: Array, bytes_per_voxel: int) -> Array:
    """``f(y)`` for an f that treats voxels independently; on CPU slab by slab along the first spatial axis.

    A slab holds about ``SLAB_BYTES`` of what f makes on its way. Elsewhere, f runs once: a GPU's compiler fuses it.
    """
    depth = y.shape[1]
    wanted = SLAB_BYTES / (bytes_per_voxel * y.shape[0] * math.prod(y.shape[2:-1]))
    thickness = max([d for d in range(1, depth + 1) if depth % d == 0 and d <= wanted], default=1)
    if jax.default_backend() != "cpu" or thickness == depth:
        return f(y)
    slabs = y.reshape(y.shape[0], depth // thickness, thickness, *y.shape[2:])
    out = jax.lax.map(f, jnp.moveaxis(slabs, 1, 0))
    out = jnp.moveaxis(out, 0, 1)
    return out.reshape(y.shape[0], depth, *out.shape[3:])

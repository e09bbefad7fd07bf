"""MedNeXt's blocks: residual, down-sampling and up-sampling, and the output head.

Names and arithmetic are upstream's (MedNeXt, arXiv 2303.09975, mednextv1/blocks.py), including its edges: the first
plane of an up block's output is exactly zero along every axis, and the norm of an up block sees 2n - 1 planes.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from mednext_jax.nn.adapters import Adapter, at_site
from mednext_jax.nn.bottleneck import InvertedBottleneck
from mednext_jax.nn.branches import ConvAdapter, LinearAdapter
from mednext_jax.nn.layers import Conv, pointwise, scale_shift, scaled_and_shifted, widened


class MedNeXtBlock(InvertedBottleneck):
    """``x + bottleneck(x)``; (B, *spatial, C) to (B, *spatial, out_channels).

    Attributes:
      do_res: adds the input; it then must have ``out_channels`` channels.
      dim: "3d" or "2d"; must agree with the input.
      Others as in :class:`InvertedBottleneck`.
    """

    do_res: bool = True
    dim: str = "3d"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        check_dim(x, self.dim)
        if self.do_res and self.out_channels != x.shape[-1]:
            raise ValueError(f"do_res adds the input, so {x.shape[-1]} channels cannot become {self.out_channels}")
        return hosted(self, x, self.branch(x, x if self.do_res else None))


class MedNeXtDownBlock(InvertedBottleneck):
    """Halves the size: (B, n, C) to (B, ceil(n / 2), out_channels) along every spatial axis.

    ``do_res`` adds ``res_conv``, a 1x1 convolution of every second voxel.
    """

    do_res: bool = False
    dim: str = "3d"
    mode: str = "down"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        check_dim(x, self.dim)
        residual = None
        if self.do_res:
            res_conv = Conv(self.out_channels, (1,) * (x.ndim - 2), adapters=self.adapters, name="res_conv")
            every_second = x[(slice(None), *(slice(None, None, 2),) * (x.ndim - 2))]
            residual = pointwise(every_second, res_conv(x.shape[-1]))
        return hosted(self, x, self.branch(x, residual))


class MedNeXtUpBlock(InvertedBottleneck):
    """Doubles the size: (B, n, C) to (B, 2n, out_channels) along every spatial axis.

    The transposed convolution gives 2n - 1 planes, on which norm and bottleneck run; one plane of zeros is then put
    in front. ``do_res`` adds ``res_conv``, a transposed 1x1 convolution: its odd planes are its bias alone.
    """

    do_res: bool = False
    dim: str = "3d"
    mode: str = "up"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        check_dim(x, self.dim)
        residual = None
        if self.do_res:
            res_conv = Conv(self.out_channels, (1,) * (x.ndim - 2), adapters=self.adapters, name="res_conv")
            weights = res_conv(x.shape[-1])
            residual = _spread(pointwise(x, weights), pointwise(jnp.zeros(x.shape[-1:], weights.bias.dtype), weights))
        return hosted(self, x, front_plane(self.branch(x, residual)))


class OutBlock(nn.Module):
    """The head: a 1x1 convolution ``conv_out`` to ``n_classes`` logits, (B, *spatial, n_classes)."""

    n_classes: int
    adapters: tuple[Adapter, ...] = ()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        conv_out = Conv(self.n_classes, (1,) * (x.ndim - 2), adapters=self.adapters, name="conv_out")
        return hosted(self, x, pointwise(x, conv_out(x.shape[-1])))


def check_dim(x: Array, dim: str) -> None:
    """Raises ValueError when ``x`` has not the spatial axes that ``dim`` promises."""
    if dim not in ("2d", "3d"):
        raise ValueError(f"dim must be '2d' or '3d'; got {dim!r}")
    if x.ndim != int(dim[0]) + 2:
        layout = "(B, H, W, C)" if dim == "2d" else "(B, D, H, W, C)"
        raise ValueError(f"a {dim} network takes {layout}; got an array of shape {x.shape}")


def front_plane(y: Array) -> Array:
    """One plane of zeros in front of every spatial axis: 2n - 1 becomes 2n."""
    return jnp.pad(y, ((0, 0), *((1, 0),) * (y.ndim - 2), (0, 0)))


def _spread(y: Array, between: Array) -> Array:
    """Puts ``y`` (B, n, C) at the even places of (B, 2n - 1, C) and the vector ``between`` at all others."""
    gaps = ((0, 0, 0), *((0, 0, 1),) * (y.ndim - 2), (0, 0, 0))
    given = jax.lax.pad(jnp.ones((1, *y.shape[1:-1], 1), bool), False, gaps)
    return jnp.where(given, widened(jax.lax.pad(y, jnp.zeros((), y.dtype), gaps)), between).astype(y.dtype)


def hosted(module: nn.Module, x: Array, y: Array) -> Array:
    """``y``, the output of ``module`` for ``x``, with what the adapters at this module add.

    To be called at the end of a compact method; the adapters become submodules of ``module``.
    """
    base = y
    for adapter in at_site(module.adapters, module.path, "module"):
        if adapter.kind == "ssf":
            if isinstance(module, Conv):
                continue  # a layer that is a module as well (the stem) has applied it already
            y = scaled_and_shifted(y, scale_shift(module, y.shape[-1]))
            continue
        source = x if adapter.placement == "parallel" else base
        released = adapter.legacy and adapter.kind == "block"
        # In a network without residuals, the released sequential block has none either: it replaces its input.
        replaces = released and adapter.placement == "sequential" and not module.do_res
        y = _with_branch(module, adapter, source, base, None if replaces else y)
        if released and adapter.placement == "parallel" and module.do_res:
            y = y + x  # the released block keeps its own residual: the identity counts twice
    return y


def _with_branch(module: nn.Module, adapter: Adapter, source: Array, like: Array, onto: Array | None) -> Array:
    """``onto`` (or nothing) plus the adapter's output for ``source``, in the shape of ``like``."""
    spatial = source.ndim - 2
    size = adapter.kernel_size or getattr(module, "kernel_size", 3)
    if adapter.kind == "conv":
        mode = getattr(module, "mode", "same") if adapter.placement == "parallel" else "same"
        branch = ConvAdapter(like.shape[-1], adapter.gamma, (size,) * spatial, mode, adapter.scale, name=adapter.name)
        return onto + front_plane(branch(source)) if mode == "up" else branch(source, onto)
    if source.shape != like.shape:
        raise ValueError(f"a parallel {adapter.kind} adapter cannot change the shape, as {'/'.join(module.path)} does; "
                         "use placement='sequential' there")
    if adapter.kind == "linear":
        return onto + LinearAdapter(adapter.ratio, adapter.legacy, name=adapter.name)(source)
    if not hasattr(module, "exp_r"):
        raise ValueError(f"a block adapter needs a stage or block to take its expansion from, not {module.path[-1]}")
    return InvertedBottleneck(
        like.shape[-1], adapter.exp_r or module.exp_r, size, module.norm_type,
        zero=not adapter.legacy, remat=module.remat, name=adapter.name,
    )(source, onto)  # fmt: skip

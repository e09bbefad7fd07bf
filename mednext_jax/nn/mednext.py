"""MedNeXt: a U-Net of inverted bottlenecks with residual up- and down-sampling (Roy et al., arXiv 2303.09975).

The same function as upstream's mednextv1/MedNextV1.py: outputs, gradients, parameter counts and names, including
``down_0`` that never has response norm. What upstream counts and we do not have is ``dummy_tensor``, one number that
only worked around a fault of its activation checkpointing.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from mednext_jax.nn.adapters import Adapter, at_site
from mednext_jax.nn.blocks import (
    MedNeXtBlock,
    MedNeXtDownBlock,
    MedNeXtUpBlock,
    OutBlock,
    check_dim,
    hosted,
)
from mednext_jax.nn.layers import FEW_INPUTS, Conv, pointwise
from mednext_jax.nn.paths import flatten

STAGES = ("enc_block_0", "enc_block_1", "enc_block_2", "enc_block_3", "bottleneck",
          "dec_block_3", "dec_block_2", "dec_block_1", "dec_block_0")  # fmt: skip
DIVISOR = 16  # four halvings
REMAT = ("none", "mlp", "block")

# Upstream's create_mednext_v1.py: expansion and block count of each of the nine stages.
VARIANTS: dict[str, dict[str, tuple[int, ...]]] = {
    "S": {"exp_r": (2,) * 9, "block_counts": (2,) * 9},
    "B": {"exp_r": (2, 3, 4, 4, 4, 4, 4, 3, 2), "block_counts": (2,) * 9},
    "M": {"exp_r": (2, 3, 4, 4, 4, 4, 4, 3, 2), "block_counts": (3, 4, 4, 4, 4, 4, 4, 4, 3)},
    "L": {"exp_r": (3, 4, 8, 8, 8, 8, 8, 4, 3), "block_counts": (3, 4, 8, 8, 8, 8, 8, 4, 3)},
}


class Stem(Conv):
    """The 1x1 convolution from the image's channels to the network's."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        inputs = x.shape[-1]
        return hosted(self, x, pointwise(x, self.declare(inputs), few_inputs=inputs <= FEW_INPUTS))


class Stage(nn.Module):
    """Some blocks in a row, named "0", "1", ..., and what adapters add around them; (B, *spatial, C) in and out."""

    blocks: int
    exp_r: int
    kernel_size: int
    do_res: bool
    norm_type: str
    dim: str
    grn: bool
    adapters: tuple[Adapter, ...]
    remat: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = x
        beside = any(adapter.placement == "parallel" for adapter in at_site(self.adapters, self.path, "module"))
        block = recomputed(MedNeXtBlock, self)
        for i in range(self.blocks):
            y = block(
                x.shape[-1], self.exp_r, self.kernel_size, self.norm_type, grn=self.grn, adapters=self.adapters,
                remat=self.remat, shares_input=beside and i == 0, do_res=self.do_res, dim=self.dim, name=str(i),
            )(y)  # fmt: skip
        return hosted(self, x, y)


def recomputed(block: type[nn.Module], owner: nn.Module) -> type[nn.Module]:
    """``block`` under ``nn.remat``, which keeps names, where ``remat="block"`` is asked for and the block does
    not see to it by itself: with norms that are not voxel by voxel (``InvertedBottleneck.branch``).
    """
    by_itself = owner.norm_type == "group" and not owner.grn
    return nn.remat(block) if owner.remat == "block" and not by_itself else block


class MedNeXt(nn.Module):
    """MedNeXt, with or without adapters.

    Shapes:
      x: (B, D, H, W, in_channels), or (B, H, W, in_channels) with ``dim="2d"``; sizes divisible by 16.
      returns: logits (B, D, H, W, n_classes), float32; with ``deep_supervision`` the list of five at full, 1/2, 1/4,
        1/8 and 1/16 resolution.

    Raises:
      ValueError: for sizes, channels or options that do not fit, and for an adapter that sits nowhere.

    Attributes: upstream's constructor arguments, and
      exp_r: one number or nine, from ``enc_block_0`` to ``dec_block_0``.
      kernel_size: of all stages; overrides ``enc_kernel_size`` and ``dec_kernel_size`` unless None.
      adapters: see :mod:`mednext_jax.nn.adapters`; mappings of their fields are accepted.
      dtype: of the computation; parameters, statistics of norms and logits are float32.
      remat: what the backward pass recomputes: "none" nothing, "mlp" the expanded half of every block (the default,
        and the fastest: what it saves in memory traffic is more), "block" the blocks' convolutions too.
    """

    in_channels: int = 4
    n_channels: int = 32
    n_classes: int = 3
    exp_r: int | tuple[int, ...] = 2
    kernel_size: int | None = 3
    enc_kernel_size: int | None = None
    dec_kernel_size: int | None = None
    deep_supervision: bool = False
    do_res: bool = True
    do_res_up_down: bool = True
    block_counts: tuple[int, ...] = (2,) * 9
    norm_type: str = "group"
    dim: str = "3d"
    grn: bool = False
    adapters: tuple[Adapter | Mapping[str, Any], ...] = ()
    dtype: DTypeLike = jnp.float32
    remat: str = "mlp"

    def __post_init__(self) -> None:
        adapters = tuple(a if isinstance(a, Adapter) else Adapter(**a) for a in self.adapters)
        object.__setattr__(self, "adapters", adapters)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array) -> Array | list[Array]:
        self._check(x)
        x = Stem(self.n_channels, (1,) * (x.ndim - 2), adapters=self.adapters, name="stem")(x.astype(self.dtype))
        skips, heads = [], []
        for level in range(4):
            x = self._stage(level)(x)
            skips.append(x)
            x = self._resampler(MedNeXtDownBlock, f"down_{level}", x.shape[-1] * 2, level + 1)(x)
        x = self._stage(4)(x)
        for level in (3, 2, 1, 0):
            heads.append(x)
            x = self._resampler(MedNeXtUpBlock, f"up_{level}", x.shape[-1] // 2, 8 - level)(x)
            x = self._stage(8 - level)(x + skips.pop())
        heads.append(x)
        if not self.deep_supervision:
            return self._head(0)(heads[-1].astype(jnp.float32))
        return [self._head(i)(h.astype(jnp.float32)) for i, h in enumerate(reversed(heads))]

    def _stage(self, index: int) -> Stage:
        return Stage(
            self.block_counts[index], self.expansions[index], self._kernel_size(index), self.do_res, self.norm_type,
            self.dim, self.grn, self.adapters, self.remat, name=STAGES[index],
        )  # fmt: skip

    def _resampler(self, block: type[nn.Module], name: str, channels: int, stage: int) -> nn.Module:
        """The block that leads into ``stage``; encoder kernels on the way down, decoder kernels on the way up."""
        decoder = block is MedNeXtUpBlock
        return recomputed(block, self)(
            channels, self.expansions[stage], self._kernel_size(8 if decoder else 0), self.norm_type,
            grn=self.grn and name != "down_0", adapters=self.adapters, remat=self.remat,
            do_res=self.do_res_up_down, dim=self.dim, name=name,
        )  # fmt: skip

    def _head(self, index: int) -> OutBlock:
        return OutBlock(self.n_classes, self.adapters, name=f"out_{index}")

    def _kernel_size(self, stage: int) -> int:
        """The bottleneck (stage 4) counts as decoder, as upstream."""
        if self.kernel_size is not None:
            return self.kernel_size
        size = self.enc_kernel_size if stage < 4 else self.dec_kernel_size
        if size is None:
            raise ValueError("kernel_size is None: enc_kernel_size and dec_kernel_size must both be given")
        return size

    @property
    def expansions(self) -> tuple[int, ...]:
        """The expansion ratio of each of the nine stages."""
        return (self.exp_r,) * len(STAGES) if isinstance(self.exp_r, int) else tuple(self.exp_r)

    def sites(self) -> dict[str, tuple[str, ...]]:
        """Where adapters can sit: ``{"module": stages, blocks, ...; "layer": their convolutions and norms}``."""
        stages = [f"{stage}/{i}" for stage, n in zip(STAGES, self.block_counts, strict=True) for i in range(n)]
        resamplers = [f"{way}_{level}" for way in ("down", "up") for level in range(4)]
        heads = [f"out_{i}" for i in range(5 if self.deep_supervision else 1)]
        layers = [f"{block}/{layer}" for block in stages + resamplers for layer in ("conv1", "norm", "conv2", "conv3")]
        layers += [f"{block}/res_conv" for block in resamplers] if self.do_res_up_down else []
        layers += ["stem", *(f"{head}/conv_out" for head in heads)]
        return {"module": ("stem", *STAGES, *stages, *resamplers, *heads), "layer": tuple(layers)}

    def _check(self, x: Array) -> None:
        check_dim(x, self.dim)
        if x.shape[-1] != self.in_channels:
            raise ValueError(f"the network takes {self.in_channels} channels; the image has {x.shape[-1]}")
        if any(n % DIVISOR for n in x.shape[1:-1]):
            raise ValueError(f"sizes must be divisible by {DIVISOR}; got {x.shape[1:-1]}")
        if len(self.block_counts) != len(STAGES) or len(self.expansions) != len(STAGES):
            raise ValueError(f"block_counts and exp_r need {len(STAGES)} numbers, one per stage")
        if self.remat not in REMAT:
            raise ValueError(f"remat must be one of {', '.join(REMAT)}; got {self.remat!r}")
        sites = self.sites()
        for adapter in self.adapters:
            allowed = [*sites["module"], *sites["layer"]] if adapter.kind == "ssf" else sites[adapter.site_kind]
            if not any(adapter.matches(site) for site in allowed):
                raise ValueError(f"the {adapter.kind} adapter's target {adapter.target!r} matches no "
                                 f"{adapter.site_kind} of the network")


def create_mednext(
    variant: str, n_classes: int, kernel_size: int = 3, deep_supervision: bool = False, **changes: Any
) -> MedNeXt:
    """One of upstream's four sizes: "S", "B", "M" or "L" (create_mednext_v1.py), with any field changed.

    Raises:
      ValueError: for an unknown variant or field.
    """
    if variant not in VARIANTS:
        raise ValueError(f"unknown MedNeXt variant {variant!r}; there are {', '.join(VARIANTS)}")
    fields = VARIANTS[variant] | {
        "n_classes": n_classes, "kernel_size": kernel_size, "deep_supervision": deep_supervision
    } | changes  # fmt: skip
    known = {field.name for field in dataclasses.fields(MedNeXt)}
    if unknown := sorted(set(fields) - known):
        raise ValueError(f"MedNeXt has no field {', '.join(unknown)}")
    return MedNeXt(**fields)


def parameter_shapes(model: MedNeXt) -> dict[str, jax.ShapeDtypeStruct]:
    """Path, shape and dtype of every parameter, without computing anything.

    Raises:
      ValueError, TypeError: arguments that no network can have.
    """
    jnp.dtype(model.dtype)  # raises TypeError if there is no such type
    known = model.clone(remat="mlp") if model.remat in REMAT else model
    return dict(_parameter_shapes(known.clone(dtype=jnp.float32)))  # neither has a part in them


@functools.lru_cache(maxsize=64)
def _parameter_shapes(model: MedNeXt) -> dict[str, jax.ShapeDtypeStruct]:
    """Tracing a whole network takes seconds, and a run asks several times."""
    x = jax.ShapeDtypeStruct((1, *(DIVISOR,) * int(model.dim[0]), model.in_channels), jnp.float32)
    return flatten(jax.eval_shape(model.init, jax.random.key(0), x)["params"])


def count_parameters(params: Mapping[str, Any]) -> int:
    """Number of parameters in a flat or nested tree."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(dict(params)))

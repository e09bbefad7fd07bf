"""Adapters: what a fine-tuning method adds to the network, and where.

An :class:`Adapter` is a description; the network hosts it at every site that its ``target`` matches. Sites are module
paths: stages (``enc_block_0``, ``bottleneck``), blocks (``enc_block_0/1``), ``down_2``, ``up_0``, ``stem``, heads
(``out_0``) and layers (``enc_block_0/1/conv2``).

Every adapter is the identity at initialisation: it adds zeros and multiplies by ones, so an adapted network starts as
the pre-trained function, up to what a compiler rounds elsewhere. The released code of arXiv 2412.14100 does not;
``legacy=True`` reproduces it.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

KINDS = ("conv", "block", "linear", "lora", "ssf", "depthwise")


@dataclass(frozen=True)
class Adapter:
    """One kind of adapter and where it sits.

    Attributes:
      kind: "conv" (Conv-Adapter, arXiv 2208.07463), "block" (a whole MedNeXt block, arXiv 2412.14100), "linear"
        (bottleneck over channels), "lora", "ssf", "depthwise" (a parallel linear depthwise branch).
      target: regular expression that must match a whole site path.
      placement: "sequential", ``f + A(f)`` with f the module's output, or "parallel", ``f + A(x)`` with x its input.
      position: "residual" (around the module) or "convolution" (around its first convolution, before the norm).
      gamma: the Conv-Adapter's bottleneck divides the channels by it.
      kernel_size: of "conv", "block" and "depthwise"; 0 means the adapted stage's own.
      rank, alpha: of "lora": the kernel changes by ``alpha / rank * a @ b``.
      ratio: bottleneck width of "linear" relative to the channels.
      exp_r: expansion of "block"; 0 means the adapted stage's own.
      scale: "conv" ends in a learnable scale per channel.
      legacy: as released: default initialisation, the parallel block keeps its own residual, the linear adapter
        mixes neighbouring voxels instead of channels and ends in ReLU.
      name: of the submodule that holds the parameters.
    """

    kind: str
    target: str
    placement: str = "sequential"
    position: str = "residual"
    gamma: int = 4
    kernel_size: int = 0
    rank: int = 8
    alpha: float = 8.0
    ratio: float = 0.25
    exp_r: int = 0
    scale: bool = True
    legacy: bool = False
    name: str = "adapter"

    def __post_init__(self) -> None:
        for field, allowed in (
            ("kind", KINDS),
            ("placement", ("sequential", "parallel")),
            ("position", ("residual", "convolution")),
        ):
            if getattr(self, field) not in allowed:
                raise ValueError(f"adapter {field} must be one of {', '.join(allowed)}; got {getattr(self, field)!r}")
        if self.gamma < 1 or self.rank < 1 or self.kernel_size < 0 or (self.kernel_size and not self.kernel_size % 2):
            raise ValueError("adapter: gamma and rank must be at least 1, kernel_size odd (or 0: the stage's own)")
        try:
            re.compile(self.target)
        except re.error as error:
            raise ValueError(f"adapter target {self.target!r} is no regular expression: {error}") from None

    @property
    def site_kind(self) -> str:
        """"layer" for what changes a layer's own arithmetic, "module" for what is added around a module."""
        return "layer" if self.kind in ("lora", "depthwise") else "module"

    def matches(self, site: str) -> bool:
        """Whether the adapter sits at ``site``."""
        return re.fullmatch(self.target, site) is not None


def at_site(
    adapters: Sequence[Adapter], path: Iterable[str], site_kind: str, position: str = "residual"
) -> list[Adapter]:
    """The adapters that sit at the module of this path.

    SSF may sit at layers and at blocks; all other kinds at one sort of site only.
    """
    site = "/".join(path)
    return [
        adapter
        for adapter in adapters
        if (adapter.kind == "ssf" or adapter.site_kind == site_kind)
        and (site_kind == "layer" or adapter.position == position)
        and adapter.matches(site)
    ]

"""The methods: what each adds to the network and which parameters it trains.

A method is one function decorated with :func:`method`: its keyword arguments are its options, its docstring's
first line is what the table of methods prints, and it returns :class:`Parts`. ``registry.create`` checks the
options and calls it. Sources: Conv-Adapter (arXiv:2208.07463), LoRA (arXiv:2106.09685), BitFit
(arXiv:2106.10199), SSF (arXiv:2210.08823), PEFT-MedNeXt (arXiv:2412.14100), decoder tuning with
re-initialisation (arXiv:2411.15872).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mednext_jax.nn.adapters import Adapter
from mednext_jax.peft import targets as where
from mednext_jax.peft.rules import Rule, rule

Targets = str | Sequence[str]
PLACEMENTS = ("parallel", "sequential")
POSITIONS = ("residual", "convolution")


@dataclass(frozen=True)
class Parts:
    """What a method is made of.

    Attributes:
      adapters: what it adds to the network, and so trains.
      rule: the base's own parameters that it trains.
      fresh: the base's parameters that it draws anew before training, or None.
      identity: whether the adapted network starts as the base's function; see ``registry.Method``.
    """

    adapters: tuple[Adapter, ...] = ()
    rule: Rule = Rule(())
    fresh: Rule | None = None
    identity: bool = True


METHODS: dict[str, Callable[..., Parts]] = {}


def method(function: Callable[..., Parts]) -> Callable[..., Parts]:
    """Enter a function into the registry under its own name."""
    METHODS[function.__name__] = function
    return function


# ---- parts of the base itself
# ----------------------------------------------------------------------------------


@method
def full(targets: Targets = "all") -> Parts:
    """Every parameter of the base."""
    return Parts(rule=rule(where.within(targets)))


@method
def head() -> Parts:
    """The output layers, those of deep supervision included."""
    return Parts(rule=rule(r"out_\d/.*"))


@method
def decoder(up: bool = False) -> Parts:
    """The decoder's stages and the output layers; ``up`` adds the blocks that double the resolution."""
    return Parts(rule=rule(r"dec_block_\d/.*") + rule(r"out_\d/.*") + (rule(r"up_\d/.*") if up else Rule(())))


@method
def last_stages(n_stages: int = 2, reinit: bool = False) -> Parts:
    """The last ``n_stages`` resolutions: up block, decoder stage, output; ``reinit`` draws them anew."""
    _one_of("n_stages", n_stages, (1, 2, 3, 4))
    last = rule(rf"(up|dec_block|out)_[0-{n_stages - 1}]/.*")
    return Parts(rule=last, fresh=last if reinit else None, identity=not reinit)


@method
def norm(targets: Targets = "all") -> Parts:
    """Scale and shift of every norm."""
    return Parts(rule=rule(where.within(targets), kinds=("norm",)))


@method
def bias(targets: Targets = "all") -> Parts:
    """Every bias, those of the norms included (BitFit)."""
    return Parts(rule=rule(where.within(targets, ".*bias")))


@method
def norm_bias_head() -> Parts:
    """Norms, every bias and the output layers."""
    return Parts(rule=norm().rule + bias().rule + head().rule)


@method
def depthwise(targets: Targets = "blocks") -> Parts:
    """The depthwise convolutions."""
    return Parts(rule=rule(where.within(targets), kinds=("depthwise",)))


# ---- new parameters that fold back into the base


@method
def ssf(scope: str = "layer", targets: Targets | None = None) -> Parts:
    """A scale and a shift per channel after every convolution and norm (SSF).

    ``scope`` layer, or block: one pair after every block of the stages instead, which cannot be merged.
    """
    _one_of("scope", scope, ("layer", "block"))
    if scope == "layer":
        sites = where.within(targets or "all", where.layer("conv[123]|res_conv|norm|stem|conv_out"))
    else:
        # Not the blocks that change resolution: after those, XLA may round elsewhere than in the base.
        sites = where.within(targets or "stages", where.BLOCK)
    return Parts((Adapter(kind="ssf", target=sites),))


@method
def lora(
    rank: int = 8, alpha: float | None = None, layers: Targets | None = None, targets: Targets = "all"
) -> Parts:
    """A low-rank update of the blocks' 1x1 convolutions.

    The update is ``alpha / rank * A B`` with B = 0 at the start; ``alpha`` defaults to ``rank``. ``layers``
    are names of layers: conv1 (the depthwise kernel, as a matrix of taps x channels), conv2, conv3, res_conv,
    stem, conv_out. None: conv2 and conv3, and where ``targets`` names the stem or a head, its convolution.
    """
    _at_least("rank", rank, 1)
    alpha = float(rank if alpha is None else alpha)
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha must be a number above 0, got {alpha}")
    if layers is None:
        layers = ("conv2", "conv3") if targets == "all" else ("conv2", "conv3", "stem", "conv_out")
    names = tuple(layers.split(",")) if isinstance(layers, str) else tuple(layers)
    for name in names or ("",):
        _one_of("layers", name, ("conv1", "conv2", "conv3", "res_conv", "stem", "conv_out"))
    sites = where.within(targets, where.layer("|".join(names)))
    return Parts((Adapter(kind="lora", target=sites, rank=rank, alpha=alpha),))


@method
def depthwise_adapter(kernel_size: int = 0, targets: Targets = "blocks") -> Parts:
    """A second depthwise convolution beside each block's own, without activation.

    ``kernel_size`` 0 = the block's own; a larger one cannot be merged.
    """
    _kernel(kernel_size)
    sites = where.within(targets, where.layer("conv1"))
    return Parts((Adapter(kind="depthwise", target=sites, kernel_size=kernel_size),))


# ---- new parameters with an activation between: they stay beside the base


@method
def conv_adapter(
    gamma: int = 4,
    placement: str = "parallel",
    position: str = "residual",
    scope: str = "stage",
    kernel_size: int = 0,
    scale: bool = True,
    targets: Targets = "stages",
) -> Parts:
    """Conv-Adapter: grouped convolution to 1/gamma of the channels, GELU, 1x1 convolution back, scale.

    ``placement`` parallel or sequential; ``position`` around the whole module (residual) or around the
    depthwise convolution of each block (convolution); one per ``scope`` stage or block; ``kernel_size`` 0 =
    the stage's.
    """
    _at_least("gamma", gamma, 1)
    _one_of("placement", placement, PLACEMENTS)
    _one_of("position", position, POSITIONS)
    _one_of("scope", scope, ("stage", "block"))
    _kernel(kernel_size)
    if position == "convolution" and scope == "stage":
        raise ValueError(
            "position='convolution' adapts the convolution inside a block: it needs scope='block'"
        )
    return Parts(
        (
            Adapter(
                kind="conv",
                target=_scoped(scope, targets),
                placement=placement,
                position=position,
                gamma=gamma,
                kernel_size=kernel_size,
                scale=scale,
            ),
        )
    )


@method
def linear_adapter(
    ratio: float = 0.25,
    placement: str = "sequential",
    scope: str = "stage",
    legacy: bool = False,
    targets: Targets = "stages",
) -> Parts:
    """A two-layer perceptron over channels, reduced to ``ratio`` of them, after each stage or block.

    ``legacy`` mixes neighbouring voxels instead of channels and starts at random, as released with
    PEFT-MedNeXt.
    """
    _one_of("scope", scope, ("stage", "block"))
    _one_of("placement", placement, PLACEMENTS)
    if not 0 < ratio <= 4:
        raise ValueError(f"ratio must be above 0 and at most 4, got {ratio}")
    return Parts(
        (
            Adapter(
                kind="linear",
                target=_scoped(scope, targets),
                placement=placement,
                ratio=float(ratio),
                legacy=legacy,
            ),
        ),
        identity=not legacy,
    )


@method
def paper_sequential(kernel_size: int = 0, legacy: bool = False, targets: Targets = "stages") -> Parts:
    """PEFT-MedNeXt: a whole MedNeXt block after each stage; ``legacy`` starts it at random, as released."""
    return _paper("sequential", kernel_size, legacy, targets)


@method
def paper_parallel(kernel_size: int = 0, legacy: bool = False, targets: Targets = "stages") -> Parts:
    """PEFT-MedNeXt: a whole MedNeXt block beside each stage; ``legacy`` doubles the identity, as released."""
    return _paper("parallel", kernel_size, legacy, targets)


def _paper(placement: str, kernel_size: int, legacy: bool, targets: Targets) -> Parts:
    _kernel(kernel_size)
    spec = Adapter(
        kind="block",
        target=_scoped("stage", targets),
        placement=placement,
        kernel_size=kernel_size,
        legacy=legacy,
    )
    return Parts((spec,), identity=not legacy)


def _scoped(scope: str, targets: Targets) -> str:
    return where.within(targets, where.STAGE if scope == "stage" else where.BLOCK)


def _one_of(option: str, value: object, allowed: Sequence[object]) -> None:
    if value not in allowed:
        raise ValueError(f"{option} must be one of {', '.join(map(str, allowed))}, got {value!r}")


def _at_least(option: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{option} must be a whole number of at least {least}, got {value!r}")


def _kernel(value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0 or (value and value % 2 == 0):
        raise ValueError(f"kernel_size must be odd, or 0 for the stage's own, got {value!r}")

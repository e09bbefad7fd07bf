"""Where in the network a method acts: names for its parts, and the module paths inside them.

``targets`` of every method is a part's name (``"decoder"``), several with commas (``"stages,down,up"``), or a
regular expression on module paths (``"enc_block_[01]"``, ``"dec_block_0/1"``), which also takes everything
below a module.
"""

from collections.abc import Sequence

from mednext_jax.peft import rules

_STAGES = r"enc_block_\d|bottleneck|dec_block_\d"

PARTS: dict[str, str] = {
    "stem": "stem",
    "encoder": r"enc_block_\d",
    "down": r"down_\d",
    "bottleneck": "bottleneck",
    "up": r"up_\d",
    "decoder": r"dec_block_\d",
    "head": r"out_\d",
    "stages": _STAGES,  # the nine rows of blocks at one resolution
    "blocks": rf"{_STAGES}|down_\d|up_\d",  # those, and the blocks that change resolution
    "all": r"\w+",
}

# What a method may attach itself to: the path of a whole stage, of one block, of one layer.
STAGE = rf"stem|{_STAGES}|down_\d|up_\d|out_\d"
BLOCK = rf"stem|(?:{_STAGES})/\d+|down_\d|up_\d|out_\d"


def layer(names: str) -> str:
    """Pattern of the layers called ``names`` (alternatives); not of those inside an adapter."""
    return rf"(?:\w+/(?:\d+/)?)?(?:{names})"


def within(targets: str | Sequence[str], sites: str = ".*") -> str:
    """Regular expression of the paths that match ``sites`` and lie in ``targets``.

    Raises:
      ValueError: ``targets`` is empty or no regular expression.
    """
    area = _area(targets)
    return sites if area == PARTS["all"] else rf"(?=(?:{area})(?:/|$))(?:{sites})"


def _area(targets: str | Sequence[str]) -> str:
    if isinstance(targets, str):
        names = [name.strip() for name in targets.split(",")]
        targets = names if all(name in PARTS for name in names) else [targets]
    if not targets or not all(targets):
        raise ValueError(f"targets is empty; name a part ({', '.join(PARTS)}) or give a regular expression")
    area = "|".join(PARTS.get(target, target) for target in targets)
    rules.compiled(area, "targets")
    return area

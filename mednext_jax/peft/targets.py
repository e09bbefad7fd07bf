"""Where in the network a method acts: names for its parts, and the module paths inside them.

``targets`` of every method is a part's name (``"decoder"``) or a regular expression on module paths
(``"enc_block_[01]"``, ``"dec_block_0/1"``), which also takes everything below a module; or several of these
with commas (``"stages,down,up_0"``).
"""

import re
from collections.abc import Collection, Sequence

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
    areas = [_area(target) for target in _single(targets)]
    return sites if PARTS["all"] in areas else rf"(?=(?:{'|'.join(areas)})(?:/|$))(?:{sites})"


def check(targets: str | Sequence[str], paths: Collection[str]) -> None:
    """Raise ValueError unless each of ``targets`` holds one of ``paths``, a network's sites and parameters."""
    for target in _single(targets):
        inside = re.compile(rf"(?:{_area(target)})(?:/.*)?")
        if not any(inside.fullmatch(path) for path in paths):
            raise ValueError(
                f"targets {target!r} matches nothing in this network; name a part ({', '.join(PARTS)}) or "
                "modules such as enc_block_0, up_2, dec_block_[01]/1"
            )


def _single(targets: str | Sequence[str]) -> list[str]:
    """Each target alone; a comma inside braces belongs to a regular expression."""
    names = re.split(r",(?![^{]*\})", targets) if isinstance(targets, str) else targets
    names = [name.strip() for name in names]
    if not names or not all(names):
        raise ValueError(
            f"targets is empty, or has an empty place; name a part ({', '.join(PARTS)}) or give a regular expression"
        )
    return names


def _area(target: str) -> str:
    area = PARTS.get(target, target)
    rules.compiled(area, "targets")
    return area

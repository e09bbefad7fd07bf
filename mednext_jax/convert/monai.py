"""MONAI's MedNeXt under upstream's names.

The same function with other names, and two differences that matter:

* its down blocks expand by the ratio of the stage they leave, upstream's by that of the stage they enter.
  The S variant has one ratio everywhere; in B, M and L upstream's down blocks are wider. The missing
  channels are added with zero weights on both sides: the activation of zero is zero, so the function (and,
  the zeros having zero gradients, its training) is unchanged;
* its down blocks never have global response normalisation, upstream's ``down_1`` to ``down_3`` do when the
  network has it. It is added with gamma = beta = 0, where it is the identity (but can be trained).

Source: Project-MONAI/MONAI, ``monai/networks/nets/mednext.py``.
"""
from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from mednext_jax.convert.names import DUMMY

# A name's beginning -> upstream's, given the number in it.
PREFIXES = {
    r"enc_stages\.(\d)\.": lambda i: f"enc_block_{i}.",
    r"down_blocks\.(\d)\.": lambda i: f"down_{i}.",
    r"dec_stages\.(\d)\.": lambda i: f"dec_block_{3 - i}.",
    r"up_blocks\.(\d)\.": lambda i: f"up_{3 - i}.",
    r"out_blocks\.(\d)\.": lambda i: f"out_{4 - i}.",
}


def matches(state_dict: Mapping[str, Any]) -> bool:
    """Whether the names are MONAI's."""
    return any(name.startswith(("enc_stages.", "down_blocks.")) for name in state_dict)


def to_upstream(state_dict: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The state dict that upstream's network computing the same function would have.

    Returns: the state dict, and notes on what had to be added.

    Raises:
      ValueError: a network of another depth than upstream's four down-samplings.
    """
    renamed = {_rename(name): value for name, value in state_dict.items()}
    renamed[DUMMY] = np.ones(1, np.float32)
    notes = ["the names are MONAI's; dummy_tensor = 1 is added, which takes part in no computation"]
    padded = [f"down_{i}" for i in range(4) if _widen(renamed, f"down_{i}", _ratio(renamed, i + 1))]
    if padded:
        notes.append("MONAI's down blocks are narrower than upstream's; widened with zeros, which leaves the "
                     f"function unchanged: {', '.join(padded)}")
    if any(name.endswith("grn_gamma") for name in renamed):
        for i in (1, 2, 3):
            width = renamed[f"down_{i}.conv2.bias"].shape[0]
            shape = (1, width, *(1,) * (renamed["stem.weight"].ndim - 2))
            for leaf in ("grn_gamma", "grn_beta"):
                renamed[f"down_{i}.{leaf}"] = np.zeros(shape, np.float32)
        notes.append("MONAI's down blocks have no global response normalisation; it is added to down_1, "
                     "down_2 and down_3 with gamma = beta = 0, the identity")
    return renamed, notes


def _rename(name: str) -> str:
    for pattern, replacement in PREFIXES.items():
        found = re.match(pattern, name)
        if found:
            index = int(found[1])
            if index > 3:
                raise ValueError(f"{name}: this MONAI network has more than four down-samplings; "
                                 "MedNeXt has exactly four")
            name = replacement(index) + name[found.end():]
            break
    return name.replace("global_resp_", "grn_")


def _ratio(state_dict: Mapping[str, Any], stage: int) -> int:
    """Expansion ratio of the stage that a down block enters."""
    name = "bottleneck" if stage == 4 else f"enc_block_{stage}"
    weight = _get(state_dict, f"{name}.0.conv2.weight")
    return weight.shape[0] // weight.shape[1]


def _widen(state_dict: dict[str, Any], module: str, ratio: int) -> bool:
    """Add zero channels to a down block until it expands by ``ratio``; False when it already does."""
    expand = _get(state_dict, f"{module}.conv2.weight")
    lacking = ratio * expand.shape[1] - expand.shape[0]
    if lacking < 0:
        raise ValueError(f"{module}.conv2.weight expands by more than the stage that follows (by {ratio}): "
                         "upstream's MedNeXt has no such network")
    if lacking > 0:
        for name, axis in (("conv2.weight", 0), ("conv2.bias", 0), ("conv3.weight", 1)):
            array = np.asarray(_get(state_dict, f"{module}.{name}"))
            widths = [(0, lacking if i == axis else 0) for i in range(array.ndim)]
            state_dict[f"{module}.{name}"] = np.pad(array, widths)
    return lacking > 0


def _get(state_dict: Mapping[str, Any], name: str) -> Any:
    if name not in state_dict:
        raise ValueError(f"the MONAI state dict is incomplete: upstream's {name} has no tensor")
    return state_dict[name]

"""What a file of weights cannot tell: which scan each input channel is, and which class each output.

A network trained with its channels or classes in another order than ours is the same network with the stem's
inputs or the heads' outputs permuted, so both are put into our order when weights are imported, and back when they
are exported.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

STEM = re.compile(r"stem/kernel")
HEADS = re.compile(r"out_\d/conv_out/(kernel|bias)")


def reorder_inputs(flat: Mapping[str, Any], have: Sequence[str], want: Sequence[str]) -> dict[str, Any]:
    """Parameters of the same network taking its channels in the order ``want`` instead of ``have``.

    Args:
      flat: path -> array; the stem's kernel is (1, 1, 1, in_channels, C).
      have: names of the channels in the order that ``flat`` expects.
      want: the same names in the wanted order.

    Raises:
      ValueError: the names differ, repeat, or are not as many as the stem's channels.
    """
    return _reorder(flat, STEM, -2, have, want, "channels")


def reorder_outputs(flat: Mapping[str, Any], have: Sequence[str], want: Sequence[str]) -> dict[str, Any]:
    """Parameters of the same network giving its classes in the order ``want``; as :func:`reorder_inputs`."""
    return _reorder(flat, HEADS, -1, have, want, "outputs")


def _reorder(
    flat: Mapping[str, Any], paths: re.Pattern, axis: int, have: Sequence[str], want: Sequence[str], what: str
) -> dict[str, Any]:
    if sorted(have) != sorted(want) or len(set(have)) != len(have):
        raise ValueError(f"{what} are {', '.join(have)}; they must be {', '.join(want)} in any order")
    order = [list(have).index(name) for name in want]
    result = dict(flat)
    for path, array in flat.items():
        if paths.fullmatch(path):
            if array.shape[axis] != len(order):
                raise ValueError(f"{len(order)} {what} are named, but {path} has {array.shape[axis]}")
            result[path] = np.take(array, order, axis)
    return result

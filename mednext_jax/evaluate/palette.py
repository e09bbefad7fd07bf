"""Colours of regions and errors, from Okabe and Ito's palette, which colour-blind readers can tell apart.

Regions keep their colour in every figure and table; arms differ by marker and position, not by colour.
"""

from collections.abc import Sequence

BLUE, ORANGE, PURPLE, GREEN = "#0072B2", "#E69F00", "#CC79A7", "#009E73"
SKY, VERMILION, YELLOW, BLACK = "#56B4E9", "#D55E00", "#F0E442", "#000000"

FIXED = {"WT": BLUE, "TC": ORANGE, "ET": PURPLE, "mean": "#555555"}
OTHERS = (GREEN, VERMILION, SKY, BLUE, ORANGE, PURPLE)
MISSED, INVENTED, SWAPPED = VERMILION, SKY, YELLOW
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def colours(regions: Sequence[str]) -> dict[str, str]:
    """Region to colour: fixed for WT, TC, ET; the others take turns."""
    free = iter(OTHERS * (len(regions) // len(OTHERS) + 1))
    return {name: FIXED.get(name) or next(free) for name in regions}

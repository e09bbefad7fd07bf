"""Tissue to signal: what T1, contrast-enhanced T1, T2 and FLAIR show.

Signal is relative to fluid on T2. ``other timing`` is the contrast of another scanner's protocol; a case
is a blend of the two, so a cohort is not one scanner.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_pipeline.cohorts import CHANNELS
from data_pipeline.simulate.anatomy import Tissue
from data_pipeline.simulate.grid import Grid, smooth_field
from data_pipeline.simulate.recipes import Recipe
from data_pipeline.simulate.tumour import Extent

# Signal of           CSF   grey  white oedema necrosis enhancing
_SIGNAL = {
    "t1n": np.array([0.25, 0.62, 0.88, 0.55, 0.38, 0.60]),
    "t1c": np.array([0.26, 0.64, 0.88, 0.56, 0.38, 0.62]),
    "t2w": np.array([1.05, 0.62, 0.45, 0.88, 0.98, 0.72]),
    "t2f": np.array([0.16, 0.60, 0.50, 0.98, 0.45, 0.80]),
}
_OTHER_SIGNAL = {
    "t1n": np.array([0.40, 0.66, 0.78, 0.62, 0.50, 0.64]),
    "t1c": np.array([0.40, 0.68, 0.78, 0.62, 0.50, 0.66]),
    "t2w": np.array([1.15, 0.80, 0.74, 0.92, 1.05, 0.84]),
    "t2f": np.array([0.55, 0.74, 0.56, 0.84, 0.78, 0.72]),
}
_DETAIL = {"t1n": 1.0, "t1c": 1.0, "t2w": -0.9, "t2f": -0.5}  # signal per unit of the template's T1 detail
# Meninges and bone, then scalp fat: what a careless skull strip leaves behind.
_BONE = {"t1n": 0.12, "t1c": 0.14, "t2w": 0.12, "t2f": 0.10}
_FAT = {"t1n": 1.05, "t1c": 1.05, "t2w": 0.75, "t2f": 0.85}
# Relative sd of the signal within a tissue.
_MOTTLE = {"csf": 0.02, "grey": 0.03, "white": 0.025, "oedema": 0.05, "necrosis": 0.09, "enhancing": 0.12}
_VESSEL_RADIUS_MM = 0.9


@dataclass(frozen=True)
class Protocol:
    """The sequences of one examination."""

    other_timing: dict[str, float]  # share of ``_OTHER_SIGNAL`` per channel
    contrast: dict[str, float]  # factor on differences from the brain's mean
    gadolinium: float  # T1 signal added to enhancing tumour
    vessels: float  # T1 signal added to enhancing vessels, per gadolinium


def draw_protocol(rng: np.random.Generator, recipe: Recipe) -> Protocol:
    """Draws the sequences of one case."""
    return Protocol(
        {c: float(recipe.other_timing[c] * rng.uniform(0.6, 1.3)) for c in CHANNELS},
        {c: float(rng.uniform(*recipe.contrast)) for c in CHANNELS},
        float(rng.uniform(*recipe.gadolinium)),
        float(rng.uniform(0.5, 1.0)),
    )


def _vessels(rng: np.random.Generator, tissue: Tissue, grid: Grid) -> np.ndarray:
    """Fraction of each voxel that is pial vessel: lines where two random fields are both zero."""
    width = 18.0
    slope = 1.66 / width  # rms gradient of a smooth field of that width, per mm and axis
    square = sum((smooth_field(rng, width, grid) / np.float32(slope * np.sqrt(2))) ** 2 for _ in range(2))
    wide = np.hypot(_VESSEL_RADIUS_MM, 0.4 * grid.spacing_mm)
    line = np.exp(-square / np.float32(2 * wide**2)) * np.float32((_VESSEL_RADIUS_MM / wide) ** 2)
    return line * np.clip(2.5 * tissue.csf, 0, 1) * (tissue.outside_mm < 0)


def _parts(tissue: Tissue, extent: Extent) -> dict[str, np.ndarray]:
    """Fractions of the six tissues after the tumour took its share, in the order of the signal tables."""
    healthy = np.clip(1 - extent.necrosis - extent.enhancing - extent.oedema, 0, 1)
    return {
        "csf": tissue.csf * healthy,
        "grey": tissue.grey * healthy,
        "white": tissue.white * healthy,
        "oedema": extent.oedema,
        "necrosis": extent.necrosis,
        "enhancing": extent.enhancing,
    }


def render(
    protocol: Protocol, seed: np.random.SeedSequence, tissue: Tissue, extent: Extent, grid: Grid
) -> dict[str, np.ndarray]:
    """Noise-free signal of every channel on ``grid``, float32, also outside the brain (bone, fat)."""
    rng = np.random.default_rng(seed)
    parts = _parts(tissue, extent)
    texture = smooth_field(rng, 5.0, grid), smooth_field(rng, 10.0, grid)
    mottle = np.float32(0.7) * (texture[0] + texture[1])
    vessels = _vessels(rng, tissue, grid)
    healthy = parts["csf"] + parts["grey"] + parts["white"]
    bone = np.clip((tissue.outside_mm - 0.5) / 1.5, 0, 1)
    fat = np.clip((tissue.outside_mm - 5.0) / 1.5, 0, 1)
    air = np.clip((tissue.outside_mm - 10.0) / 1.5, 0, 1)
    signals = {}
    for channel in CHANNELS:
        share = protocol.other_timing[channel]
        levels = (1 - share) * _SIGNAL[channel] + share * _OTHER_SIGNAL[channel]
        signal = np.zeros(grid.shape, np.float32)
        for level, (name, part) in zip(levels, parts.items(), strict=True):
            if channel == "t1c" and name == "enhancing":
                level = level + protocol.gadolinium
            sign = -1.0 if channel == "t2w" else 1.0  # what is denser is brighter on T1 and darker on T2
            signal += part * np.float32(level) * (1 + np.float32(sign * _MOTTLE[name]) * mottle)
        signal += np.float32(_DETAIL[channel] * (1 - share)) * tissue.detail * healthy
        if channel == "t1c":
            signal += np.float32(protocol.vessels * protocol.gadolinium) * vessels
        elif channel == "t2w":
            signal *= 1 - np.float32(0.5) * vessels  # flow void
        middle = np.float32(levels[1])
        signal = middle + np.float32(protocol.contrast[channel]) * (signal - middle)
        signal += bone * (np.float32(_BONE[channel]) - signal)
        signal += fat * (np.float32(_FAT[channel]) - signal)
        signals[channel] = np.maximum(signal * (1 - air), 0)
    return signals

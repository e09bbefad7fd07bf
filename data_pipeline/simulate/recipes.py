"""What the two simulated cohorts are: ranges from which every case is drawn.

Lengths are in mm, signal levels are relative to bright fluid on T2 (about 1). The source is a
high-field cohort of thin slices; the target differs as a low-field clinic differs from it: thick
slices, noise, coil shading, motion, other sequence timing, less contrast agent, late presentation with
large tumours, careless skull stripping. The ranges describe scanners and patients; they are not fitted to
any segmentation method.
"""

from __future__ import annotations

from dataclasses import dataclass

Range = tuple[float, float]


@dataclass(frozen=True)
class Recipe:
    """Ranges of one cohort. ``Range`` fields are drawn uniformly, ``*_probability`` decides by a coin."""

    name: str
    naming: str  # "brats2021" or "brats2023": file names and the value of enhancing tumour
    # tumour
    core_radius_mm: Range
    oedema_reach_mm: Range  # travel along white matter
    necrotic_fraction: Range  # of the core's volume
    multifocal_probability: float
    rim_gaps: float  # share of the enhancing rim that is missing
    non_enhancing_probability: float  # one side of the core does not enhance at all
    label_jitter_mm: float  # sd of the rater's line about the true one
    gadolinium: Range  # added T1 signal of enhancing tumour
    # sequences
    contrast: Range  # factor on every difference from the brain's mean
    other_timing: dict[str, float]  # share of the other scanner's tissue contrast, times 0.6 to 1.3
    # acquisition
    slice_thickness_mm: Range
    snr: Range  # white-matter signal over the noise of one coil channel, per acquired voxel
    bias: Range  # sd of the log coil profile
    ghost_probability: float  # per sequence
    ghost_weight: Range
    blur_mm: Range  # sd in plane
    bad_strip_probability: float


SOURCE = Recipe(
    name="source",
    naming="brats2021",
    core_radius_mm=(12, 24),
    oedema_reach_mm=(8, 18),
    necrotic_fraction=(0.15, 0.55),
    multifocal_probability=0.1,
    rim_gaps=0.06,
    non_enhancing_probability=0.2,
    label_jitter_mm=0.5,
    gadolinium=(0.45, 1.05),
    contrast=(0.90, 1.05),
    other_timing={"t1n": 0.08, "t1c": 0.08, "t2w": 0.08, "t2f": 0.08},
    slice_thickness_mm=(1.0, 1.5),
    snr=(20, 40),
    bias=(0.05, 0.13),
    ghost_probability=0.1,
    ghost_weight=(0.02, 0.06),
    blur_mm=(0.0, 0.8),
    bad_strip_probability=0.0,
)

TARGET = Recipe(
    name="target",
    naming="brats2023",
    core_radius_mm=(16, 27),
    oedema_reach_mm=(12, 26),
    necrotic_fraction=(0.25, 0.65),
    multifocal_probability=0.3,
    rim_gaps=0.12,
    non_enhancing_probability=0.25,
    label_jitter_mm=0.7,
    gadolinium=(0.30, 0.65),
    contrast=(0.80, 1.00),
    other_timing={"t1n": 0.35, "t1c": 0.35, "t2w": 0.40, "t2f": 0.45},
    slice_thickness_mm=(5.0, 6.0),
    snr=(12, 22),
    bias=(0.12, 0.24),
    ghost_probability=0.5,
    ghost_weight=(0.05, 0.13),
    blur_mm=(0.5, 1.4),
    bad_strip_probability=0.4,
)

RECIPES = {recipe.name: recipe for recipe in (SOURCE, TARGET)}

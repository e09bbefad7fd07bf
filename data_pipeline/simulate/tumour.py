"""A glioma in a head: where it sits, how far it reaches, what it pushes aside.

Shape is decided on a 3 mm lattice and evaluated on any grid, so that a case is the same patient at every
voxel size. The core is a deformed ellipsoid with an uneven enhancing rim around necrosis; oedema is what
can be reached from the core within a travel distance when white matter is fast, cortex slow and fluid closed.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from scipy import ndimage

from data_pipeline.simulate.anatomy import Tissue
from data_pipeline.simulate.grid import Grid, child, interpolate, smooth_field
from data_pipeline.simulate.recipes import Recipe

# Holds every head that can be drawn; finer would not show (fields are wider), coarser would lose the cortex.
LATTICE = Grid(3.0, (9, 4, 0), (62, 72, 52))
NECROSIS, OEDEMA, ENHANCING = 1, 2, 3  # canonical labels
_CORE, _FLOW, _RIM, _RATER = range(4)  # children of a tumour's seed
_SPECK_MM3 = 60.0  # a rater does not draw islands smaller than this


@dataclass(frozen=True)
class Lesion:
    """One focus of the core; centre in field-of-view mm."""

    centre_mm: tuple[float, float, float]
    radius_mm: float
    stretch: tuple[tuple[float, float, float], ...]  # (3, 3), determinant 1: ellipsoid to ball
    necrotic_fraction: float
    push: float  # outward displacement at the core's edge, as a share of the radius


@dataclass(frozen=True)
class Tumour:
    """Everything drawn for one patient's tumour; lengths in mm."""

    lesions: tuple[Lesion, ...]
    reach_mm: float
    rim_gaps: float
    non_enhancing_side: bool
    label_jitter_mm: float


@dataclass(frozen=True)
class Extent:
    """The tumour on a grid.

    Attributes:
      necrosis, enhancing, oedema: float32 fractions in [0, 1], with soft edges.
      labels: uint8, canonical labels as a rater draws them.
    """

    necrosis: np.ndarray
    enhancing: np.ndarray
    oedema: np.ndarray
    labels: np.ndarray


def _stretch(rng: np.random.Generator) -> tuple[tuple[float, float, float], ...]:
    axes, _ = np.linalg.qr(rng.standard_normal((3, 3)))
    log_scale = rng.normal(0, 0.16, 3)
    matrix = axes @ np.diag(np.exp(log_scale - log_scale.mean())) @ axes.T
    return tuple(tuple(float(v) for v in row) for row in matrix)


def _seeds(tissue: Tissue, mni_mm: tuple[np.ndarray, ...], radius_mm: float) -> np.ndarray:
    """Chance (unnormalised) of a core growing from each lattice voxel: deep enough cerebral white matter."""
    x, y, z = mni_mm
    white = ndimage.gaussian_filter(tissue.white, 6.0 / LATTICE.spacing_mm)
    fluid = ndimage.gaussian_filter(tissue.csf, 6.0 / LATTICE.spacing_mm)
    cerebrum = (z > -15) | ((z > -38) & (np.abs(x) > 25) & (y > -38))  # leaves out brain stem and cerebellum
    depth_mm = -tissue.outside_mm
    fits = (depth_mm > 0.6 * radius_mm) & (np.abs(x) > 0.7 * radius_mm) & (fluid < 0.25)
    return np.where(cerebrum & fits, white**2, 0.0)


def draw_tumour(
    rng: np.random.Generator, recipe: Recipe, tissue: Tissue, grid: Grid, mni_mm: tuple[np.ndarray, ...]
) -> Tumour:
    """Draws a tumour for one head.

    Args:
      rng: only this generator decides.
      recipe: the ranges of the cohort.
      tissue: healthy tissue of the head on the lattice.
      grid: that lattice.
      mni_mm: MNI coordinates of its voxels (undeformed), three arrays that broadcast to its shape.
    """
    radii = [rng.uniform(*recipe.core_radius_mm)]
    if rng.random() < recipe.multifocal_probability:
        radii.append(radii[0] * rng.uniform(0.4, 0.65))
    necrotic = rng.uniform(*recipe.necrotic_fraction)
    push = rng.uniform(0.12, 0.30)
    place = np.stack([np.broadcast_to(axis, grid.shape) for axis in grid.axes_mm()], axis=-1)
    lesions: list[Lesion] = []
    for radius in radii:
        chance = _seeds(tissue, mni_mm, radius)
        for lesion in lesions:  # another focus: clear of the first, but within reach of the same tract
            distance = np.linalg.norm(place - np.array(lesion.centre_mm, np.float32), axis=-1)
            near = lesion.radius_mm + radius
            chance = np.where((distance > near + 4) & (distance < near + 30), chance, 0.0)
        total = chance.sum()
        if total == 0:
            break  # no room for a second focus; the first always finds some
        cell = np.searchsorted(np.cumsum(chance.ravel()), rng.random() * total, side="right")
        centre = place.reshape(-1, 3)[min(cell, chance.size - 1)]
        centre = tuple(float(v) for v in centre + rng.uniform(-0.5, 0.5, 3) * grid.spacing_mm)
        lesions.append(Lesion(centre, float(radius), _stretch(rng), float(necrotic), float(push)))
    return Tumour(
        tuple(lesions),
        float(rng.uniform(*recipe.oedema_reach_mm)),
        recipe.rim_gaps,
        bool(rng.random() < recipe.non_enhancing_probability),
        recipe.label_jitter_mm,
    )


def mass_effect(tumour: Tumour, grid: Grid) -> list[np.ndarray]:
    """Pull-back displacement (mm) of tissue that the cores push away, three float32 arrays."""
    total = [np.zeros(grid.shape, np.float32) for _ in range(3)]
    for lesion in tumour.lesions:
        offset = [a - np.float32(c) for a, c in zip(grid.axes_mm(), lesion.centre_mm, strict=True)]
        ratio = np.sqrt(offset[0] ** 2 + offset[1] ** 2 + offset[2] ** 2) / np.float32(lesion.radius_mm)
        # Linear inside, so that the map stays one-to-one; fades over about a radius outside.
        gain = np.where(ratio < 1, 1.0, np.exp(-(ratio - 1) / 1.2) / np.maximum(ratio, 1)) * lesion.push
        for axis in range(3):
            total[axis] -= (gain * offset[axis]).astype(np.float32)
    return total


def _core(tumour: Tumour, rng: np.random.Generator, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Signed distance (mm, about) to the core's surface, and to the enhancing rim's inner surface."""
    bulge = 0.20 * smooth_field(rng, 22.0, grid) + 0.10 * smooth_field(rng, 11.0, grid)
    uneven = np.exp(0.40 * smooth_field(rng, 14.0, grid) + 0.25 * smooth_field(rng, 7.0, grid) - 0.11)
    surface = np.full(grid.shape, 1e3, np.float32)
    cavity = np.full(grid.shape, 1e3, np.float32)
    for lesion in tumour.lesions:
        offset = [a - np.float32(c) for a, c in zip(grid.axes_mm(), lesion.centre_mm, strict=True)]
        squared = np.zeros(grid.shape, np.float32)
        for row in lesion.stretch:
            part = sum(np.float32(weight) * o for weight, o in zip(row, offset, strict=True))
            squared += part * part
        radius = np.float32(lesion.radius_mm)
        distance = np.sqrt(squared) - radius * bulge
        rim = np.float32(1 - lesion.necrotic_fraction ** (1 / 3)) * uneven
        surface = np.minimum(surface, distance - radius)
        cavity = np.minimum(cavity, distance - radius * (1 - rim))
    return surface, cavity


def travel_mm(start: np.ndarray, slowness: np.ndarray, spacing_mm: float, limit_mm: float) -> np.ndarray:
    """Shortest travel from ``start`` through a medium, by relaxing all 26 neighbours until nothing changes.

    Args:
      start: travel already spent at each voxel; large where unknown.
      slowness: travel per mm, same shape.
      limit_mm: travel beyond this is not followed.
    """
    travel = np.minimum(start, np.float32(limit_mm)).astype(np.float32)
    half = (0.5 * spacing_mm * slowness).astype(np.float32)
    steps = [s for s in itertools.product((-1, 0, 1), repeat=3) if s > (0, 0, 0)]
    while True:
        before = travel.copy()
        for step in steps:
            one = tuple(slice(max(s, 0), n + min(s, 0)) for s, n in zip(step, travel.shape, strict=True))
            two = tuple(slice(max(-s, 0), n + min(-s, 0)) for s, n in zip(step, travel.shape, strict=True))
            cost = (half[one] + half[two]) * np.float32(np.linalg.norm(step))
            np.minimum(travel[one], travel[two] + cost, out=travel[one])
            np.minimum(travel[two], travel[one] + cost, out=travel[two])
        if np.array_equal(before, travel):
            return travel


def oedema_travel(tumour: Tumour, seed: np.random.SeedSequence, tissue: Tissue, grid: Grid) -> np.ndarray:
    """Travel (mm of white matter) from the core's surface on the lattice, negative inside the core."""
    surface, _ = _core(tumour, np.random.default_rng(child(seed, _CORE)), grid)
    flow = smooth_field(np.random.default_rng(child(seed, _FLOW)), 28.0, grid)
    speed = (0.18 + 1.1 * tissue.white**1.5) * np.exp(0.30 * flow)
    speed = np.where((tissue.csf > 0.6) | (tissue.outside_mm > 0), 0.04, speed)
    near = np.where(surface < grid.spacing_mm, np.maximum(surface, 0) / speed, np.inf)
    travel = travel_mm(near, 1 / speed, grid.spacing_mm, tumour.reach_mm + 10)
    return np.where(surface < 0, np.maximum(surface, -6), travel).astype(np.float32)


def _inside(distance: np.ndarray, width_mm: float) -> np.ndarray:
    """1 inside (negative distance), 0 outside, over a few widths."""
    return 1 / (1 + np.exp(np.clip(distance / np.float32(width_mm), -30, 30)))


def grow(tumour: Tumour, seed: np.random.SeedSequence, travel: np.ndarray, tissue: Tissue, grid: Grid) -> Extent:
    """Evaluates the tumour on ``grid``.

    Args:
      tumour: as drawn.
      seed: the same seed that ``oedema_travel`` was given.
      travel: result of ``oedema_travel`` on ``LATTICE``.
      tissue: tissue on ``grid`` after the mass effect.
    """
    surface, cavity = _core(tumour, np.random.default_rng(child(seed, _CORE)), grid)
    first = tuple(LATTICE.axis_mm(axis)[0] for axis in range(3))
    travel = interpolate(travel, first, LATTICE.spacing_mm, grid)
    # Fluid and the brain's surface stop a core; cortex keeps its own contour against oedema.
    wall = 4 * np.clip(tissue.csf - 0.5, 0, 0.5) + np.clip(tissue.outside_mm + 1, 0, 4)
    surface, cavity = surface + wall, cavity + wall
    spread = travel - tumour.reach_mm + 6 * np.clip(tissue.outside_mm + 1, 0, 4)
    spread += 7 * np.clip(tissue.grey - 0.35, 0, 1) + 60 * np.clip(tissue.csf - 0.4, 0, 1)

    rim_rng = np.random.default_rng(child(seed, _RIM))
    gaps, side = smooth_field(rim_rng, 9.0, grid), smooth_field(rim_rng, 45.0, grid)
    # Gaps and a silent side are where the cavity's surface comes up to the core's.
    gap = gaps - np.float32(NormalDist().inv_cdf(1 - tumour.rim_gaps))
    if tumour.non_enhancing_side:
        gap = np.maximum(gap, side - 0.5)
    cavity = np.where(surface < 0, cavity - np.float32(15.0) * np.clip(gap, 0, 0.8), cavity)

    jitter_rng = np.random.default_rng(child(seed, _RATER))
    jitter = [tumour.label_jitter_mm * smooth_field(jitter_rng, 9.0, grid) for _ in range(3)]
    soft = 0.35 + 0.2 * grid.spacing_mm
    core, hollow = _inside(surface, soft), _inside(cavity, soft)
    oedema = _inside(spread, 2 * soft) * (1 - core)
    labels = _labels(surface + jitter[0], cavity + jitter[1], spread + jitter[2], tissue, grid)
    return Extent(core * hollow, core * (1 - hollow), oedema, labels)


def _labels(surface: np.ndarray, cavity: np.ndarray, spread: np.ndarray, tissue: Tissue, grid: Grid) -> np.ndarray:
    """What a rater draws: whole voxels, inside the brain, without specks."""
    brain = tissue.outside_mm < 0
    core = _without_specks((surface < 0) & brain, grid)
    whole = _without_specks((core | (spread < 0)) & brain, grid)
    whole = brain & ~_without_specks(~whole, grid)  # nor holes
    labels = np.zeros(grid.shape, np.uint8)
    labels[whole] = OEDEMA
    labels[core] = np.where(cavity < 0, NECROSIS, ENHANCING)[core]
    return labels


def _without_specks(mask: np.ndarray, grid: Grid) -> np.ndarray:
    parts, count = ndimage.label(mask)
    size = np.bincount(parts.ravel(), minlength=count + 1) * grid.spacing_mm**3
    keep = size >= _SPECK_MM3
    keep[0] = False
    return keep[parts]

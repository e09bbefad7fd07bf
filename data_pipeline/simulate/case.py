"""One simulated patient: a head, a tumour, an examination."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from data_pipeline.cohorts import CHANNELS
from data_pipeline.simulate import anatomy, artefacts, contrast, tumour
from data_pipeline.simulate.grid import Grid, child, whole_grid
from data_pipeline.simulate.recipes import Recipe

# Children of a case's seed: what is drawn in one stage does not shift what is drawn in another.
_HEAD, _BEND, _TUMOUR, _SHAPE, _PROTOCOL, _RENDER, _SCANS, _STRIP, _MASK, _ACQUIRE = range(10)
_MARGIN_MM = 9.0  # room about the brain, for what a bad skull strip leaves behind


@dataclass(frozen=True)
class SimulatedCase:
    """A simulated examination.

    Attributes:
      grid: the whole field of view.
      images: {channel: int16 array of the grid's shape}, 0 outside the stripped brain.
      labels: uint8, canonical labels, on the same grid.
      record: everything drawn, and the volumes that came out (mL), as JSON-able values.
    """

    grid: Grid
    images: dict[str, np.ndarray]
    labels: np.ndarray
    record: dict


def case_seed(seed: int, recipe: Recipe, index: int) -> np.random.SeedSequence:
    """The seed of case ``index`` of a cohort; cohorts never share one."""
    cohort = int.from_bytes(recipe.name.encode(), "big") % 2**32
    return np.random.SeedSequence(seed, spawn_key=(cohort, index))


def simulate_case(recipe: Recipe, seed: np.random.SeedSequence, spacing_mm: float) -> SimulatedCase:
    """Simulates one examination. Pure: the same arguments give the same arrays, bit for bit.

    Args:
      recipe: the cohort's ranges.
      seed: see ``case_seed``. Head and tumour do not depend on the voxel size, noise does.
      spacing_mm: edge of the cubic voxels.

    Raises:
      ModuleNotFoundError: nilearn is not installed.
    """

    def generator(stage: int) -> np.random.Generator:
        return np.random.default_rng(child(seed, stage))

    head = anatomy.draw_head(generator(_HEAD))
    grown, travel, brain = _plan(recipe, seed, head)
    view = whole_grid(spacing_mm)
    grid = tumour.LATTICE.box(brain, _MARGIN_MM, view)
    displacement = _displacement(generator(_BEND), head, grown, grid)
    tissue = anatomy.sample(anatomy.load_template(spacing_mm), head, displacement, grid)
    del displacement
    extent = tumour.grow(grown, child(seed, _SHAPE), travel, tissue, grid)
    protocol = contrast.draw_protocol(generator(_PROTOCOL), recipe)
    scans = artefacts.draw_scans(generator(_SCANS), recipe)
    strip = artefacts.draw_strip(generator(_STRIP), recipe)
    mask = artefacts.brain_mask(strip, child(seed, _MASK), tissue, grid)
    inside = grid.slices_in(view)
    images = {}
    signals = contrast.render(protocol, child(seed, _RENDER), tissue, extent, grid)
    for number, channel in enumerate(CHANNELS):
        noise_seed = child(child(seed, _ACQUIRE), number)
        images[channel] = np.zeros(view.shape, np.int16)
        images[channel][inside] = artefacts.acquire(scans[channel], noise_seed, signals.pop(channel), mask, grid)
    labels = np.zeros(view.shape, np.uint8)
    labels[inside] = np.where(mask, extent.labels, 0)
    drawn = {"head": head, "tumour": grown, "protocol": protocol, "strip": strip}
    record = {name: dataclasses.asdict(part) for name, part in drawn.items()}
    record["scans"] = {channel: dataclasses.asdict(scan) for channel, scan in scans.items()}
    record["volumes_ml"] = volumes_ml(labels, mask, spacing_mm)
    return SimulatedCase(view, images, labels, record)


def volumes_ml(labels: np.ndarray, mask: np.ndarray, spacing_mm: float) -> dict[str, float]:
    """Volume of the stripped brain and of each label, in millilitres."""
    names = {"necrosis": tumour.NECROSIS, "oedema": tumour.OEDEMA, "enhancing": tumour.ENHANCING}
    voxel_ml = spacing_mm**3 / 1000
    counts = {"brain": np.count_nonzero(mask)} | {n: np.count_nonzero(labels == v) for n, v in names.items()}
    return {name: round(float(count) * voxel_ml, 3) for name, count in counts.items()}


def _displacement(
    rng: np.random.Generator, head: anatomy.Head, grown: tumour.Tumour | None, grid: Grid
) -> list[np.ndarray]:
    displacement = anatomy.bend(rng, head, grid)
    if grown is not None:
        for total, pushed in zip(displacement, tumour.mass_effect(grown, grid), strict=True):
            total += pushed
    return displacement


def _plan(
    recipe: Recipe, seed: np.random.SeedSequence, head: anatomy.Head
) -> tuple[tumour.Tumour, np.ndarray, np.ndarray]:
    """Draws the tumour and its oedema on the lattice: (tumour, travel, brain mask)."""
    lattice = tumour.LATTICE
    template = anatomy.load_template(lattice.spacing_mm)

    def tissue(grown: tumour.Tumour | None) -> anatomy.Tissue:
        rng = np.random.default_rng(child(seed, _BEND))
        return anatomy.sample(template, head, _displacement(rng, head, grown, lattice), lattice)

    matrix, offset = anatomy.view_to_mni(head)
    axes = lattice.axes_mm()
    mni = tuple(sum(matrix[r, c] * axes[c] for c in range(3)) + offset[r] for r in range(3))
    rng = np.random.default_rng(child(seed, _TUMOUR))
    grown = tumour.draw_tumour(rng, recipe, tissue(None), lattice, mni)
    pushed = tissue(grown)
    travel = tumour.oedema_travel(grown, child(seed, _SHAPE), pushed, lattice)
    return grown, travel, pushed.outside_mm < 0

"""Cohorts of simulated cases on disk, in the layout, names, label values and geometry of the real ones."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np

from data_pipeline import atomic, labels, parallel
from data_pipeline.simulate import anatomy
from data_pipeline.simulate.case import SimulatedCase, case_seed, simulate_case
from data_pipeline.simulate.recipes import RECIPES, Recipe

# Raise it with every change that alters a voxel: a folder never mixes cases of two simulators.
SIMULATOR_VERSION = 1
COHORT_FILE = "cohort.json"
CASE_FILE = "simulated.json"  # in the case's own folder, so that the word travels with the images
SPACING_RANGE_MM = (0.8, 6.0)  # MNI152 holds nothing finer; coarser loses the rim of a tumour
NOTICE = (
    "Simulated images on the MNI152 anatomy: no patient was scanned. A test bed for software and protocol, "
    "not evidence about patients; not for clinical use."
)
_SUFFIXES = {
    "brats2021": {"t1n": "_t1", "t1c": "_t1ce", "t2w": "_t2", "t2f": "_flair", "seg": "_seg"},
    "brats2023": {name: f"-{name}" for name in ("t1n", "t1c", "t2w", "t2f", "seg")},
}


def case_id(recipe: Recipe, index: int) -> str:
    """Name of case ``index``: from ``BraTS2021_00000`` or ``BraTS-SSA-00002-000`` (as the real ones) on."""
    if recipe.naming == "brats2021":
        return f"BraTS2021_{index:05d}"
    return f"BraTS-SSA-{index + 2:05d}-000"


def simulate(
    output: str | Path,
    source_cases: int = 96,
    target_cases: int = 58,
    spacing_mm: float = 3.0,
    seed: int = 0,
    workers: int | None = None,
) -> list[Path]:
    """Writes the cohorts ``<output>/source`` (BraTS-2021 layout) and ``<output>/target`` (BraTS-SSA layout).

    Each holds one folder per case and, when whole, ``cohort.json`` with everything drawn. Cases that are
    already there are kept, so a stopped run goes on where it was, and a larger number adds cases. Case i
    depends on seed and voxel size alone; its files are the same, byte for byte, on every run with the same
    library versions.

    Args:
      output: folder; made if missing.
      source_cases, target_cases: number of cases; 0 leaves that cohort out.
      spacing_mm: edge of the cubic voxels; 1.0 is the full 240 x 240 x 155 grid.
      seed: 0 or more.
      workers: processes; None takes one per core, 1 stays in this one.

    Returns:
      The folders of the cohorts.

    Raises:
      ValueError: an argument out of range, or a folder that holds other data.
      ModuleNotFoundError: nilearn is not installed.
    """
    counts = {"source": source_cases, "target": target_cases}
    _check(counts, spacing_mm, seed)
    anatomy.check_installed()  # here, before anything is written
    recipes = [RECIPES[name] for name, count in counts.items() if count]
    folders = [Path(output) / recipe.name for recipe in recipes]
    settings = [_settings(recipe, float(spacing_mm), seed) for recipe in recipes]
    for folder, setting in zip(folders, settings, strict=True):
        _claim(folder, setting)
    missing = [
        (recipe, index)
        for recipe, folder in zip(recipes, folders, strict=True)
        for index in range(counts[recipe.name])
        if not (folder / case_id(recipe, index)).is_dir()
    ]
    job = functools.partial(_write_case, Path(output), float(spacing_mm), seed)
    parallel.run(job, missing, workers=workers, title="simulate")
    for folder, setting in zip(folders, settings, strict=True):
        cases = {path.parent.name: json.loads(path.read_text()) for path in sorted(folder.glob(f"*/{CASE_FILE}"))}
        atomic.write_json(folder / COHORT_FILE, {**setting, "cases": cases})
    return folders


def _check(counts: dict[str, int], spacing_mm: float, seed: int) -> None:
    low, high = SPACING_RANGE_MM
    if not low <= spacing_mm <= high:
        raise ValueError(f"spacing_mm is {spacing_mm:g}: it must be from {low:g} to {high:g}")
    for name, value in (("source_cases", counts["source"]), ("target_cases", counts["target"]), ("seed", seed)):
        if value < 0:
            raise ValueError(f"{name} is {value}: it must be 0 or more")
    if not any(counts.values()):
        raise ValueError("no case to simulate: source_cases and target_cases are both 0")


def _settings(recipe: Recipe, spacing_mm: float, seed: int) -> dict:
    """What all cases of a cohort share, as it comes back from a JSON file."""
    settings = {
        "simulated": True,
        "notice": NOTICE,
        "simulator_version": SIMULATOR_VERSION,
        "cohort": recipe.name,
        "seed": seed,
        "spacing_mm": spacing_mm,
        "recipe": dataclasses.asdict(recipe),
    }
    return json.loads(json.dumps(settings))


def _claim(folder: Path, settings: dict) -> None:
    """Makes the folder ours, or checks that it already is: never mixes two cohorts, never touches real data."""
    path = folder / COHORT_FILE
    if not path.exists():
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"{folder} holds files but no {COHORT_FILE}: choose another output folder")
        folder.mkdir(parents=True, exist_ok=True)
        atomic.write_json(path, settings)
        return
    try:
        old = dict(json.loads(path.read_text()))
    except (ValueError, TypeError):
        raise ValueError(f"{path} is damaged: delete {folder} and simulate again") from None
    for field, value in settings.items():
        if old.get(field) != value:
            values = "" if isinstance(value, dict | str) else f" ({old.get(field)}, not {value})"
            text = f"{folder} holds a cohort with another {field}{values}"
            raise ValueError(f"{text}: choose another output folder or delete this one")


def _write_case(output: Path, spacing_mm: float, seed: int, wanted: tuple[Recipe, int]) -> None:
    """Simulates a case and writes its folder: under a hidden name first, so that it is whole or absent."""
    recipe, index = wanted
    case = simulate_case(recipe, case_seed(seed, recipe, index), spacing_mm)
    name = case_id(recipe, index)
    hidden = output / recipe.name / f".{name}.tmp"
    shutil.rmtree(hidden, ignore_errors=True)
    hidden.mkdir()
    for file_name, data in _files(case, recipe, name).items():
        (hidden / file_name).write_bytes(data)
    atomic.write_json(hidden / CASE_FILE, {"simulated": True, "simulator_version": SIMULATOR_VERSION, **case.record})
    hidden.rename(output / recipe.name / name)


def _files(case: SimulatedCase, recipe: Recipe, name: str) -> dict[str, bytes]:
    """{file name: content} of a case, compressed without a time stamp."""
    arrays = {**case.images, "seg": labels.from_canonical(case.labels, recipe.naming)}
    return {
        f"{name}{_SUFFIXES[recipe.naming][content]}.nii.gz": gzip.compress(
            _nifti(array, case.grid.affine()), compresslevel=3, mtime=0
        )
        for content, array in arrays.items()
    }


def _nifti(array: np.ndarray, affine: np.ndarray) -> bytes:
    image = nib.Nifti1Image(array, affine)
    image.set_qform(affine, code=1)  # scanner space, as in the real files
    image.set_sform(affine, code=1)
    image.header.set_xyzt_units("mm")
    image.header.set_slope_inter(1, 0)  # stored values are the values
    image.header["descrip"] = f"simulated, mednext-jax simulator {SIMULATOR_VERSION}".encode()
    return image.to_bytes()

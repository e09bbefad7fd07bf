"""Cohorts with one fault of the released study put in, so that an ablation can measure what it did.

The faults are in the files, so that every other command treats a faulty cohort like any other.
Source: CAMERA-MRI/SPARK2024, PEFT_MedNeXt (see docs/faults.md).
"""

import gzip
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

from data_pipeline import atomic, cohorts, nifti

# Pre-training stacked FLAIR, T1, T1ce, T2 and fine-tuning T1ce, T1, FLAIR, T2: two of four change places.
SWAPPED = {"t1c": "t2f", "t2f": "t1c"}
FAULTS = ("permuted_channels", "squeezed")


def permute_channels(input_folder: str | Path, output: str | Path) -> None:
    """Makes a cohort of links in which the T1ce carries the FLAIR's name and the reverse."""
    for case in cohorts.scan(input_folder):
        for channel, file in case.images.items():
            _link(case.images[SWAPPED.get(channel, channel)], Path(output) / case.case_id / file.name)
        if case.segmentation:
            _link(case.segmentation, Path(output) / case.case_id / case.segmentation.name)


def squeeze(input_folder: str | Path, output: str | Path, voxels: Sequence[int]) -> None:
    """Makes a cohort of whole volumes resized to ``voxels``: images linear without anti-aliasing, labels nearest.

    Cases that are there already are kept.

    Raises:
      ValueError: ``voxels`` is not three positive sizes, or a file is no usable volume.
    """
    if len(voxels) != 3 or min(voxels) < 1:
        raise ValueError(f"{tuple(voxels)} is no size of a volume: three positive numbers are needed")
    for case in cohorts.scan(input_folder):
        files = [(file, 1) for file in case.images.values()]
        files += [(case.segmentation, 0)] if case.segmentation else []
        for file, order in files:
            target = Path(output) / case.case_id / file.name
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                _resize(file, target, voxels, order)


def _resize(file: Path, target: Path, voxels: Sequence[int], order: int) -> None:
    volume = nifti.read(file)
    factors = np.array(voxels) / volume.array.shape
    array = volume.array.astype(np.float32) if order else volume.array
    resized = ndimage.zoom(array, factors, order=order, mode="nearest", grid_mode=True)
    scale = np.eye(4)
    scale[:3, :3] = np.diag(1 / factors)
    scale[:3, 3] = (1 / factors - 1) / 2  # the volume's outer faces stay where they were
    data = nib.Nifti1Image(resized, volume.affine @ scale).to_bytes()
    atomic.write_bytes(target, gzip.compress(data, 1, mtime=0) if target.name.endswith(".gz") else data)


def _link(source: Path, link: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.exists():
        link.symlink_to(source.resolve())

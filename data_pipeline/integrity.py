"""Finds everything that is wrong with a cohort before it is used: all problems of all cases in one pass."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np

from data_pipeline import cohorts, labels, nifti, parallel
from data_pipeline.cohorts import Case, Problem, shown

TOLERANCE_MM = 0.1
# Skull-stripped volumes of a whole head are mostly background; brain-mask statistics need one.
_LARGEST_BRAIN_FRACTION = 0.9


@dataclass
class Examined:
    """A case as read: usable when no problem is more than a warning.

    Attributes:
      images: {channel: volume}, arrays float32, in the order of ``CHANNELS``.
      label: canonical uint8 label map on the images' grid, or None.
      problems: what was found, in the order of the files.
    """

    images: dict[str, nifti.Volume] = field(default_factory=dict)
    label: np.ndarray | None = None
    problems: list[Problem] = field(default_factory=list)

    @property
    def serious(self) -> list[Problem]:
        """Problems that keep the case from being used."""
        return [problem for problem in self.problems if not problem.warning]


def examine(case: Case, label_map: Mapping[int, int] | None = None) -> Examined:
    """Reads all files of a case and checks them, alone and against each other.

    Args:
      label_map: {value in the file: canonical label}, see ``labels.to_canonical``.
    """
    found = Examined()

    def report(kind: str, message: str, warning: bool = False) -> None:
        found.problems.append(Problem(case.case_id, kind, message, warning))

    for channel, path in case.images.items():
        try:
            volume = nifti.read(path)
        except nifti.NiftiError as error:
            report(error.kind, str(error))
            continue
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes Inf and is reported as such
            image = volume.array.astype(np.float32)
        found.images[channel] = nifti.Volume(path, image, volume.affine, volume.header)
        _check_intensities(path, image, report)
    segmentation = _read_label(case, label_map, found, report) if case.segmentation is not None else None
    _check_grids([*found.images.values(), *([segmentation] if segmentation else [])], report)
    if found.serious:
        return found
    _check_brain(case, found, report)
    return found


def check(
    folder: str | Path,
    *,
    label_map: Mapping[int, int] | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> list[Problem]:
    """Every problem of every case below ``folder``, ordered by case; also warnings (``Problem.warning``).

    Args:
      label_map: {value in the file: canonical label} that the user vouches for.
      workers: processes; None takes all cores, 1 stays in this process.
      progress: show a bar, or lines where there is no terminal.

    Raises:
      FileNotFoundError: no such folder.
      ValueError: an impossible label map.
    """
    label_map = labels.check_label_map(label_map)
    cases, problems = cohorts.survey(folder)
    if not cases and not problems:
        text = f"no BraTS case in {shown(folder)}; files must be named like {cohorts.EXAMPLES}"
        return [Problem("", "no case", text)]
    found = parallel.run(
        partial(_problems, label_map=label_map), cases, workers=workers, title="check", progress=progress
    )
    return sorted(problems + [problem for case in found for problem in case], key=lambda p: p.case_id)


def _problems(case: Case, label_map: Mapping[int, int]) -> list[Problem]:
    return examine(case, label_map).problems


def _check_intensities(path: Path, image: np.ndarray, report) -> None:
    wrong = image.size - int(np.count_nonzero(np.isfinite(image)))
    if wrong:
        text = f"{wrong} voxels are NaN, infinite or beyond float32"
        report("NaN or Inf", f"{shown(path)}: {text}; export it again")
        return
    inside = image[image != 0]
    if inside.size == 0:
        report("constant image", f"{shown(path)}: every voxel is 0; export it again")
    elif inside.min() == inside.max():
        report("constant image", f"{shown(path)}: every voxel but 0 is {inside[0]:g}; export it again")


def _read_label(
    case: Case, label_map: Mapping[int, int] | None, found: Examined, report
) -> nifti.Volume | None:
    """Reads the segmentation into ``found.label``; returns its volume for the comparison of grids."""
    try:
        volume = nifti.read(case.segmentation)
    except nifti.NiftiError as error:
        report(error.kind, str(error))
        return None
    try:
        found.label = labels.to_canonical(volume.array, case.naming, label_map, shown(case.segmentation))
    except ValueError as error:
        report("unknown label value", str(error))
    return volume


def _check_grids(volumes: list[nifti.Volume], report) -> None:
    """All files of a case must lie on one grid: the first file's."""
    for volume in volumes[1:]:
        first = volumes[0]
        if volume.array.shape != first.array.shape:
            text = f"{shown(volume.path)} is {volume.array.shape}, {shown(first.path)} is {first.array.shape}"
            report("shapes differ", f"{text}; resample them to one grid")
            continue
        apart = displacement_mm(first.affine, volume.affine, first.array.shape)
        if apart > TOLERANCE_MM:
            text = f"{shown(volume.path)} lies {apart:.3g} mm off {shown(first.path)}"
            axes = ["".join(nib.aff2axcodes(v.affine)) for v in (volume, first)]
            turned = f", axes {axes[0]} against {axes[1]}" if axes[0] != axes[1] else ""
            remedy = "register the images or correct the header"
            report("affines differ", f"{text} (tolerance {TOLERANCE_MM} mm{turned}); {remedy}")


def displacement_mm(first: np.ndarray, second: np.ndarray, shape: tuple[int, ...]) -> float:
    """Largest distance in mm between the places two affines give to a corner of a volume of ``shape``."""
    corners = np.array(np.meshgrid(*[(0, size - 1) for size in shape], [1], indexing="ij")).reshape(4, -1)
    return float(np.linalg.norm(((first - second) @ corners)[:3], axis=0).max())


def _check_brain(case: Case, found: Examined, report) -> None:
    """Warnings about a case that can be used."""
    images = list(found.images.values())
    for number, volume in enumerate(images):
        first = next((other for other in images[:number] if np.array_equal(other.array, volume.array)), None)
        if first is not None:
            files = f"{shown(first.path)} and {shown(volume.path)}"
            report("identical images", f"{files} hold the same voxels: is one a copy under a wrong name?", warning=True)
    if found.label is not None and not found.label.any():
        text = f"{shown(case.segmentation)} holds no tumour voxel: is it the right file?"
        report("empty segmentation", text, warning=True)
    brain = np.zeros(next(iter(found.images.values())).array.shape, bool)
    for volume in found.images.values():
        brain |= volume.array != 0
    if brain.mean() > _LARGEST_BRAIN_FRACTION:
        text = f"{brain.mean():.0%} of the voxels are not 0: are the images skull-stripped?"
        report("no background", f"{text} (statistics are taken over the brain)", warning=True)
    outside = 0 if found.label is None else int(np.count_nonzero(found.label[~brain]))
    if outside:
        text = f"{outside} tumour voxels of {shown(case.segmentation)} lie where all images are 0"
        report("tumour outside brain", text, warning=True)

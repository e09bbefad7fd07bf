"""Folders of label maps (NIfTI), from any tool: finding cases, reading, label schemes, geometry.

A folder is either one of predictions, `<case_id>.nii.gz` or `.nii`, or one of BraTS cases as downloaded, in
which the segmentations are the files whose names end in `-seg` or `_seg`, at any depth.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

_EXTENSION = re.compile(r"\.nii(\.gz)?$", re.IGNORECASE)
_SEGMENTATION = re.compile(r"[-_]seg$", re.IGNORECASE)
Schemes = Mapping[str, Mapping[int, int]]


@dataclass(frozen=True)
class Inspection:
    """What is known of one file before anything is measured.

    Attributes:
      shape: (D, H, W) voxels.  affine: (4, 4) voxel to mm.  spacing_mm: per array axis.
      values: the label values present.
      sha256: of the file as it lies on disk.
    """

    shape: tuple[int, int, int]
    affine: np.ndarray
    spacing_mm: tuple[float, float, float]
    values: tuple[int, ...]
    sha256: str


def find(folder: str | Path) -> dict[str, Path]:
    """Case id to label file, ordered by case id.

    Raises:
      FileNotFoundError: no such folder.
      ValueError: it holds no NIfTI file, or two for one case.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    files = [p for p in sorted(folder.rglob("*")) if _EXTENSION.search(p.name) and not p.name.startswith(".")]
    files = [p for p in files if p.is_file() or _held_file(p)]
    segmentations = [p for p in files if _SEGMENTATION.search(_stem(p))]
    chosen = segmentations or [p for p in files if p.parent == folder] or files
    cases: dict[str, Path] = {}
    ids, taken = {_SEGMENTATION.sub("", _stem(path)) for path in chosen}, set(chosen)
    chosen += [p for p in files if p not in taken and _stem(p) in ids]  # another label map of the same case
    for path in chosen:
        case_id = _SEGMENTATION.sub("", _stem(path))
        path = path if path.is_file() else _held_file(path)
        if case_id in cases:
            raise ValueError(f"case {case_id} is there twice: {cases[case_id]} and {path}; take one away")
        cases[case_id] = path
    if not cases:
        raise ValueError(f"{folder}: no label map found; name files <case_id>.nii.gz or *-seg.nii.gz")
    return dict(sorted(cases.items()))


def _stem(path: Path) -> str:
    return _EXTENSION.sub("", path.name)


def _held_file(path: Path) -> Path | None:
    """The one NIfTI in a folder that itself bears a file's name, as some archives unpack; else None."""
    inside = [p for p in path.iterdir() if _EXTENSION.search(p.name) and p.is_file()] if path.is_dir() else []
    return inside[0] if len(inside) == 1 else None


def read(path: str | Path, relabel: Mapping[int, int] | None = None) -> np.ndarray:
    """Labels of one file, (D, H, W) uint8 (int32 if a value does not fit), in the file's own voxel order.

    Args:
      path: NIfTI file.
      relabel: value in the file to label; every value present must be in it. None leaves the values.

    Raises:
      ValueError: not a readable 3-D NIfTI of whole, non-negative numbers; the message names the file.
    """
    labels = _labels(_load(path), path)
    if relabel is None:
        return labels
    return lookup(labels, relabel)


def lookup(labels: np.ndarray, relabel: Mapping[int, int]) -> np.ndarray:
    """Applies {value: label} to an array whose values are all keys; returns uint8 (int32 if needed)."""
    top = max(relabel.values(), default=0)
    table = np.zeros(max(int(labels.max(initial=0)), *relabel, 0) + 1, np.uint8 if top < 256 else np.int32)
    for value, label in relabel.items():
        table[value] = label
    return table[labels]


def inspect(path: str | Path) -> Inspection:
    """Reads one file for its geometry, values and hash; raises as `read` does."""
    image = _load(path)
    labels = _labels(image, path)
    values = np.flatnonzero(np.bincount(labels.ravel())) if labels.dtype == np.uint8 else np.unique(labels)
    return Inspection(
        shape=labels.shape,
        affine=image.affine,
        spacing_mm=tuple(float(z) for z in image.header.get_zooms()[:3]),
        values=tuple(int(v) for v in values),
        sha256=hashlib.sha256(Path(path).read_bytes()).hexdigest(),
    )


def _load(path: str | Path):
    try:
        return nib.load(path)
    except (nib.filebasedimages.ImageFileError, OSError, EOFError) as error:
        raise ValueError(f"{path}: not a readable NIfTI file ({error})") from error


def _labels(image, path) -> np.ndarray:
    try:
        values = np.asanyarray(image.dataobj)
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"{path}: broken or cut short ({error}); write or download it again") from error
    while values.ndim > 3 and values.shape[-1] == 1:
        values = values[..., 0]
    if values.ndim != 3:
        raise ValueError(f"{path}: shape {values.shape}; a label map must have three dimensions")
    if values.dtype.kind == "f":  # a scaling factor in the header leaves rounding errors
        rounded = np.rint(values)
        values = rounded if np.allclose(values, rounded, rtol=0, atol=1e-3) else values
    with np.errstate(invalid="ignore", over="ignore"):
        for dtype in (np.uint8, np.int32):
            labels = values.astype(dtype)
            if np.array_equal(labels, values) and labels.min(initial=0) >= 0:
                return labels
    raise ValueError(f"{path}: values are not whole numbers from 0 on; is it an image or a probability?")


def geometry_problem(pred: Inspection, truth: Inspection, tolerance_mm: float) -> str | None:
    """Why two maps do not lie on one grid, or None: shapes equal, grid corners within `tolerance_mm`."""
    if pred.shape != truth.shape:
        shapes = f"prediction has shape {pred.shape}, reference {truth.shape}"
        return f"{shapes}: bring the prediction to the reference's grid"
    last = np.subtract(truth.shape, 1)
    corners = np.array([(*np.multiply(c, last), 1) for c in np.ndindex(2, 2, 2)], float)
    apart = np.linalg.norm(corners @ (pred.affine - truth.affine).T, axis=1).max()
    if not apart <= tolerance_mm:
        codes = ["".join(nib.aff2axcodes(x.affine)) for x in (pred, truth)]
        turned = f" (axes {codes[0]} and {codes[1]})" if codes[0] != codes[1] else ""
        return (
            f"prediction and reference lie up to {apart:.4g} mm apart{turned}, allowed are {tolerance_mm:g}: "
            "write the prediction with the reference's affine; for a wrong header raise --affine_tolerance_mm"
        )
    return None


def detect_scheme(
    folder: str, values: Mapping[str, Iterable[int]], schemes: Schemes, naming: Callable[[str], str | None]
) -> tuple[str, dict[int, int]]:
    """Label scheme of a folder, from all values found in it and the cases' names, and its {value: label}.

    A folder may mix schemes where the names say so: each case that holds a value of an older scheme must then be
    named as in it. The schemes are taken together, so they must not give one value two meanings.

    Args:
      folder: what to call it in errors.
      values: case id to the values in its file.
      schemes: scheme name to {value in the file: label}; the last one is the current scheme.
      naming: case id to the scheme its name stands for, or None.

    Raises:
      ValueError: no scheme knows all values, or an older scheme would have to be guessed for a new name.
    """
    found = {v for present in values.values() for v in present}
    fitting = [name for name, table in schemes.items() if found <= set(table)]
    current = list(schemes)[-1]
    if current in fitting:
        return current, dict(schemes[current])
    known = set(schemes[current])
    odd = [c for c, present in values.items() if not known.issuperset(present)]
    remedy = ("say what they mean: --labels=NAME=SCHEME, or value by value as in "
              "--labels=references=1:1,2:2,3:3,4:3, or give --regions")
    own = {case: naming(case) for case in odd}
    if not fitting and all(own[case] in schemes and set(schemes[own[case]]).issuperset(values[case]) for case in odd):
        tables = [schemes[name] for name in schemes if name == current or name in own.values()]
        together = {value: label for table in tables for value, label in table.items()}
        if all(table.items() <= together.items() for table in tables):
            counts = {name: sum(n == name for n in own.values()) for name in schemes if name != current}
            parts = [f"{name} in {count} cases" for name, count in counts.items() if count]
            return f"{current}, {', '.join(parts)}", together
    if not fitting:
        listed = "; ".join(f"{name} has {', '.join(map(str, sorted(t)))}" for name, t in schemes.items())
        strange = f"label values {sorted(found)} fit no scheme (first in case {odd[0]}; {listed})"
        raise ValueError(f"{folder}: {strange}; {remedy}")
    if named := [c for c in odd if naming(c) == current]:
        strange = f"is named as in {current}, which has no label {sorted(found - known)}"
        raise ValueError(f"{folder}: case {named[0]} {strange}; {remedy}")
    return fitting[-1], dict(schemes[fitting[-1]])

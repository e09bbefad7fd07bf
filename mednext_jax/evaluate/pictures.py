"""Overlay pictures of a case in three planes: scan, truth, prediction, errors."""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import nibabel as nib
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from mednext_jax.evaluate import overlap, palette

PLANES = ("sagittal", "coronal", "axial")  # the RAS axis each one cuts
CHANNELS = ("t2f", "flair", "t1c", "t1ce", "t2w", "t2", "t1n", "t1")  # the first one found is shown
_EXTENSION = re.compile(r"\.nii(\.gz)?$", re.IGNORECASE)
_BACKGROUND = 0.0


@dataclass(frozen=True)
class View:
    """A case in RAS voxel order: x to the right, y to the front, z to the top of the patient.

    Attributes:
      image: (X, Y, Z) float32 from 0 to 1, or None without a scan.
      truth, pred: (X, Y, Z) labels.
      spacing_mm: of the three axes.
      channel: which scan it is.
    """

    image: np.ndarray | None
    truth: np.ndarray
    pred: np.ndarray
    spacing_mm: tuple[float, float, float]
    channel: str


def find_scan(case_id: str, folders: Sequence[Path]) -> tuple[str, Path] | None:
    """(channel, file) of the scan to show behind a case's labels: `<case_id>-t2f.nii.gz` and the like."""
    found: dict[str, Path] = {}
    for folder in folders:
        for path in sorted(folder.rglob(f"{glob_escape(case_id)}[-_]*.nii*")):
            channel = _EXTENSION.sub("", path.name)[len(case_id) + 1 :].lower()
            if path.is_file() and channel in CHANNELS:
                found.setdefault(channel, path)
    return next(((c, found[c]) for c in CHANNELS if c in found), None)


def glob_escape(text: str) -> str:
    """Text with the special characters of a glob pattern taken literally."""
    return re.sub(r"([*?[])", r"[\1]", text)


def view(pred: np.ndarray, truth: np.ndarray, affine: np.ndarray, scan: tuple[str, Path] | None) -> View:
    """Turns labels (D, H, W) and the scan (if it has their shape) to RAS order."""
    orientation = nib.orientations.io_orientation(affine)
    image, channel = None, "no scan found"
    if scan is not None:
        try:
            values = np.asarray(nib.load(scan[1]).dataobj, dtype=np.float32)
        except (OSError, EOFError, ValueError, nib.filebasedimages.ImageFileError):
            values = np.zeros(0)  # a picture without its scan is better than no report
        if values.shape == truth.shape:
            image, channel = turned(_window(values), orientation), scan[0]
        else:
            channel = f"{scan[0]} does not fit" if values.size else f"{scan[0]} is broken"
    spacing = nib.affines.voxel_sizes(affine @ nib.orientations.inv_ornt_aff(orientation, truth.shape))
    return View(image, turned(truth, orientation), turned(pred, orientation), tuple(spacing), channel)


def overlay_png(seen: View, regions: Mapping[str, Sequence[int]], dpi: int = 88) -> bytes:
    """PNG: a row per plane, columns scan, truth, prediction, errors, cut where the truth is largest."""
    where = _tumour(seen)
    figure = Figure(figsize=(8.0, 6.3), layout="constrained", facecolor="white")
    for panels, axis in zip(figure.subplots(3, 4), (2, 1, 0), strict=True):
        _draw_row(panels, seen, regions, axis, _largest_cut(where, axis))
    _titles(figure, seen, regions)
    return _png(figure, dpi)


def plane_png(
    seen: View, regions: Mapping[str, Sequence[int]], plane="axial", cut: int | None = None, dpi: int = 88
) -> bytes:
    """PNG of one plane, with the columns of `overlay_png`.

    Args:
      plane: one of PLANES.
      cut: voxel position along the plane's axis; None is where the truth is largest.
    """
    axis = PLANES.index(plane)
    figure = Figure(figsize=(11.0, 3.4), layout="constrained", facecolor="white")
    panels = figure.subplots(1, 4)
    _draw_row(panels, seen, regions, axis, _largest_cut(_tumour(seen), axis) if cut is None else cut)
    _titles(figure, seen, regions)
    return _png(figure, dpi)


def _tumour(seen: View) -> np.ndarray:
    return seen.truth > 0 if (seen.truth > 0).any() else seen.pred > 0


def _largest_cut(where: np.ndarray, axis: int) -> int:
    return int(np.argmax(where.sum(axis=tuple(a for a in range(3) if a != axis))))


def _draw_row(panels, seen: View, regions: Mapping[str, Sequence[int]], axis: int, cut: int) -> None:
    """Draws scan, truth, prediction and errors of one plane into four axes."""
    colours = palette.colours(list(regions))
    box = drawn_box(seen.image > 0.02 if seen.image is not None else seen.truth > 0, _tumour(seen))
    truth, pred = (
        overlap.region_masks(_slice(labels, axis, cut, box), regions) for labels in (seen.truth, seen.pred)
    )
    shape = next(iter(truth.values())).shape
    grey = np.full(shape, _BACKGROUND) if seen.image is None else _slice(seen.image, axis, cut, box)
    base = np.repeat(grey[..., None], 3, axis=-1)
    pictures = (base, _fill(base, truth, colours), _fill(base, pred, colours), _errors(base, truth, pred))
    height, width = (s for a, s in reversed(list(enumerate(seen.spacing_mm))) if a != axis)
    for axes, picture in zip(panels, pictures, strict=True):
        axes.imshow(picture, origin="lower", aspect=height / width, interpolation="nearest")
        axes.set_xticks([])
        axes.set_yticks([])
    panels[0].set_ylabel(f"{PLANES[axis]} {cut}", fontsize=10)


def _titles(figure: Figure, seen: View, regions: Mapping[str, Sequence[int]]) -> None:
    """Column titles over the first row, and one legend."""
    for axes, text in zip(figure.axes[:4], (seen.channel, "reference", "prediction", "errors"), strict=True):
        axes.set_title(text, fontsize=10)
    handles = [Patch(color=c, label=n) for n, c in palette.colours(list(regions)).items()]
    handles += [
        Patch(color=palette.MISSED, label="missed"),
        Patch(color=palette.INVENTED, label="invented"),
        Patch(color=palette.SWAPPED, label="wrong label"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)


def _png(figure: Figure, dpi: int) -> bytes:
    buffer = io.BytesIO()
    with matplotlib.rc_context({"savefig.dpi": dpi}):
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def turned(array: np.ndarray, orientation: np.ndarray) -> np.ndarray:
    """An array in RAS voxel order; `orientation` is nibabel's of the array's affine."""
    return np.ascontiguousarray(nib.orientations.apply_orientation(array, orientation))


def _window(values: np.ndarray) -> np.ndarray:
    """Grey values from 0 to 1 between zero (or the smallest) and the 99.5th percentile of the brain."""
    values = np.nan_to_num(values)
    low = min(0.0, float(values.min()))
    inside = values[values != 0]
    high = float(np.percentile(inside, 99.5)) if inside.size else 1.0
    return np.clip((values - low) / max(high - low, 1e-6), 0, 1)


def drawn_box(shown: np.ndarray, lesion: np.ndarray) -> tuple[slice, ...]:
    """Bounding box of brain and lesion with a small margin, the part of the grid that is drawn."""
    box = []
    for axis in range(3):
        others = tuple(a for a in range(3) if a != axis)
        hit = np.flatnonzero((shown | lesion).any(axis=others))
        margin = 3 if hit.size else 0
        low, high = (hit[0], hit[-1] + 1) if hit.size else (0, shown.shape[axis])
        box.append(slice(max(int(low) - margin, 0), int(high) + margin))
    return tuple(box)


def _slice(volume: np.ndarray, axis: int, cut: int, box) -> np.ndarray:
    """2-D cut (rows upwards); the patient's right is on the left where left and right are seen."""
    window = tuple(cut if a == axis else box[a] for a in range(3))
    plane = volume[window].T
    return plane if axis == 0 else plane[:, ::-1]


def _fill(base: np.ndarray, masks: Mapping[str, np.ndarray], colours: Mapping[str, str]) -> np.ndarray:
    """Regions painted over the scan, inner ones last, with a full-strength rim."""
    picture = base.copy()
    for name, mask in masks.items():
        inner = mask.copy()
        inner[1:-1, 1:-1] = (
            mask[1:-1, 1:-1] & mask[2:, 1:-1] & mask[:-2, 1:-1] & mask[1:-1, 2:] & mask[1:-1, :-2]
        )
        colour = np.array(to_rgb(colours[name]))
        picture[mask] = 0.5 * picture[mask] + 0.5 * colour
        picture[mask & ~inner] = colour
    return picture


def _errors(base: np.ndarray, truth: Mapping[str, np.ndarray], pred: Mapping[str, np.ndarray]) -> np.ndarray:
    """Voxels in too few regions are missed, in too many invented, in others wrongly labelled."""
    picture = 0.75 * base
    missing = sum(truth[n] & ~pred[n] for n in truth)
    added = sum(pred[n] & ~truth[n] for n in truth)
    picture[missing > added] = to_rgb(palette.MISSED)
    picture[added > missing] = to_rgb(palette.INVENTED)
    picture[(missing > 0) & (missing == added)] = to_rgb(palette.SWAPPED)
    return picture

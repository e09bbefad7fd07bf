"""The 3-D viewer: one offline page with NiiVue and the volumes of a few cases inside.

NiiVue (BSD-2-Clause) comes from the optional package `ipyniivue`, whose widget holds it; nothing of it is in
this project, and its licence is copied into the page. Without the package, or if a version holds it in
another form, there is no viewer and the report's still pictures stand alone.
"""

import base64
import gzip
import json
import re
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

import jinja2
import nibabel as nib
import numpy as np

from mednext_jax.evaluate import palette, pictures
from mednext_jax.evaluate.cohort import Evaluation
from mednext_jax.evaluate.labelmaps import read
from mednext_jax.evaluate.tables import write_text

HERE = Path(__file__).parent
MAX_RUNS = 4
MAX_VOXELS = 6_000_000  # of a cropped volume; a larger one is shown at every second voxel
# The widget creates its one viewer right after this message; the name behind `new` is NiiVue's class.
_CLASS = re.compile(r'Creating new Niivue instance"\).{0,400}?=new ([\w$]+)\(', re.DOTALL)
_EXPORT = re.compile(r"export\s*\{[^{}]*\};?\s*$")


def bundle() -> tuple[str, str, str] | None:
    """(JavaScript that sets `globalThis.Niivue`, licence text, version), or None where it cannot be had."""
    try:
        package = metadata.distribution("ipyniivue")
    except metadata.PackageNotFoundError:
        return None
    files = {str(f): f for f in package.files or ()}
    script = next((f for name, f in files.items() if name.endswith("static/widget.js")), None)
    licence = next((f for name, f in files.items() if "LICENSE" in name), None)
    if script is None or licence is None:
        return None
    text = Path(script.locate()).read_text(encoding="utf-8")
    found = _CLASS.search(text)
    if not found or "</script" in text.lower():
        return None
    text, replaced = _EXPORT.subn(lambda _: f"globalThis.Niivue={found[1]};", text)
    notice = Path(licence.locate()).read_text(encoding="utf-8")
    return (text, notice, package.version) if replaced else None


def write(
    path: Path,
    evaluation: Evaluation,
    chosen: Mapping[str, str],
    scans: Mapping[str, tuple[str, Path] | None],
    n_cases: int,
    note: str = "",
) -> Path | None:
    """Writes the viewer page for the first `n_cases` of the chosen cases; None if there is no viewer.

    An older viewer at `path` is removed then, so that no report has another's viewer beside it.
    """
    parts = bundle() if n_cases and chosen else None
    if parts is None:
        path.unlink(missing_ok=True)
        return None
    script, licence, version = parts
    regions = evaluation.settings.regions
    runs = evaluation.arms[:MAX_RUNS]
    volumes = [
        {"name": case, "what": what, **case_volumes(evaluation, runs, case, scans[case])}
        for case, what in list(chosen.items())[:n_cases]
    ]
    content = {"cases": volumes, "colours": label_colours(regions)}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE / "templates"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("viewer.html").render(
        bundle=script,
        licence=licence.replace("--", "- -"),
        version=version,
        style=(HERE / "assets" / "viewer.css").read_text(encoding="utf-8"),
        script=(HERE / "assets" / "viewer.js").read_text(encoding="utf-8"),
        content=json.dumps(content).replace("<", "\\u003c"),
        colours=palette.colours(list(regions)),
        note=note,
    )
    write_text(path, page)
    return path


def case_volumes(
    evaluation: Evaluation, runs: Sequence, case: str, scan: tuple[str, Path] | None
) -> dict[str, str | dict[str, str]]:
    """Scan, truth and predictions of one case as base64 gzipped uint8 NIfTI, cropped to brain and lesions."""
    references = evaluation.references
    affine = references.inspections[case].affine
    truth = read(references.files[case], references.relabel)
    preds = {run.name: read(run.files[case], run.relabel) for run in runs}
    seen = pictures.view(truth, truth, affine, scan)
    orientation = nib.orientations.io_orientation(affine)
    affine = affine @ nib.orientations.inv_ornt_aff(orientation, truth.shape)
    preds = {name: pictures.turned(pred, orientation) for name, pred in preds.items()}
    labelled = (seen.truth > 0) | np.logical_or.reduce([p > 0 for p in preds.values()])
    image = seen.image if seen.image is not None else 0.25 * np.ones(seen.truth.shape, np.float32)
    box = pictures.drawn_box(seen.image > 0.02 if seen.image is not None else labelled, labelled)
    step = 1 if image[box].size <= MAX_VOXELS else 2

    def packed(volume: np.ndarray) -> str:
        cut = np.ascontiguousarray(volume[box][::step, ::step, ::step]).astype(np.uint8)
        shift = np.eye(4)
        shift[:3, 3] = [s.start for s in box]
        shift[:3, :3] *= step
        content = nib.Nifti1Image(cut, affine @ shift).to_bytes()
        return base64.b64encode(gzip.compress(content, 9, mtime=0)).decode()

    return {
        "channel": seen.channel,
        "centre_mm": _centre_mm(seen.truth > 0 if (seen.truth > 0).any() else labelled, affine),
        "image": packed(np.round(image * 255)),
        "truth": packed(region_index(seen.truth, evaluation.settings.regions)),
        "predictions": {n: packed(region_index(p, evaluation.settings.regions)) for n, p in preds.items()},
    }


def _centre_mm(mask: np.ndarray, affine: np.ndarray) -> list[float]:
    """World position of the middle of a mask (of the grid if it is empty)."""
    points = np.argwhere(mask) if mask.any() else np.array([mask.shape]) / 2
    return [float(v) for v in (affine @ (*np.median(points, axis=0), 1))[:3]]


def region_index(labels: np.ndarray, regions: Mapping[str, Sequence[int]]) -> np.ndarray:
    """(same shape) uint8: 0 outside, else 1 + index of the last (innermost) region a voxel lies in."""
    index = np.zeros(labels.shape, np.uint8)
    for number, values in enumerate(regions.values(), start=1):
        index[np.isin(labels, np.asarray(values))] = number
    return index


def label_colours(regions: Mapping[str, Sequence[int]]) -> dict[str, list]:
    """NiiVue's colour table for `region_index`."""
    rgb = [(0, 0, 0)]
    for colour in palette.colours(list(regions)).values():
        rgb.append(tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5)))
    red, green, blue = (list(channel) for channel in zip(*rgb, strict=True))
    opaque = [0] + [255] * len(regions)
    return {
        "R": red, "G": green, "B": blue, "A": opaque, "I": list(range(len(rgb))),
        "labels": ["outside", *regions],
    }  # fmt: skip

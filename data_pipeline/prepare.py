"""One raw case as the network sees it, and label maps back onto the case's own grid.

A case is brought to RAS axes and cropped to the brain (voxels that are not 0 in some modality); each modality
is z-scored inside the brain and set to 0 outside (or normalised by another rule, by its name). Voxels keep their size:
nothing is resampled, so every step is undone exactly. The record of a case holds what undoing needs.
"""

from collections.abc import Mapping

import numpy as np
from nibabel import affines

from data_pipeline import integrity, nifti
from data_pipeline.cohorts import CHANNELS, Case
from data_pipeline.normalization import DEFAULT, NORMALIZATIONS


def preprocess_case(
    case: Case, label_map: Mapping[int, int] | None = None, normalization: str = DEFAULT
) -> tuple[np.ndarray, np.ndarray | None, dict]:
    """Reads, checks and prepares one case.

    Args:
      label_map: {value in the segmentation: canonical label}, for values that the naming does not explain.
      normalization: name in ``normalization.NORMALIZATIONS``.

    Returns:
      image (D, H, W, 4) float16, label (D, H, W) uint8 or None, and the record (JSON).

    Raises:
      ValueError: the first problem of the case, and how many more there are.
    """
    found = integrity.examine(case, label_map)
    if found.serious:
        more = f" (and {len(found.serious) - 1} more problems)" if len(found.serious) > 1 else ""
        raise ValueError(f"{found.serious[0]}{more}")
    return prepare(case, found, normalization)


def load_for_prediction(case: Case, normalization: str = DEFAULT) -> tuple[np.ndarray, dict]:
    """The same image that training sees, (D, H, W, 4) float32, and the record that ``restore`` needs.

    The segmentation, if there is one, is not read and so has no part in the crop.

    Raises:
      ValueError: the first problem of the case, and how many more there are.
    """
    unlabelled = Case(case.case_id, case.patient_id, case.images, None, case.naming)
    image, _, record = preprocess_case(unlabelled, normalization=normalization)
    return image.astype(np.float32), record


def restore(array: np.ndarray, record: Mapping) -> np.ndarray:
    """Puts an array of the cropped RAS grid back onto the case's own grid; exact inverse of the loading.

    Args:
      array: (D, H, W) or (D, H, W, K), any dtype.
      record: of ``load_for_prediction`` or of the store.

    Returns:
      array in the file's own axes and shape, 0 outside the crop.

    Raises:
      ValueError: an array of another shape than the crop.
    """
    low, high = np.array(record["crop"]).T
    size = tuple(int(length) for length in high - low)
    if array.shape[:3] != size:
        raise ValueError(f"{record['case_id']}: the array is {array.shape}, the crop {size}")
    whole = np.zeros((*record["canonical_shape"], *array.shape[3:]), array.dtype)
    whole[tuple(map(slice, low, high))] = array
    return nifti.from_ras(whole, np.array(record["orientation_table"]))


def prepare(
    case: Case, found: integrity.Examined, normalization: str = DEFAULT
) -> tuple[np.ndarray, np.ndarray | None, dict]:
    """Reorients, crops and normalises a case that has been examined; returns as ``preprocess_case``."""
    first = found.images[CHANNELS[0]]
    table = nifti.orientation(first.affine).astype(int)
    images = {channel: nifti.to_ras(volume.array, table) for channel, volume in found.images.items()}
    label = None if found.label is None else nifti.to_ras(found.label, table)
    brain = np.logical_or.reduce([image != 0 for image in images.values()])
    # A tumour voxel outside the brain is an error of the segmentation, but truth must not be cut off.
    box = _bounding_box(brain if label is None else brain | (label != 0))
    inside = np.ascontiguousarray(brain[box])
    whole = np.stack([images[channel] for channel in CHANNELS], axis=-1)
    prepared, means, deviations = NORMALIZATIONS[normalization](whole, box, inside)
    affine = nifti.ras_affine(first.affine, table, first.array.shape)
    record = {
        "case_id": case.case_id,
        "patient_id": case.patient_id,
        "naming": case.naming,
        "label_scheme": case.naming,
        "channels": list(CHANNELS),
        "original": nifti.describe(first),
        "orientation_table": table.tolist(),
        "canonical_shape": list(brain.shape),
        "crop": [[part.start, part.stop] for part in box],
        "shape": list(inside.shape),
        "spacing_mm": affines.voxel_sizes(affine).tolist(),
        "affine": (affine @ affines.from_matvec(np.eye(3), [part.start for part in box])).tolist(),
        "normalization": {
            "name": normalization,
            "brain_voxels": int(np.count_nonzero(inside)),
            "mean": dict(zip(CHANNELS, means, strict=True)),
            "std": dict(zip(CHANNELS, deviations, strict=True)),
        },
    }
    return prepared, None if label is None else np.ascontiguousarray(label[box]), record


def _bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    """Smallest box around the true voxels of a 3-D mask that has some."""
    box = []
    for axis in range(3):
        hit = np.flatnonzero(mask.any(axis=tuple(other for other in range(3) if other != axis)))
        box.append(slice(int(hit[0]), int(hit[-1]) + 1))
    return tuple(box)

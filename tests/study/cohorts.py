"""Two cohorts of bright and dark balls: without learning the target's contrast, nobody sees its tumours."""

from pathlib import Path

import nibabel as nib
import numpy as np

SHAPE = (16, 18, 17)
OLD = {"t1n": "t1", "t1c": "t1ce", "t2w": "t2", "t2f": "flair"}


def write_cohort(folder: Path, cases: int, target: bool) -> Path:
    """Cases with a ball of oedema around a ball of enhancing tumour around necrosis, bright in the source's FLAIR and
    T1ce and dark in the target's.
    """
    for number in range(cases):
        generator = np.random.default_rng((int(target), number))
        grid = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1)
        centre = np.array(SHAPE) / 2 + generator.uniform(-2.5, 2.5, 3)
        radius = np.linalg.norm(grid - centre, axis=-1)
        label = np.select([radius < 1.8, radius < 3.2, radius < 5], [1, 3, 2], 0)
        sign = -1 if target else 1
        case = f"BraTS-SSA-{number:05d}-000" if target else f"BraTS2021_{number:05d}"
        images = {
            "t1n": 100 - 20 * sign * (label > 0), "t1c": 100 + 60 * sign * (label == 3),
            "t2w": 100 + 20 * sign * (label > 0), "t2f": 100 + 60 * sign * (label == 2),
        }  # fmt: skip
        for channel, image in images.items():
            noisy = (image + generator.normal(0, 5, SHAPE)).astype(np.float32)
            _save(noisy, folder / case / f"{case}-{channel}.nii.gz" if target else
                  folder / case / f"{case}_{OLD[channel]}.nii.gz")  # fmt: skip
        mask = label if target else np.where(label == 3, 4, label)
        _save(mask.astype(np.uint8), folder / case / (f"{case}-seg.nii.gz" if target else f"{case}_seg.nii.gz"))
    return folder


def _save(array: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.diag([-1.0, -1.0, 1.0, 1.0])), path)

"""Small raw cases with odd, unequal sizes, written with nibabel alone."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

NAMES = {
    "brats2023": {"t1n": "-t1n", "t1c": "-t1c", "t2w": "-t2w", "t2f": "-t2f", "seg": "-seg"},
    "brats2021": {"t1n": "_t1", "t1c": "_t1ce", "t2w": "_t2", "t2f": "_flair", "seg": "_seg"},
}
BRATS_AFFINE = np.array([[-1.0, 0, 0, 0], [0, -1, 0, 239], [0, 0, 1, 0], [0, 0, 0, 1]])


@pytest.fixture
def raw_case(tmp_path):
    """Writes a case: ``raw_case(case_id, ...)`` gives {"t1n": path, ..., "seg": path}.

    An array given by name (``t1n=...``) replaces the drawn one; None leaves the file out.
    """

    def write(case_id="BraTS-SSA-00002-000", folder="raw", shape=(13, 17, 15), affine=BRATS_AFFINE, **given):
        rng = np.random.default_rng(sum(case_id.encode()))
        names = NAMES["brats2023" if case_id.startswith("BraTS-") else "brats2021"]
        radius = sum(((g - s / 2) / (0.4 * s)) ** 2 for g, s in zip(np.indices(shape), shape, strict=True))
        paths = {}
        for number, (content, suffix) in enumerate(names.items(), start=1):
            array = np.where(radius < 1, rng.normal(100 * number, 10, shape), 0).astype(np.int16)
            if content == "seg":
                array = np.select(
                    [radius < 0.1, radius < 0.2, radius < 0.5], [1, int(suffix[0] == "_") + 3, 2], 0
                )
            array = given.get(content, array)
            if array is None:
                continue
            path = tmp_path / folder / case_id / f"{case_id}{suffix}{given.get('ending', '.nii.gz')}"
            path.parent.mkdir(parents=True, exist_ok=True)
            array = array.astype(np.uint8) if array.dtype == np.int64 else array
            nib.save(nib.Nifti1Image(array, given.get(f"{content}_affine", affine)), path)
            paths[content] = Path(path)
        return paths

    return write

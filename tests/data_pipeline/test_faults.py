"""Cohorts with one fault: what is changed, and what is not."""

import nibabel as nib
import numpy as np
import pytest

from data_pipeline import cohorts, faults, normalization


def test_permuted_channels_swap_two_modalities_and_keep_the_rest(raw_case, tmp_path):
    paths = raw_case()
    folder = next(iter(paths.values())).parents[1]
    faults.permute_channels(folder, tmp_path / "out")
    before, after = cohorts.scan(folder)[0], cohorts.scan(tmp_path / "out")[0]
    for channel, other in {"t1n": "t1n", "t1c": "t2f", "t2w": "t2w", "t2f": "t1c"}.items():
        np.testing.assert_array_equal(nib.load(after.images[channel]).dataobj, nib.load(before.images[other]).dataobj)


def test_squeezed_volumes_cover_the_same_space_with_the_same_labels(raw_case, tmp_path):
    paths = raw_case()
    folder = next(iter(paths.values())).parents[1]
    faults.squeeze(folder, tmp_path / "out", (8, 9, 10))
    before, after = cohorts.scan(folder)[0], cohorts.scan(tmp_path / "out")[0]
    old, new = nib.load(before.segmentation), nib.load(after.segmentation)
    assert new.shape == (8, 9, 10) and set(np.unique(new.dataobj)) <= set(np.unique(old.dataobj))
    for corner in (-0.5, 1):  # outer faces, in mm
        ends = [np.array(s, float) - 0.5 if corner == 1 else np.full(3, -0.5) for s in (old.shape, new.shape)]
        np.testing.assert_allclose(old.affine[:3, :3] @ ends[0] + old.affine[:3, 3],
                                   new.affine[:3, :3] @ ends[1] + new.affine[:3, 3], atol=1e-4)  # fmt: skip
    with pytest.raises(ValueError, match="three positive numbers"):
        faults.squeeze(folder, tmp_path / "other", (8, 9))


def test_joint_normalisation_leaves_a_modality_with_small_numbers_without_contrast():
    generator = np.random.default_rng(0)
    whole = np.stack([generator.normal(mean, 1, (6, 5, 4)) for mean in (10, 100, 1000, 1)], -1)
    box, inside = (slice(0, 6), slice(0, 5), slice(0, 4)), np.ones((6, 5, 4), bool)
    joint, _, _ = normalization.zscore_joint(whole, box, inside)
    expected = (whole - whole.mean()) / whole.std()
    np.testing.assert_allclose(joint, expected, atol=2e-3)
    own, means, _ = normalization.zscore_brain(whole, box, inside)
    assert own.std((0, 1, 2)) == pytest.approx(1, abs=0.01) and joint.astype(float)[..., 0].std() < 0.01
    assert means == pytest.approx([10, 100, 1000, 1], abs=0.5)

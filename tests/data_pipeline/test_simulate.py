"""The simulated cohorts: layout, geometry, seeds, and that cases are what the recipes say."""

import json
import os
import shutil
import sys

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from data_pipeline import cohorts, labels, simulate
from data_pipeline.simulate.cohort import CASE_FILE, COHORT_FILE

CASES = 3
SPACING_MM = 3.0
SHAPE = (80, 80, 52)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("simulated")
    simulate.simulate(folder, CASES, CASES, SPACING_MM, seed=0, workers=1)
    return folder


def load(root, name):
    """[({channel: array}, canonical labels)] of a cohort."""
    loaded = []
    for case in cohorts.scan(root / name):
        images = {channel: np.asarray(nib.load(path).dataobj) for channel, path in case.images.items()}
        loaded.append((images, labels.to_canonical(np.asarray(nib.load(case.segmentation).dataobj), case.naming)))
    return loaded


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_source_has_the_names_and_labels_of_brats_2021(root):
    first = root / "source" / "BraTS2021_00000"
    names = {path.name for path in first.glob("*.nii.gz")}
    assert names == {f"BraTS2021_00000_{suffix}.nii.gz" for suffix in ("flair", "t1", "t1ce", "t2", "seg")}
    assert np.unique(nib.load(first / "BraTS2021_00000_seg.nii.gz").dataobj).tolist() == [0, 1, 2, 4]


def test_target_has_the_names_and_labels_of_brats_ssa(root):
    first = root / "target" / "BraTS-SSA-00002-000"
    names = {path.name for path in first.glob("*.nii.gz")}
    assert names == {f"BraTS-SSA-00002-000-{suffix}.nii.gz" for suffix in ("t1n", "t1c", "t2w", "t2f", "seg")}
    assert np.unique(nib.load(first / "BraTS-SSA-00002-000-seg.nii.gz").dataobj).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ["source", "target"])
def test_cohort_is_found_whole_by_the_scan(root, name):
    cases, problems = cohorts.survey(root / name)
    assert problems == []
    assert len({case.patient_id for case in cases}) == CASES
    assert all(case.segmentation is not None for case in cases)


@pytest.mark.parametrize("name", ["source", "target"])
def test_files_have_brats_geometry_and_dtypes(root, name):
    for case in cohorts.scan(root / name):
        for path in (*case.images.values(), case.segmentation):
            image = nib.load(path)
            assert image.shape == SHAPE
            # 3 mm voxels that cover the box of the 1 mm grid, whose first voxel is at (0, 239, 0).
            expected = [[-3, 0, 0, -1], [0, -3, 0, 238], [0, 0, 3, 1], [0, 0, 0, 1]]
            np.testing.assert_array_equal(image.affine, expected)
            assert nib.aff2axcodes(image.affine) == ("L", "P", "S")
            assert image.header["sform_code"] == image.header["qform_code"] == 1
            assert image.get_data_dtype() == (np.uint8 if path == case.segmentation else np.int16)


@pytest.mark.parametrize("name", ["source", "target"])
def test_images_are_positive_in_one_brain_mask_and_zero_outside(root, name):
    for images, segmentation in load(root, name):
        brain = images["t1n"] > 0
        assert 1100 < brain.sum() * SPACING_MM**3 / 1000 < 2000  # mL, with sulcal fluid
        assert ndimage.label(brain)[1] == 1
        for image in images.values():
            np.testing.assert_array_equal(image > 0, brain)
            assert image.min() == 0
        assert not segmentation[~brain].any()


def test_tumours_are_a_core_in_oedema_seen_by_the_right_channels(root):
    for images, segmentation in load(root, "source"):
        necrosis, oedema, enhancing = (segmentation == value for value in (1, 2, 3))
        core, healthy = necrosis | enhancing, (images["t1n"] > 0) & (segmentation == 0)
        assert core.sum() < oedema.sum()
        shell = ndimage.binary_dilation(core, iterations=2) & ~core & (images["t1n"] > 0)
        assert (segmentation[shell] == 2).mean() > 0.5  # the core lies in its oedema
        deep = ndimage.distance_transform_edt(core)
        assert deep[necrosis].mean() > deep[enhancing].mean()  # the rim is outside
        mean = {c: [i[m].mean() for m in (healthy, necrosis, oedema, enhancing)] for c, i in images.items()}
        assert np.argmax(mean["t1c"]) == 3
        assert np.argmax(mean["t2f"]) == 2
        assert np.argmin(mean["t1n"]) == 1
        assert np.argmax(mean["t2w"]) == 1


def test_target_has_larger_tumours_and_weaker_rims(root):
    def volume(cases):
        return np.mean([(segmentation > 0).sum() for _, segmentation in cases])

    def rim(cases):
        ratios = []
        for images, segmentation in cases:
            healthy = (images["t1c"] > 0) & (segmentation == 0)
            ratios.append(images["t1c"][segmentation == 3].mean() / images["t1c"][healthy].mean())
        return np.mean(ratios)

    source, target = load(root, "source"), load(root, "target")
    assert volume(target) > 1.5 * volume(source)
    assert rim(target) < rim(source)


def test_target_slices_are_thick(root):
    def smoothness_along_z(cases):
        """Mean absolute step between neighbours along z, over that in plane, inside the brain."""
        ratios = []
        for images, _ in cases:
            inside = ndimage.binary_erosion(images["t1n"] > 0, iterations=4)
            for image in images.values():
                steps = [np.abs(image - np.roll(image.astype(float), 1, axis))[inside].mean() for axis in range(3)]
                ratios.append(2 * steps[2] / (steps[0] + steps[1]))
        return np.mean(ratios)

    assert smoothness_along_z(load(root, "source")) > 0.8
    assert smoothness_along_z(load(root, "target")) < 0.7


def test_rerun_in_other_company_gives_the_same_bytes(root, tmp_path):
    simulate.simulate(tmp_path, 0, 1, SPACING_MM, seed=0, workers=1)
    case = "BraTS-SSA-00002-000"
    assert contents(tmp_path / "target" / case) == contents(root / "target" / case)
    assert not (tmp_path / "source").exists()


def test_another_seed_gives_another_patient(root):
    recipe = simulate.SOURCE
    one = json.loads((root / "source" / "BraTS2021_00000" / CASE_FILE).read_text())
    other = simulate.simulate_case(recipe, simulate.case_seed(1, recipe, 0), 6.0)
    assert other.record["head"] != one["head"]
    assert other.record["tumour"] != one["tumour"]


def test_patient_is_the_same_at_another_voxel_size(root):
    fine = json.loads((root / "target" / "BraTS-SSA-00002-000" / CASE_FILE).read_text())
    coarse = simulate.simulate_case(simulate.TARGET, simulate.case_seed(0, simulate.TARGET, 0), 6.0)
    record = json.loads(json.dumps(coarse.record))
    assert coarse.labels.shape == (40, 40, 26)
    assert {key: record[key] for key in ("head", "tumour")} == {key: fine[key] for key in ("head", "tumour")}
    for tissue, volume in fine["volumes_ml"].items():
        assert record["volumes_ml"][tissue] == pytest.approx(volume, rel=0.2)


def test_stopped_run_goes_on_and_more_cases_are_added(root, tmp_path):
    folder = tmp_path / "source"
    shutil.copytree(root / "source", folder)
    before = contents(folder)
    shutil.rmtree(folder / "BraTS2021_00001")
    os.mkdir(folder / ".BraTS2021_00001.tmp")
    (folder / ".BraTS2021_00001.tmp" / "half.nii.gz").write_bytes(b"half")
    kept = (folder / "BraTS2021_00000" / CASE_FILE).stat().st_mtime_ns
    simulate.simulate(tmp_path, CASES, 0, SPACING_MM, seed=0, workers=1)
    assert contents(folder) == before
    assert (folder / "BraTS2021_00000" / CASE_FILE).stat().st_mtime_ns == kept


@pytest.mark.parametrize("name", ["source", "target"])
def test_record_says_simulated_and_holds_what_was_drawn(root, name):
    record = json.loads((root / name / COHORT_FILE).read_text())
    assert record["simulated"] is True
    assert "no patient was scanned" in record["notice"]
    assert record["simulator_version"] == simulate.SIMULATOR_VERSION
    assert sorted(record["cases"]) == [case.case_id for case in cohorts.scan(root / name)]
    low, high = record["recipe"]["slice_thickness_mm"]
    for case in record["cases"].values():
        assert case["simulated"] is True
        assert all(low <= scan["slice_thickness_mm"] <= high for scan in case["scans"].values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, r"another seed \(0, not 1\): choose another output folder or delete this one"),
        ({"spacing_mm": 4.0}, r"another spacing_mm \(3.0, not 4.0\)"),
    ],
)
def test_cohort_of_other_settings_is_refused(root, change, message):
    with pytest.raises(ValueError, match=message):
        simulate.simulate(**{"output": root, "spacing_mm": SPACING_MM, "workers": 1, **change})


def test_folder_with_other_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="source holds files but no cohort.json: choose another output folder"):
        simulate.simulate(tmp_path, 1, 0, SPACING_MM, workers=1)
    assert contents(tmp_path) == {(tmp_path / "source" / "mine.txt").relative_to(tmp_path): b"mine"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spacing_mm": 0.2}, "spacing_mm is 0.2: it must be from 0.8 to 6"),
        ({"spacing_mm": float("nan")}, "spacing_mm is nan"),
        ({"source_cases": 0, "target_cases": 0}, "no case to simulate"),
        ({"target_cases": -1}, "target_cases is -1: it must be 0 or more"),
        ({"seed": -3}, "seed is -3"),
    ],
)
def test_argument_out_of_range_is_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        simulate.simulate(tmp_path, **change)
    assert list(tmp_path.iterdir()) == []


def test_missing_nilearn_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "nilearn", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'mednext-jax\[demo\]'"):
        simulate.simulate(tmp_path, 1, 0)
    assert list(tmp_path.iterdir()) == []


# Of version 1, seed 0, 3 mm, first case: voxels of NCR, ED and ET; mean signal inside the brain.
FROZEN = {
    "source": ([1127, 3022, 636], {"t1n": 280.08, "t1c": 258.51, "t2w": 980.04, "t2f": 227.66}),
    "target": ([631, 11052, 788], {"t1n": 496.33, "t1c": 433.21, "t2w": 881.87, "t2f": 290.68}),
}


@pytest.mark.parametrize("name", ["source", "target"])
def test_version_1_of_the_simulator_is_frozen(root, name):
    assert simulate.SIMULATOR_VERSION == 1, "a new version: measure FROZEN again, and docs/results.md is of the old one"
    images, label = load(root, name)[0]
    voxels, means = FROZEN[name]
    assert np.bincount(label.ravel(), minlength=4)[1:] == pytest.approx(voxels, rel=0.01, abs=3)  # libraries round
    assert {c: image[image > 0].mean() for c, image in images.items()} == pytest.approx(means, rel=0.005)

"""Each fault a cohort can have is found, named with its file, and does not hide the others."""

import gzip
import re

import numpy as np
import pytest

from data_pipeline import cohorts, integrity

AFFINE = np.array([[-1.0, 0, 0, 0], [0, -1, 0, 239], [0, 0, 1, 0], [0, 0, 0, 1]])


def kinds(problems):
    return [problem.kind for problem in problems]


def examine(paths):
    return integrity.examine(cohorts.scan(paths["t1n"].parent)[0])


def moved(mm):
    affine = AFFINE.copy()
    affine[0, 3] += mm
    return affine


def image(shape=(13, 17, 15), **at):
    array = np.zeros(shape)
    array[3:9, 4:12, 5:11] = np.random.default_rng(0).uniform(50, 90, (6, 8, 6))
    for value in at.values():
        array[4, 5, 6] = value
    return array.astype(np.float32)


def label(*values):
    array = np.zeros((13, 17, 15), np.float32)
    array[5, 6, 6 : 6 + len(values)] = values
    return array


def test_sound_case_has_no_problem(raw_case):
    for case_id in ("BraTS-SSA-00002-000", "BraTS2021_00017"):
        found = examine(raw_case(case_id, case_id))
        assert found.problems == [] and set(np.unique(found.label)) == {0, 1, 2, 3}
        assert all(volume.array.dtype == np.float32 for volume in found.images.values())


def test_case_without_segmentation_has_no_problem(raw_case):
    found = examine(raw_case(seg=None))
    assert found.problems == [] and found.label is None


@pytest.mark.parametrize(
    ("given", "kind", "words"),
    [
        ({"t1c": image(nan=np.nan)}, "NaN or Inf", "t1c.nii.gz: 1 voxels"),
        ({"t2w": image(inf=-np.inf)}, "NaN or Inf", "t2w.nii.gz"),
        ({"t2w": image().astype(np.float64) * 1e300}, "NaN or Inf", "beyond float32"),
        ({"t2f": image() * 0}, "constant image", "t2f.nii.gz: every voxel is 0"),
        ({"t2f": image() * 0 + 5}, "constant image", "every voxel but 0 is 5"),
        ({"t2f": (image() > 0) * 7.0}, "constant image", "every voxel but 0 is 7"),
        ({"t1c": image((13, 17, 16))}, "shapes differ", r"t1c.nii.gz is \(13, 17, 16\), .*t1n.nii.gz"),
        ({"seg": label(1)[:, :, :14]}, "shapes differ", "seg.nii.gz"),
        ({"t1c_affine": moved(0.5)}, "affines differ", "t1c.nii.gz lies 0.5 mm off"),
        ({"seg_affine": AFFINE @ np.diag([-1, 1, 1, 1])}, "affines differ", "axes RPS against LPS"),
        ({"t2w_affine": AFFINE @ np.diag([1, 1, 1.02, 1])}, "affines differ", "0.28 mm"),
        ({"t1n": image()[..., None]}, "not 3-D", "t1n.nii.gz: is 4-D"),
        ({"seg": label(1, 4)}, "unknown label value", "seg.nii.gz: label value 4 .*--label_map=4:0"),
        ({"seg": label(1, 0.5)}, "unknown label value", "label value 0.5"),
        ({"seg": label(np.nan)}, "unknown label value", "label value nan"),
    ],
)
def test_fault_is_found_and_names_the_file(raw_case, given, kind, words):
    found = examine(raw_case(**given))
    assert kinds(found.serious) == [kind]
    assert found.serious[0].case_id == "BraTS-SSA-00002-000"
    assert re.search(words, found.serious[0].message)


def test_affines_that_differ_by_rounding_are_one_grid(raw_case):
    assert examine(raw_case(t1c_affine=moved(0.01), seg_affine=AFFINE * (1 + 1e-6))).problems == []


def test_displacement_is_measured_at_the_far_corner():
    turned = AFFINE.copy()
    turned[0, 0] *= 1.01
    assert integrity.displacement_mm(AFFINE, turned, (101, 5, 7)) == pytest.approx(0.01 * 100)


def test_all_faults_of_a_case_are_reported_together(raw_case):
    paths = raw_case(t1n=image(nan=np.nan), t1c=image() * 0, seg=label(9), t2w_affine=moved(3))
    paths["t2f"].write_bytes(paths["t2f"].read_bytes()[:-20])
    expected = {"NaN or Inf", "constant image", "unknown label value", "affines differ", "unreadable file"}
    assert set(kinds(examine(paths).serious)) == expected


def test_image_without_background_and_tumour_outside_brain_are_warnings(raw_case):
    full = np.random.default_rng(0).uniform(1, 9, (13, 17, 15)).astype(np.float32)
    found = examine(raw_case(**{name: full * (i + 1) for i, name in enumerate(("t1n", "t1c", "t2w", "t2f"))}))
    assert kinds(found.problems) == ["no background"] and not found.serious
    outside = label(1)
    outside[0, 0, 0] = 2
    found = examine(raw_case("BraTS-SSA-00003-000", "other", seg=outside))
    assert kinds(found.problems) == ["tumour outside brain"] and not found.serious
    assert "1 tumour voxels" in found.problems[0].message


@pytest.mark.parametrize("workers", [1, 2])
def test_check_reports_every_problem_of_every_case_in_one_pass(raw_case, tmp_path, workers):
    raw_case("BraTS-SSA-00001-000")
    raw_case("BraTS-SSA-00002-000", t1c=None)
    raw_case("BraTS-SSA-00003-000", t1n=image(nan=np.nan), seg=label(4))
    cut = raw_case("BraTS-SSA-00004-000")["t2w"]
    cut.write_bytes(cut.read_bytes()[:100])
    raw_case("BraTS-SSA-00005-000")
    raw_case("BraTS-SSA-00005-000", "raw/again")
    (tmp_path / "raw" / "stray.nii.gz").write_bytes(gzip.compress(b"nothing"))
    problems = integrity.check(tmp_path / "raw", workers=workers, progress=False)
    assert [(p.case_id[-9:-4], p.kind) for p in problems] == [
        ("", "unknown name"),
        ("00002", "missing modality"),
        ("00003", "NaN or Inf"),
        ("00003", "unknown label value"),
        ("00004", "unreadable file"),
        *[("00005", "duplicate case")] * 5,
    ]


def test_check_accepts_the_values_the_user_maps(raw_case, tmp_path):
    raw_case(seg=label(1, 4))
    assert integrity.check(tmp_path / "raw", label_map={4: 0}, progress=False) == []


def test_check_of_an_empty_folder_is_a_problem(tmp_path):
    assert kinds(integrity.check(tmp_path, progress=False)) == ["no case"]


def test_copies_of_a_channel_are_a_warning_that_names_both_files(raw_case):
    (problem,) = examine(raw_case(t1c=image(), t2f=image())).problems
    assert problem.warning and problem.kind == "identical images"
    assert "t1c.nii.gz" in problem.message and "t2f.nii.gz" in problem.message


def test_segmentation_without_tumour_is_a_warning(raw_case):
    (problem,) = examine(raw_case(seg=label())).problems
    assert problem.warning and problem.kind == "empty segmentation" and "seg.nii.gz" in problem.message

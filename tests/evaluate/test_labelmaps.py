"""Finding, reading and checking label maps as people have them on disk."""

import nibabel as nib
import numpy as np
import pytest

from mednext_jax.evaluate import labelmaps

SCHEMES = {"old": {0: 0, 1: 1, 2: 2, 4: 3}, "new": {0: 0, 1: 1, 2: 2, 3: 3}}
LPS = np.array([[-1.0, 0, 0, 0], [0, -1, 0, 239], [0, 0, 1, 0], [0, 0, 0, 1]])


def _save(path, labels, affine=LPS):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(labels, affine), path)
    return path


@pytest.fixture
def labels():
    array = np.zeros((5, 6, 7), np.uint8)
    array[1:3, 2:4, 3:5] = 2
    array[2, 3, 4] = 4
    return array


def test_predictions_are_found_by_file_name(tmp_path, labels):
    _save(tmp_path / "b.nii.gz", labels)
    _save(tmp_path / "a.x.nii", labels)
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / ".hidden.nii.gz").write_text("")
    assert list(labelmaps.find(tmp_path)) == ["a.x", "b"]


def test_segmentations_are_found_in_raw_case_folders_of_both_namings(tmp_path, labels):
    for case, ending in (("BraTS-SSA-00002-000", "-seg.nii.gz"), ("BraTS2021_00001", "_seg.nii")):
        _save(tmp_path / case / f"{case}{ending}", labels)
        _save(tmp_path / case / f"{case}{ending.replace('seg', 't1c')}", labels)
    found = labelmaps.find(tmp_path)
    assert list(found) == ["BraTS-SSA-00002-000", "BraTS2021_00001"]
    assert all("seg" in path.name for path in found.values())


def test_segmentation_inside_a_folder_of_its_name_is_found(tmp_path, labels):
    _save(tmp_path / "case" / "case_seg.nii" / "00003_final.nii", labels)
    _save(tmp_path / "case" / "case_t1.nii" / "00003_brain.nii", labels)
    assert labelmaps.find(tmp_path)["case"].name == "00003_final.nii"


def test_folder_errors_say_what_to_do(tmp_path, labels):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        labelmaps.find(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no label map found"):
        labelmaps.find(tmp_path)
    _save(tmp_path / "x" / "a-seg.nii", labels)
    _save(tmp_path / "y" / "a_seg.nii.gz", labels)
    with pytest.raises(ValueError, match="case a is there twice"):
        labelmaps.find(tmp_path)


@pytest.mark.parametrize("others", [("CASE/CASE-seg.nii.gz",), ("old/CASE.nii",), ("CASE_seg.nii",)])
def test_two_label_maps_of_one_case_are_refused_wherever_they_lie(tmp_path, labels, others):
    for file in ("CASE.nii.gz", "OTHER.nii.gz", *others):
        _save(tmp_path / file, labels)
    with pytest.raises(ValueError, match="case CASE is there twice"):
        labelmaps.find(tmp_path)


def test_float_maps_of_whole_numbers_are_read_and_images_refused(tmp_path, labels):
    path = _save(tmp_path / "a.nii.gz", labels.astype(np.float32))
    np.testing.assert_array_equal(labelmaps.read(path), labels)
    for values in (labels + 0.25, labels - 1.0, np.full(labels.shape, np.nan)):
        image = _save(tmp_path / "b.nii.gz", values.astype(np.float32))
        with pytest.raises(ValueError, match="b.nii.gz.*whole numbers"):
            labelmaps.read(image)


def test_rounding_errors_of_a_scaled_header_are_forgiven(tmp_path, labels):
    path = _save(tmp_path / "a.nii.gz", labels * np.float32(1.00001))
    np.testing.assert_array_equal(labelmaps.read(path), labels)


def test_trailing_axis_of_one_is_dropped_and_four_dimensions_refused(tmp_path, labels):
    assert labelmaps.read(_save(tmp_path / "a.nii.gz", labels[..., None])).shape == (5, 6, 7)
    with pytest.raises(ValueError, match="three dimensions"):
        labelmaps.read(_save(tmp_path / "b.nii.gz", np.stack([labels, labels], -1)))


def test_broken_files_are_named(tmp_path, labels):
    whole = _save(tmp_path / "a.nii.gz", np.random.default_rng(0).integers(0, 4, (30, 30, 30), np.uint8))
    (tmp_path / "cut.nii.gz").write_bytes(whole.read_bytes()[:3000])
    (tmp_path / "text.nii.gz").write_text("not an image")
    for name in ("cut", "text"):
        with pytest.raises(ValueError, match=f"{name}.nii.gz"):
            labelmaps.read(tmp_path / f"{name}.nii.gz")


def test_relabelling_follows_the_table(tmp_path, labels):
    path = _save(tmp_path / "a.nii.gz", labels)
    assert np.unique(labelmaps.read(path, SCHEMES["old"])).tolist() == [0, 2, 3]


def test_inspection_holds_geometry_values_and_hash(tmp_path, labels):
    path = _save(tmp_path / "a.nii.gz", labels, np.diag([1.0, 0.75, 3.0, 1.0]))
    found = labelmaps.inspect(path)
    assert found.shape == (5, 6, 7) and found.spacing_mm == (1.0, 0.75, 3.0) and found.values == (0, 2, 4)
    assert len(found.sha256) == 64


def test_geometry_problems_are_told_apart(tmp_path, labels):
    truth = labelmaps.inspect(_save(tmp_path / "a.nii.gz", labels))

    def problem(array, affine, tolerance=0.1):
        return labelmaps.geometry_problem(
            labelmaps.inspect(_save(tmp_path / "p.nii.gz", array, affine)), truth, tolerance
        )

    near, far = LPS.copy(), LPS.copy()
    near[0, 3], far[0, 3] = 0.05, 0.5
    assert problem(labels, LPS) is None and problem(labels, near) is None
    assert "shape (7, 6, 5)" in problem(labels.T.copy(), LPS)
    assert "0.5 mm apart" in problem(labels, far)
    assert problem(labels, far, tolerance=1.0) is None
    assert "axes RAS and LPS" in problem(labels, np.eye(4))
    spacing = LPS.copy()
    spacing[2, 2] = 1.2  # same origin, other spacing: the far corner is 6 * 0.2 mm away
    assert "1.2 mm apart" in problem(labels, spacing)


def test_scheme_is_detected_from_values():
    none = {}.get
    new, old = ("new", SCHEMES["new"]), ("old", SCHEMES["old"])
    assert labelmaps.detect_scheme("f", {"a": (0, 1, 2), "b": (0, 3)}, SCHEMES, none) == new
    assert labelmaps.detect_scheme("f", {"a": (0, 1, 2), "b": (0, 4)}, SCHEMES, none) == old
    assert labelmaps.detect_scheme("f", {"a": (0, 1, 2)}, SCHEMES, none) == new  # both agree on these


def test_a_folder_may_mix_schemes_where_the_names_say_so():
    values = {"a": (0, 1, 3), "b": (0, 2, 4), "c": (1, 2), "d": (0, 4)}
    text, relabel = labelmaps.detect_scheme("f", values, SCHEMES, {"b": "old", "d": "old", "a": "new"}.get)
    assert text == "new, old in 2 cases"
    assert relabel == {**SCHEMES["new"], **SCHEMES["old"]}
    assert relabel[3] == relabel[4] == 3


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"a": (0, 3), "b": (0, 4)}, {"b": "new"}),  # 4 in a case of today is no enhancing tumour
        ({"a": (0, 3), "b": (0, 3, 4)}, {"b": "old"}),  # no scheme has both
        ({"a": (0, 3), "b": (0, 4), "c": (0, 4)}, {"b": "old"}),  # c does not say
    ],
)
def test_a_mixture_that_names_do_not_explain_is_refused(values, names):
    with pytest.raises(ValueError, match="fit no scheme.*--labels"):
        labelmaps.detect_scheme("f", values, SCHEMES, names.get)


def test_scheme_is_never_guessed():
    with pytest.raises(ValueError, match=r"\[0, 3, 4\] fit no scheme.*--labels"):
        labelmaps.detect_scheme("f", {"a": (0, 3), "b": (0, 4)}, SCHEMES, {}.get)
    with pytest.raises(ValueError, match="b is named as in new, which has no label.*--labels"):
        labelmaps.detect_scheme("f", {"a": (0, 1), "b": (0, 4)}, SCHEMES, {"b": "new"}.get)

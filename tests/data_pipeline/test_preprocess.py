"""Preprocessing keeps every voxel's place and value, can be undone exactly, and goes on where it stopped."""

import os
import signal
import subprocess
import sys
import time

import nibabel as nib
import numpy as np
import pytest
from nibabel.affines import from_matvec
from nibabel.eulerangles import euler2mat

from data_pipeline import cohorts, nifti, preprocess, store

SHAPE = (13, 17, 15)


def affine_of(codes, turn=0.0):
    table = nib.orientations.axcodes2ornt(codes)
    straight = from_matvec(
        euler2mat(turn, -turn / 2, turn / 3) @ np.diag([1.2, 0.8, 3.0]), [5.0, -60.0, 11.0]
    )
    return straight @ nib.orientations.inv_ornt_aff(table, SHAPE)


GRIDS = {code: affine_of(code) for code in ("RAS", "LPS", "PIR", "SAL", "IRP")}
GRIDS |= {f"oblique {code}": affine_of(code, 0.35) for code in ("RAS", "LPI", "AIL")}


def only_case(paths):
    return cohorts.scan(paths["t1n"].parent)[0]


@pytest.mark.parametrize("grid", GRIDS)
def test_restoring_gives_every_label_its_own_voxel_back(raw_case, tmp_path, grid):
    paths = raw_case(affine=GRIDS[grid], shape=SHAPE)
    _, label, record = preprocess.preprocess_case(only_case(paths))
    back = preprocess.restore(label, record)
    np.testing.assert_array_equal(back, np.asarray(nib.load(paths["seg"]).dataobj))
    nifti.write_like(tmp_path / "out.nii.gz", back, record)
    written = nib.load(tmp_path / "out.nii.gz")
    np.testing.assert_array_equal(written.affine, nib.load(paths["t1n"]).affine)
    np.testing.assert_array_equal(np.asarray(written.dataobj), back)


@pytest.mark.parametrize("grid", GRIDS)
def test_voxels_lie_where_the_recorded_affine_says(raw_case, grid):
    paths = raw_case(affine=GRIDS[grid], shape=SHAPE)
    image, label, record = preprocess.preprocess_case(only_case(paths))
    assert "".join(nib.aff2axcodes(np.array(record["affine"]))) == "RAS"
    source = nib.load(paths["seg"])
    index = np.argwhere(label > 0)
    world = nib.affines.apply_affine(np.array(record["affine"]), index)
    there = nib.affines.apply_affine(np.linalg.inv(source.affine), world)
    np.testing.assert_allclose(there, np.rint(there), atol=1e-3)
    truth = np.asarray(source.dataobj)[tuple(np.rint(there).astype(int).T)]
    np.testing.assert_array_equal(label[tuple(index.T)], truth)
    sizes = sorted(nib.affines.voxel_sizes(source.affine))
    np.testing.assert_allclose(sorted(record["spacing_mm"]), sizes, rtol=1e-6)


def test_each_modality_is_standardised_inside_the_brain_and_zero_outside(raw_case):
    paths = raw_case("BraTS2021_00017")
    image, _, record = preprocess.preprocess_case(only_case(paths))
    assert image.dtype == np.float16 and image.shape[-1] == 4
    raw = [
        np.asarray(nib.load(paths[name]).dataobj, float)[::-1, ::-1] for name in ("t1n", "t1c", "t2w", "t2f")
    ]
    brain = np.any(raw, axis=0)
    box = tuple(slice(at.min(), at.max() + 1) for at in np.nonzero(brain))
    assert [[s.start, s.stop] for s in box] == record["crop"]
    for channel, values in enumerate(raw):
        inside = values[brain]
        expected = np.where(brain, (values - inside.mean()) / inside.std(), 0)[box]
        np.testing.assert_allclose(image[..., channel], expected, atol=2e-3)
        assert (image[..., channel][~brain[box]] == 0).all()
        name = record["channels"][channel]
        assert record["normalization"]["mean"][name] == pytest.approx(inside.mean())


def test_prediction_sees_the_image_of_the_store_and_not_the_segmentation(raw_case):
    paths = raw_case()
    image, label, record = preprocess.preprocess_case(only_case(paths))
    paths["seg"].write_bytes(b"damaged")
    seen, again = preprocess.load_for_prediction(only_case(paths))
    assert seen.dtype == np.float32
    np.testing.assert_array_equal(seen, image)
    assert again == record


def test_restore_takes_probabilities_and_refuses_other_shapes(raw_case):
    image, record = preprocess.load_for_prediction(only_case(raw_case()))
    assert preprocess.restore(image, record).shape == (*SHAPE, 4)
    with pytest.raises(ValueError, match="the crop"):
        preprocess.restore(image[1:], record)


def test_tumour_outside_the_brain_is_kept(raw_case):
    truth = np.zeros(SHAPE, np.uint8)
    truth[0, 0, 0], truth[6, 8, 7] = 2, 1
    _, label, record = preprocess.preprocess_case(only_case(raw_case(seg=truth)))
    np.testing.assert_array_equal(preprocess.restore(label, record), truth)


def test_bad_case_is_one_clear_error(raw_case):
    paths = raw_case(t1c=np.zeros(SHAPE), seg=np.full(SHAPE, 9.0))
    with pytest.raises(ValueError, match=r"constant image: .*t1c.nii.gz.* \(and 1 more problems\)"):
        preprocess.preprocess_case(only_case(paths))


def make(tmp_path, name="store", **options):
    return preprocess.preprocess(
        tmp_path / "raw", tmp_path / name, **{"workers": 1, "progress": False, **options}
    )


def content(path):
    """Relative path -> bytes of all files of a store that count."""
    return {p.relative_to(path): p.read_bytes() for p in path.rglob("*") if p.is_file() and p.name != ".lock"}


def test_store_holds_all_cases_with_canonical_labels_and_splits(raw_case, tmp_path):
    for number in range(3):
        raw_case(f"BraTS-SSA-{number:05d}-000")
    raw_case("BraTS2021_00009")
    raw_case("BraTS-SSA-00007-000", seg=None)
    made = make(tmp_path, val_fraction=0.25, test_fraction=0.25, folds=2)
    assert len(made.case_ids) == 5
    assert sorted(made.split("train") + made.split("val") + made.split("test")) == sorted(
        case_id for case_id in made.case_ids if case_id != "BraTS-SSA-00007-000"
    )
    _, label, record = made.load("BraTS2021_00009")
    assert set(np.unique(label)) == {0, 1, 2, 3} and record["label_scheme"] == "brats2021"
    assert made.data_hash.startswith("sha256:")


def test_two_workers_write_the_same_store_as_one(raw_case, tmp_path):
    for number in range(3):
        raw_case(f"BraTS-SSA-{number:05d}-000")
    one, two = make(tmp_path, "one"), make(tmp_path, "two", workers=2)
    assert content(one.path) == content(two.path)


def test_second_run_keeps_unchanged_cases_and_redoes_changed_ones(raw_case, tmp_path):
    first = raw_case("BraTS-SSA-00001-000")
    raw_case("BraTS-SSA-00002-000")
    raw_case("BraTS-SSA-00003-000")
    made = make(tmp_path)
    before = {name: os.stat(made.path / "cases" / name).st_ino for name in made.case_ids}
    os.utime(first["t1n"])  # touched, but the same content
    raw_case("BraTS-SSA-00002-000", t1c=np.asarray(nib.load(first["t2w"]).dataobj))
    (made.path / "cases" / "BraTS-SSA-00003-000" / "label.npy").write_bytes(b"damaged")
    again = make(tmp_path)
    after = {name: os.stat(made.path / "cases" / name).st_ino for name in made.case_ids}
    assert [before[name] == after[name] for name in made.case_ids] == [True, False, False]
    assert again.data_hash != made.data_hash
    again.load("BraTS-SSA-00003-000")


def test_other_label_map_redoes_the_cases(raw_case, tmp_path):
    truth = np.zeros(SHAPE, np.uint8)
    truth[6, 8, 6:9] = 1, 3, 4
    raw_case(seg=truth)
    with pytest.raises(ValueError, match="label value 4"):
        make(tmp_path)
    counts = [make(tmp_path, label_map={4: to}).cases["BraTS-SSA-00002-000"]["label_voxels"] for to in (0, 2)]
    assert [count[1:] for count in counts] == [[1, 0, 1], [1, 1, 1]]


def test_bad_cases_stop_the_run_and_keep_the_good_ones(raw_case, tmp_path):
    raw_case("BraTS-SSA-00001-000")
    raw_case("BraTS-SSA-00002-000", t1n=np.full(SHAPE, np.nan))
    with pytest.raises(ValueError, match=r"1 problem; .*--skip-bad\): BraTS-SSA-00002-000: NaN or Inf"):
        make(tmp_path)
    assert os.listdir(tmp_path / "store" / "cases") == ["BraTS-SSA-00001-000"]
    with pytest.raises(FileNotFoundError, match="not finished"):
        store.Store(tmp_path / "store")
    assert make(tmp_path, skip_bad=True).case_ids == ["BraTS-SSA-00001-000"]


def test_every_case_that_is_left_out_is_named_once_and_counted(raw_case, tmp_path, capfd):
    raw_case("BraTS-SSA-00001-000")
    for number in range(2, 10):
        raw_case(f"BraTS-SSA-{number:05d}-000", t1n=np.full(SHAPE, np.nan), t1c=np.full(SHAPE, np.nan))
    raw_case("BraTS-SSA-00010-000", t2w=None)
    make(tmp_path, skip_bad=True, progress=True)
    lines = [line for line in capfd.readouterr().err.splitlines() if "left out" in line]
    assert len(lines) == 10 and lines[-1] == "9 cases left out"
    named = {line.split(": ")[1] for line in lines[:-1]}
    assert named == {f"BraTS-SSA-{number:05d}-000" for number in range(2, 11)}
    assert sum("(and 1 more problems)" in line for line in lines) == 8


def test_pipe_or_endless_device_among_the_scans_is_a_problem_of_that_case(raw_case, tmp_path):
    first = raw_case("BraTS-SSA-00001-000")["t1n"]
    second = raw_case("BraTS-SSA-00002-000")["t2f"]
    first.unlink()
    os.mkfifo(first)  # nobody will ever write to it
    second.unlink()
    second.symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=r"2 problems; .*BraTS-SSA-00001-000: .*BraTS-SSA-00002-000: "):
        make(tmp_path)


def test_problem_of_names_stops_before_any_work(raw_case, tmp_path):
    raw_case("BraTS-SSA-00001-000", t1c=None)
    with pytest.raises(ValueError, match="missing modality"):
        make(tmp_path)
    with pytest.raises(ValueError, match="every case has problems"):
        make(tmp_path, skip_bad=True)
    (tmp_path / "raw").rename(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        make(tmp_path)


def test_wrong_options_stop_before_any_work(raw_case, tmp_path):
    raw_case()
    (tmp_path / "mine.json").write_text('{"train": ["nobody"]}')
    for options in (
        {"val_fraction": 2},
        {"folds": 1},
        {"splits": tmp_path / "mine.json"},
        {"label_map": {4: 9}},
    ):
        with pytest.raises(ValueError, match="val_fraction|folds|nobody|label map"):
            make(tmp_path, **options)
    assert not (tmp_path / "store").exists()


def test_store_of_other_cases_is_not_overwritten(raw_case, tmp_path):
    paths = raw_case("BraTS-SSA-00001-000")
    raw_case("BraTS-SSA-00002-000")
    made = make(tmp_path)
    before = content(made.path)
    paths["t1n"].parent.rename(tmp_path / "elsewhere")
    with pytest.raises(
        ValueError, match=r"holds 1 cases that the input lacks \(first: BraTS-SSA-00001-000\)"
    ):
        make(tmp_path)
    assert content(made.path) == before


def test_no_store_is_made_among_scans(raw_case, tmp_path):
    raw_case()
    raw_case(folder="others")
    for place in ("raw", "others"):
        before = content(tmp_path / place)
        with pytest.raises(ValueError, match=r"holds scans \(.*\); a store needs a folder of its own"):
            make(tmp_path, name=place)
        assert content(tmp_path / place) == before


def test_a_folder_of_other_files_does_not_become_a_store(raw_case, tmp_path):
    raw_case()
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds thesis.txt, which is no store's"):
        make(tmp_path)
    assert [file.name for file in (tmp_path / "store").iterdir()] == ["thesis.txt"]


def test_other_splits_of_a_store_are_told(raw_case, tmp_path, capfd):
    for number in range(4):
        raw_case(f"BraTS-SSA-0000{number}-000")
    make(tmp_path, val_fraction=0.25)
    make(tmp_path, val_fraction=0.25)
    assert "splits" not in capfd.readouterr().err
    make(tmp_path, val_fraction=0.5)
    assert "warning: the splits of" in capfd.readouterr().err


def test_killed_run_leaves_no_half_case_and_ends_like_an_uninterrupted_one(raw_case, tmp_path):
    for number in range(12):
        raw_case(f"BraTS-SSA-{number:05d}-000", shape=(23, 40, 31))
    whole = content(make(tmp_path, "whole").path)
    code = (
        "import sys\nfrom data_pipeline import preprocess\n"
        "preprocess.preprocess(sys.argv[1], sys.argv[2], workers=1, progress=False)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    target = tmp_path / "killed"
    for cases_before_the_kill in (2, 7):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "raw"), str(target)], env=environment
        )
        while process.poll() is None and len(list(target.glob("cases/BraTS*"))) < cases_before_the_kill:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        for folder in target.glob("cases/BraTS*"):
            assert sorted(os.listdir(folder)) == ["case.json", "image.npy", "label.npy"]
            assert (folder / "image.npy").read_bytes() == whole[(folder / "image.npy").relative_to(target)]
    assert content(make(tmp_path, "killed").path) == whole

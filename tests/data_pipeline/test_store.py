"""The store gives back what was put in, refuses what is damaged, and never shows half a case."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from data_pipeline import store

IDS = ["BraTS-SSA-00001-000", "BraTS-SSA-00002-000", "BraTS-SSA-00003-000"]


def arrays(seed, shape=(9, 11, 10)):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(*shape, 4)).astype(np.float16), rng.integers(0, 4, shape).astype(np.uint8)


@pytest.fixture
def made(tmp_path):
    path = tmp_path / "store"
    records = [
        store.write_case(path, name, *arrays(i), {"patient_id": name[:15]}) for i, name in enumerate(IDS[:2])
    ]
    records.append(store.write_case(path, IDS[2], arrays(2)[0], None, {"spacing_mm": [1, 1, 4.0]}))
    return store.write_dataset(
        path, records, {"train": IDS[:1], "fold0": {"train": [], "val": IDS[:2]}}, "hash"
    )


def test_arrays_and_table_come_back(made):
    assert made.case_ids == IDS and made.channels == ("t1n", "t1c", "t2w", "t2f")
    assert (made.label_scheme, made.normalization, made.data_hash) == ("brats2023", "zscore_brain", "hash")
    for i, case_id in enumerate(IDS[:2]):
        image, label, record = made.load(case_id)
        np.testing.assert_array_equal(image, arrays(i)[0])
        np.testing.assert_array_equal(label, arrays(i)[1])
        assert isinstance(image, np.memmap) and not image.flags.writeable
        assert made.cases[case_id]["label_voxels"] == [int((label == value).sum()) for value in range(4)]
        assert record["patient_id"] == case_id[:15] and record["shape"] == [9, 11, 10]
    image, label, record = made.load(IDS[2])
    assert label is None and record["foreground"] == {} and not made.cases[IDS[2]]["labelled"]
    assert made.spacing_mm == (1, 1, 1)


def test_foreground_points_at_voxels_of_its_region(made):
    _, label, record = made.load(IDS[0])
    for region, members in (("WT", (1, 2, 3)), ("TC", (1, 3)), ("ET", (3,))):
        index = record["foreground"][region]
        assert index.dtype == np.int32 and len(index) == np.isin(label, members).sum()
        assert np.isin(label[tuple(index.T)], members).all()


def test_foreground_is_bounded_and_drawn_by_case_id():
    label = np.full((20, 21, 22), 3, np.uint8)
    first, again, other = (store.foreground_index(label, name)["ET"] for name in ("a", "a", "b"))
    assert len(first) == 2000 and len(set(map(tuple, first))) == 2000
    assert first == again and first != other
    assert store.foreground_index(np.zeros((3, 4, 5), np.uint8), "a") == {"WT": [], "TC": [], "ET": []}


def test_splits_are_read_by_name(made):
    assert made.split("train") == IDS[:1] and made.split("fold0/val") == IDS[:2]
    for name in ("val", "fold0", "fold0/test", "train/x"):
        with pytest.raises(ValueError, match=f"no split '{name}'; there are train, fold0/train, fold0/val"):
            made.split(name)


def change(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_other_format_version_is_refused(made, version):
    change(made.path / "dataset.json", format_version=version)
    with pytest.raises(ValueError, match=f"format version {version!r}, this program reads version 1"):
        store.Store(made.path)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("dataset.json", "{", "dataset.json is no valid JSON"),
        ("dataset.json", "[]", "does not hold a JSON object"),
        ("dataset.json", '{"format_version": 1}', "field 'channels'"),
        ("splits.json", '{"train": ["x"]}', "names 'x', no case of this store"),
        ("splits.json", '{"train": 3}', "not a list of case ids"),
        ("splits.json", '{"train": [["x"]]}', "not a list of case ids"),
    ],
)
def test_damaged_tables_are_refused(made, file, content, words):
    (made.path / file).write_text(content)
    with pytest.raises(ValueError, match=words):
        store.Store(made.path)


def test_missing_or_unfinished_store_is_told_apart(made, tmp_path):
    with pytest.raises(FileNotFoundError, match="the store is not there"):
        store.Store(tmp_path / "nowhere")
    (made.path / "dataset.json").unlink()
    with pytest.raises(FileNotFoundError, match="was not finished"):
        store.Store(made.path)


@pytest.mark.parametrize(
    "name", ["../x", "a/b", "/etc", "", ".", "..", ".hidden", "a\0b", "x" * 300, "a\n", 3]
)
def test_case_ids_cannot_leave_the_store(made, name):
    with pytest.raises(ValueError, match="no plain name"):
        store.write_case(made.path, name, *arrays(0), {})
    with pytest.raises(ValueError, match="no case"):
        made.load(name)
    change(made.path / "dataset.json", cases={str(name): {"patient_id": "p", "labelled": True}})
    with pytest.raises(ValueError, match="plain name|no case"):
        store.Store(made.path).load(name)


def test_every_truncation_of_an_array_is_refused(made):
    for file in ("image.npy", "label.npy"):
        path = made.path / "cases" / IDS[0] / file
        data = path.read_bytes()
        for length in [*range(0, 200, 7), len(data) // 2, len(data) - 1]:
            path.write_bytes(data[:length])
            with pytest.raises(ValueError, match=f"{file} is damaged or truncated"):
                made.load(IDS[0])
        path.write_bytes(data)
    made.load(IDS[0])


def test_arrays_of_another_kind_are_refused(made):
    path = made.path / "cases" / IDS[0] / "image.npy"
    for array in (arrays(0)[0].astype(np.float32), arrays(0)[0][1:], np.array([{}], object)):
        np.save(path, array, allow_pickle=True)
        with pytest.raises(ValueError, match="image.npy"):
            made.load(IDS[0])
    path.unlink()
    with pytest.raises(FileNotFoundError, match="image.npy is missing"):
        made.load(IDS[0])


@pytest.mark.parametrize(
    "fields",
    [{"case_id": "other"}, {"shape": [9, 11]}, {"shape": [9, 11, 0]}, {"shape": "x"}, {"foreground": [1]},
     {"foreground": {"WT": [[0, 0, 99]]}}, {"foreground": {"WT": [[0, 0]]}}, {"foreground": {"WT": "x"}}],
)  # fmt: skip
def test_damaged_record_is_refused(made, fields):
    change(made.path / "cases" / IDS[0] / "case.json", **fields)
    with pytest.raises(ValueError, match="case.json is damaged"):
        made.load(IDS[0])


@pytest.mark.parametrize(
    ("image", "label", "words"),
    [
        (np.zeros((3, 4, 5, 4), np.float32), None, "float16"),
        (np.zeros((3, 4, 5, 3), np.float16), None, "D, H, W, 4"),
        (np.zeros((3, 4, 5, 4), np.float16), np.zeros((3, 4, 6), np.uint8), "label must be"),
        (np.zeros((3, 4, 5, 4), np.float16), np.zeros((3, 4, 5), np.int32), "label must be"),
        (np.zeros((3, 4, 5, 4), np.float16), np.full((3, 4, 5), 4, np.uint8), "found 4"),
    ],
)
def test_writing_wrong_arrays_is_refused_and_leaves_nothing(tmp_path, image, label, words):
    with pytest.raises(ValueError, match=words):
        store.write_case(tmp_path, "case", image, label, {})
    assert not list(tmp_path.rglob("*.npy"))


def test_failure_in_the_middle_leaves_the_old_case(made, monkeypatch):
    def fail(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(store.json, "dumps", fail)
    with pytest.raises(OSError, match="No space"):
        store.write_case(made.path, IDS[0], *arrays(7), {})
    np.testing.assert_array_equal(made.load(IDS[0])[0], arrays(0)[0])
    assert sorted(os.listdir(made.path / "cases")) == IDS


def test_second_writer_is_kept_out_and_leftovers_are_cleared(tmp_path):
    leftover = tmp_path / "cases" / ".BraTS-SSA-00001-000.17.tmp"
    leftover.mkdir(parents=True)
    code = f"from data_pipeline import store\nwith store.writing({str(tmp_path)!r}): pass"
    with store.writing(tmp_path):
        assert not leftover.exists()
        second = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=_environment()
        )
    assert second.returncode and "another process is writing this store" in second.stderr
    subprocess.run([sys.executable, "-c", code], check=True, env=_environment())


def _environment():
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}

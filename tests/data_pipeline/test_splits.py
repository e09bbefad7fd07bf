"""Splits keep patients together, follow the seed, and take the user's own lists."""

import json

import pytest

from data_pipeline.splits import make_splits, read_splits

COHORT = {f"BraTS-GLI-{p:05d}-{t:03d}": f"BraTS-GLI-{p:05d}" for p in range(11) for t in range(1 + p % 3)}


def patients(case_ids):
    return {COHORT[case_id] for case_id in case_ids}


def folds_of(splits):
    return [splits[name] for name in splits if name.startswith("fold")]


@pytest.mark.parametrize("seed", range(5))
def test_no_patient_is_on_two_sides(seed):
    splits = make_splits(COHORT, seed=seed, val_fraction=0.2, test_fraction=0.3)
    sides = [patients(splits[name]) for name in ("train", "val", "test")]
    assert sum(map(len, sides)) == 11 and len(set.union(*sides)) == 11
    for fold in folds_of(splits):
        assert not patients(fold["train"]) & patients(fold["val"])
        assert not patients(fold["train"] + fold["val"]) & sides[2]


def test_sizes_follow_the_fractions_of_patients():
    splits = make_splits(COHORT, val_fraction=0.2, test_fraction=0.3)
    assert [len(patients(splits[name])) for name in ("train", "val", "test")] == [11 - 2 - 3, 2, 3]


def test_folds_validate_every_patient_once():
    splits = make_splits(COHORT, test_fraction=0.2, folds=4)
    held_out = [case_id for fold in folds_of(splits) for case_id in fold["val"]]
    assert sorted(held_out) == sorted(set(COHORT) - set(splits["test"]))
    assert sorted(len(patients(fold["val"])) for fold in folds_of(splits)) == [2, 2, 2, 3]


def test_draw_depends_on_the_seed_and_not_on_the_order():
    backwards = dict(reversed(COHORT.items()))
    assert make_splits(COHORT, seed=3) == make_splits(backwards, seed=3)
    assert make_splits(COHORT, seed=3) != make_splits(COHORT, seed=4)


@pytest.mark.parametrize(
    ("count", "sizes", "folds"),
    [(0, (0, 0, 0), 0), (1, (1, 0, 0), 0), (2, (1, 1, 0), 2), (3, (1, 1, 1), 2), (4, (2, 1, 1), 3)],
)
def test_tiny_cohorts_keep_someone_to_train_on_and_get_fewer_folds(count, sizes, folds):
    splits = make_splits({f"c{i}": f"c{i}" for i in range(count)}, val_fraction=0.2, test_fraction=0.2)
    assert tuple(len(splits[name]) for name in ("train", "val", "test")) == sizes
    assert len(folds_of(splits)) == folds


@pytest.mark.parametrize(
    "options", [{"val_fraction": 1.0}, {"test_fraction": -0.1}, {"val_fraction": 0.6, "test_fraction": 0.4},
                {"folds": 1}, {"folds": -2}],
)  # fmt: skip
def test_impossible_options_are_refused(options):
    with pytest.raises(ValueError, match="|".join(options)):
        make_splits(COHORT, **options)


def write(tmp_path, content):
    path = tmp_path / "splits.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_named_lists_are_taken_as_they_are(tmp_path):
    path = write(tmp_path, {"train": ["b", "a"], "test": ["c"], "fold0": {"train": ["c"], "val": ["a"]}})
    assert read_splits(path, dict(a="a", b="b", c="c")) == {
        "train": ["a", "b"],
        "val": [],
        "test": ["c"],
        "fold0": {"train": ["c"], "val": ["a"]},
    }


def test_nnunet_list_becomes_folds_and_the_first_is_train_and_val(tmp_path):
    path = write(tmp_path, [{"train": ["a"], "val": ["b"]}, {"train": ["b"], "val": ["a"]}])
    splits = read_splits(path, dict(a="a", b="b"))
    assert splits["fold1"] == {"train": ["b"], "val": ["a"]}
    assert (splits["train"], splits["val"], splits["test"]) == (["a"], ["b"], [])


def test_cases_left_out_on_purpose_are_dropped(tmp_path):
    path = write(tmp_path, {"train": ["a", "bad"], "val": ["b"]})
    assert read_splits(path, dict(a="a", b="b"), {"bad"})["train"] == ["a"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"train": ["a", "x"]}, "train names 'x'"),
        ({"train": ["a", "a"]}, "twice"),
        ({"train": ["a1"], "val": ["a2"]}, "patient a is in both train and val"),
        ([{"train": ["a1"], "val": ["a2"]}], "patient a is in both train and val"),
        ({"train": "a"}, "not a list"),
        ({"train": [1]}, "not a list"),
        ([["a"]], "expected an object"),
        ({"fold0": {"train": ["a"]}}, "must hold the two lists"),
        ("{", "no valid JSON"),
        ("[" * 100_000, "no valid JSON"),
        ("3", "expected an object"),
        ("[]", "expected an object"),
        ("\udcff".encode("utf-8", "surrogateescape").decode("latin1"), "no valid JSON"),
    ],
)
def test_wrong_files_are_refused_in_one_line(tmp_path, content, words):
    cohort = {"a": "a", "a1": "a", "a2": "a"}
    with pytest.raises(ValueError, match=words) as caught:
        read_splits(write(tmp_path, content), cohort)
    assert "splits.json" in str(caught.value) and "\n" not in str(caught.value)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.json: no such file"):
        read_splits(tmp_path / "nowhere.json", COHORT)


def test_more_folds_than_patients_are_refused():
    with pytest.raises(ValueError, match="folds is 100, but there are 2 patients to divide: give at most 2"):
        make_splits({"a": "a", "b": "b"}, folds=100, val_fraction=0)

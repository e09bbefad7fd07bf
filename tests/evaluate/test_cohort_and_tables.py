"""Whole folders: coverage, checks before work, parallel equality, tidy files."""

import math

import nibabel as nib
import numpy as np
import pytest

from data_pipeline import parallel
from mednext_jax.evaluate import cohort, measure, summary, tables

SETTINGS = measure.Settings({"A": (1, 2), "B": (2,)})


def _case(seed):
    rng = np.random.default_rng(seed)
    labels = np.zeros((9, 10, 11), np.uint8)
    labels[2:7, 3:8, 2:8] = 1
    labels[3:5, 4:6, 4 : 6 + rng.integers(0, 2)] = 2
    labels[tuple(rng.integers(0, 9, 3))] = 1
    return labels


def _write(folder, cases, seed=0, affine=None):
    folder.mkdir(exist_ok=True)
    affine = np.eye(4) if affine is None else affine
    for i, case in enumerate(cases):
        nib.save(nib.Nifti1Image(_case(seed + i), affine), folder / f"{case}.nii.gz")
    return folder


@pytest.fixture
def folders(tmp_path):
    truth = cohort.open_folder("references", _write(tmp_path / "truth", "abcd"))
    first = cohort.open_folder("first", _write(tmp_path / "first", "abcx", seed=1))
    second = cohort.open_folder("second", _write(tmp_path / "second", "abcd", seed=2))
    return truth, first, second


def test_missing_and_extra_cases_are_listed(folders):
    truth, *arms = folders
    found = cohort.evaluate(arms, truth, SETTINGS)
    assert found.missing == {"first": ("d",), "second": ()}
    assert found.extra == {"first": ("x",), "second": ()}
    assert found.table.cases("first") == ["a", "b", "c"]


def test_parallel_and_serial_evaluation_give_the_same_rows(folders):
    truth, *arms = folders

    def in_two_processes(function, items, title):
        return parallel.run(function, items, workers=2, title=title)

    serial, several = (cohort.evaluate(arms, truth, SETTINGS, run) for run in (cohort.in_turn, in_two_processes))
    assert [repr(r) for r in serial.table.rows()] == [repr(r) for r in several.table.rows()]


def test_geometry_error_names_arm_and_case_before_anything_is_measured(folders, tmp_path, monkeypatch):
    moved = np.eye(4)
    moved[1, 3] = 2.0
    _write(tmp_path / "third", "ab")
    _write(tmp_path / "third", "b", affine=moved)
    monkeypatch.setattr(measure, "measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(ValueError, match=r"case b \(third\).*2 mm apart"):
        cohort.evaluate([cohort.open_folder("third", tmp_path / "third")], folders[0], SETTINGS)


def test_arm_without_any_shared_case_is_an_error(folders, tmp_path):
    other = cohort.open_folder("other", _write(tmp_path / "other", "z"))
    with pytest.raises(ValueError, match="other: no case.*found z, looked for a"):
        cohort.evaluate([other], folders[0], SETTINGS)


def test_a_file_that_is_its_own_reference_is_refused(folders, tmp_path):
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "b.nii.gz").symlink_to(tmp_path / "truth" / "b.nii.gz")
    for same in (tmp_path / "truth", tmp_path / "linked"):
        with pytest.raises(ValueError, match=r"case [ab] \(same\): .* is both prediction and reference"):
            cohort.evaluate([cohort.open_folder("same", same)], folders[0], SETTINGS)


def test_value_outside_the_scheme_names_the_file(folders):
    truth, first, _ = folders
    with pytest.raises(ValueError, match=r"first.a.nii.gz: label \[2\] is unknown"):
        cohort.evaluate([cohort.relabelled(first, "mine", {0: 0, 1: 1})], truth, SETTINGS)


def test_table_survives_writing_and_reading(folders, tmp_path):
    truth, *arms = folders
    table = cohort.evaluate(arms, truth, SETTINGS).table
    table.add("first", "a", "B", {"dice": math.nan, "hd95_mm": 1 / 3})
    tables.write_table(tmp_path / "metrics.csv", table)
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert lines[0] == "arm,case_id,region,metric,value"
    assert "first,a,B,dice,nan" in lines and "first,a,B,hd95_mm,0.3333333333333333" in lines
    again = tables.read_table(tmp_path / "metrics.csv")
    assert [repr(r) for r in again.rows()] == [repr((*r[:4], float(r[4]))) for r in table.rows()]
    assert [p.name for p in tmp_path.glob(".*")] == []


def test_broken_table_is_refused_with_its_line(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("a,b\n")
    with pytest.raises(ValueError, match="first line"):
        tables.read_table(path)
    path.write_text("arm,case_id,region,metric,value\nx,a,A,dice,much\n")
    with pytest.raises(ValueError, match="line 2"):
        tables.read_table(path)


def test_runs_with_a_seed_mark_are_repetitions_of_one_arm():
    table = tables.Table()
    for run, shift in (("peft@0", 0.0), ("peft@1", 0.2), ("full", 0.1)):
        for i, case in enumerate("abc"):
            table.add(run, case, "A", {"dice": 0.1 * i + shift})
    assert table.arms == {"peft": ["peft@0", "peft@1"], "full": ["full"]}
    np.testing.assert_allclose(table.matrix("peft", "A", "dice"), [[0.0, 0.1, 0.2], [0.2, 0.3, 0.4]])
    found = summary.summarise(table)
    assert found.descriptions["peft", "A", "dice"].n_seeds == 2
    assert found.comparisons["peft", "full", "A", "dice"].mean_difference == pytest.approx(0.0)


def test_mean_region_averages_what_is_defined_in_a_case():
    table = tables.Table()
    table.add("x", "a", "A", {"dice": 0.5, "volume_mm3": 1})
    table.add("x", "a", "B", {"dice": math.nan, "volume_mm3": 3})
    table.add("x", "b", "A", {"dice": 0.5, "volume_mm3": 1})
    table.add("x", "b", "B", {"dice": 0.7, "volume_mm3": 3})
    np.testing.assert_allclose(table.matrix("x", "mean", "dice"), [[0.5, 0.6]])
    assert summary.regions_of(table, "dice") == ["A", "B", "mean"]
    assert summary.regions_of(table, "volume_mm3") == ["A", "B"]


def test_holm_family_is_all_tests_of_a_metric():
    rng = np.random.default_rng(0)
    table = tables.Table()
    for run in ("x", "y", "z"):
        for case in "abcdefgh":
            table.add(run, case, "A", {"dice": rng.random()})
    found = summary.summarise(table).comparisons
    p = {key: c.p for key, c in found.items()}
    smallest = min(p, key=p.get)
    assert found[smallest].p_holm == pytest.approx(min(1.0, 3 * p[smallest]))

"""The scan finds cases as people keep them, and says what keeps a folder from being a case."""

import gzip
import os

import pytest

from data_pipeline import cohorts

OLD = ("flair", "t1", "t1ce", "t2", "seg")
NEW = ("t2f", "t1n", "t1c", "t2w", "seg")


def touch(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"")


def touch_case(folder, case_id, ending=".nii.gz", contents=None):
    suffixes = [f"-{n}" for n in NEW] if case_id.startswith("BraTS-") else [f"_{n}" for n in OLD]
    touch(folder, *(f"{case_id}{s}{ending}" for s in suffixes if contents is None or s[1:] in contents))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("BraTS2021_00000_t1ce.nii.gz", ("BraTS2021_00000", "BraTS2021_00000", "t1c", "brats2021")),
        (
            "BraTS20_Training_001_flair.nii",
            ("BraTS20_Training_001", "BraTS20_Training_001", "t2f", "brats2021"),
        ),
        ("BraTS19_CBICA_AAB_1_t2.nii.gz", ("BraTS19_CBICA_AAB_1", "BraTS19_CBICA_AAB_1", "t2w", "brats2021")),
        ("BraTS-SSA-00002-000-t1n.nii.gz", ("BraTS-SSA-00002-000", "BraTS-SSA-00002", "t1n", "brats2023")),
        ("BraTS-GLI-00005-101-seg.nii", ("BraTS-GLI-00005-101", "BraTS-GLI-00005", "seg", "brats2023")),
        ("BraTS-GoAT-00012-t2f.nii.gz", ("BraTS-GoAT-00012", "BraTS-GoAT-00012", "t2f", "brats2023")),
        ("BraTS-SSA-00002-000_t1n.nii.gz", None),
        ("BraTS2021_00000_t1n.nii.gz", None),
        ("BraTS-SSA-..-000-t1n.nii.gz", None),
        ("patient7_t1.nii.gz", None),
    ],
)
def test_file_name_is_read(name, expected):
    found = cohorts.parse_name(name)
    assert (found and (found.case_id, found.patient_id, found.content, found.naming)) == expected


def test_scan_finds_flat_nested_old_and_new_cases_in_order(tmp_path):
    touch_case(tmp_path, "BraTS-SSA-00009-000")
    touch_case(tmp_path / "a b" / "größe" / "x", "BraTS2021_00003", ".nii")
    touch_case(tmp_path / "deep" / "er" / "still", "BraTS-GLI-00001-000", contents=NEW[:4])
    cases = cohorts.scan(tmp_path)
    assert [case.case_id for case in cases] == [
        "BraTS-GLI-00001-000",
        "BraTS-SSA-00009-000",
        "BraTS2021_00003",
    ]
    assert [case.segmentation is None for case in cases] == [True, False, False]
    assert all(tuple(case.images) == ("t1n", "t1c", "t2w", "t2f") for case in cases)
    assert cases[2].images["t1c"].name == "BraTS2021_00003_t1ce.nii"
    assert cases[2].images["t2f"].name == "BraTS2021_00003_flair.nii"


def test_scan_groups_time_points_by_patient(tmp_path):
    for case_id in ("BraTS-GLI-00005-000", "BraTS-GLI-00005-001", "BraTS-GLI-00006-000"):
        touch_case(tmp_path / case_id, case_id)
    assert [c.patient_id for c in cohorts.scan(tmp_path)] == ["BraTS-GLI-00005"] * 2 + ["BraTS-GLI-00006"]


def test_scan_takes_the_name_of_a_folder_per_file(tmp_path):
    for name in NEW:
        touch(tmp_path / f"BraTS-GLI-00001-000-{name}.nii", "00000057_brain.nii")
    (case,) = cohorts.scan(tmp_path)
    assert case.case_id == "BraTS-GLI-00001-000"


def test_scan_survives_symlink_loops_and_follows_links(tmp_path):
    touch_case(tmp_path / "real", "BraTS-SSA-00002-000")
    folder = tmp_path / "cohort"
    folder.mkdir()
    os.symlink(tmp_path / "real", folder / "linked")
    os.symlink(folder, folder / "loop")
    os.symlink(folder / "self", folder / "self")
    os.symlink(tmp_path / "real", folder / "linked_again")
    assert [case.case_id for case in cohorts.scan(folder)] == ["BraTS-SSA-00002-000"]


def test_scan_ignores_hidden_files_and_folders(tmp_path):
    touch_case(tmp_path / "case", "BraTS-SSA-00002-000")
    touch(tmp_path / "case", "._BraTS-SSA-00002-000-t1n.nii.gz", ".hidden.nii.gz")
    touch_case(tmp_path / ".trash", "BraTS-SSA-00002-000")
    touch_case(tmp_path / "__MACOSX", "BraTS-SSA-00002-000")
    cases, problems = cohorts.survey(tmp_path)
    assert len(cases) == 1 and not problems


def test_survey_reports_each_problem_once_and_keeps_the_good_cases(tmp_path):
    touch_case(tmp_path / "good", "BraTS-SSA-00001-000")
    touch_case(tmp_path / "partial", "BraTS-SSA-00002-000", contents=("t1n", "t2w", "seg"))
    touch_case(tmp_path / "one", "BraTS-SSA-00003-000")
    touch_case(tmp_path / "two", "BraTS-SSA-00003-000", contents=("t1c",))
    touch_case(tmp_path / "both", "BraTS-SSA-00004-000")
    touch_case(tmp_path / "both", "BraTS-SSA-00004-000", ".nii", ("t2f",))
    touch(tmp_path, "W39_1998.09.19_Segm.nii", "readme.txt", "scan.NII.GZ")
    cases, problems = cohorts.survey(tmp_path)
    assert [case.case_id for case in cases] == ["BraTS-SSA-00001-000"]
    assert sorted((p.case_id, p.kind) for p in problems) == [
        ("", "unknown name"),
        ("", "unknown name"),
        ("BraTS-SSA-00002-000", "missing modality"),
        ("BraTS-SSA-00003-000", "duplicate case"),
        ("BraTS-SSA-00004-000", "duplicate case"),
    ]
    (missing,) = [p for p in problems if p.kind == "missing modality"]
    assert "no t1c, t2f in" in missing.message and "partial" in missing.message


def test_scan_raises_for_an_incomplete_case_but_not_for_a_stray_file(tmp_path):
    touch_case(tmp_path, "BraTS-SSA-00001-000")
    touch(tmp_path, "stray.nii.gz")
    assert len(cohorts.scan(tmp_path)) == 1
    touch_case(tmp_path, "BraTS-SSA-00002-000", contents=("t1n",))
    with pytest.raises(ValueError, match="BraTS-SSA-00002-000: missing modality: no t1c, t2w, t2f"):
        cohorts.scan(tmp_path)


def test_scan_says_how_files_should_be_named_when_it_finds_nothing(tmp_path):
    (tmp_path / "x.nii.gz").write_bytes(gzip.compress(b""))
    with pytest.raises(ValueError, match="named like BraTS2021_00000_flair.nii.gz"):
        cohorts.scan(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        cohorts.scan(tmp_path / "nowhere")


def test_problem_with_an_undecodable_name_is_one_printable_line(tmp_path):
    (tmp_path / os.fsdecode(b"line\nbreak\xff.nii.gz")).write_bytes(b"")
    _, (problem,) = cohorts.survey(tmp_path)
    str(problem).encode("utf-8")
    assert "\n" not in str(problem) and "line\\nbreak" in str(problem)

"""launch/evaluate.py as a user runs it, on predictions of a tool that knows nothing of ours."""

import csv
import gzip
import json
import os
import re
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
ARRAYS = np.load(GOLDEN / "metrics_public.npz")
EXPECTED = json.loads((GOLDEN / "metrics_public.json").read_text())["cases"]
QUICK = ("--workers=1", "--viewer_cases=0")


def _evaluate(*arguments):
    """Runs the command; returns (exit code, stdout, stderr)."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "evaluate.py"), *map(str, arguments)],
        capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def _nifti(path, array, spacing=(1, 1, 1), origin=(0, 0, 0), kind="uint8"):
    """A NIfTI-1 file written byte by byte, as another tool would, in its own data type and scaling."""
    codes = {"uint8": (2, 8), "int16": (4, 16), "float32": (16, 32)}
    header = bytearray(352)
    struct.pack_into("<i", header, 0, 348)
    struct.pack_into("<8h", header, 40, 3, *array.shape, 1, 1, 1, 1)
    struct.pack_into("<2h", header, 70, *codes[kind])
    struct.pack_into("<8f", header, 76, 1, *spacing, 0, 0, 0, 0)
    struct.pack_into("<3f", header, 108, 352, 0.5 if kind == "int16" else 1, 0)  # offset, slope, intercept
    struct.pack_into("<2h", header, 252, 0, 1)  # no qform, an sform
    for row in range(3):
        values = [0.0] * 4
        values[row], values[3] = spacing[row], origin[row]
        struct.pack_into("<4f", header, 280 + 16 * row, *values)
    header[344:348] = b"n+1\0"
    stored = array * 2 if kind == "int16" else array
    content = bytes(header) + np.asfortranarray(stored.astype(kind)).tobytes(order="F")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.name.endswith(".gz") else content)


def test_ctrl_c_while_workers_start_ends_in_one_line(tmp_path):
    cube = np.zeros((9, 8, 7), int)
    cube[2:5, 2:5, 2:5] = 2
    for number in range(6):
        for folder in ("refs", "preds"):
            _nifti(tmp_path / folder / f"BraTS-SSA-{number:05d}-000.nii", cube)
    heed = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    run = subprocess.Popen(
        [sys.executable, "-c", heed,  # a suite in the background ignores SIGINT, and its children inherit that
         sys.executable, str(ROOT / "launch" / "evaluate.py"), f"--predictions={tmp_path / 'preds'}",
         f"--references={tmp_path / 'refs'}", f"--output={tmp_path / 'out'}", "--workers=2"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    for line in run.stdout:
        if line.startswith("preds: 6 label maps"):
            break
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does: to the workers, which are importing, as well
    rest = run.communicate(timeout=120)[0]
    assert rest == "interrupted\n" and run.returncode == 130
    assert not any((tmp_path / "out").iterdir())


@pytest.fixture(scope="module")
def golden_run(tmp_path_factory):
    """The golden cases as a stranger's files: references nested as downloaded, predictions in float32."""
    root = tmp_path_factory.mktemp("golden")
    for case in EXPECTED:
        name, spacing = f"BraTS-SSA-0000{case}-000", ARRAYS[f"{case}/spacing"]
        _nifti(root / "refs" / name / f"{name}-seg.nii", ARRAYS[f"{case}/truth"], spacing)
        _nifti(root / "tool" / f"{name}.nii.gz", ARRAYS[f"{case}/pred"], spacing, kind="float32")
    code, out, err = _evaluate(
        f"--predictions=tool={root / 'tool'}", f"--references={root / 'refs'}", f"--output={root / 'out'}",
        "--format=brats2023", "--challenge=GLI", "--workers=1", "--note=simulated", "--viewer_cases=1",
    )  # fmt: skip
    assert code == 0, err
    assert ("no 3-D viewer" in err) != (root / "out" / "viewer.html").exists()
    return root / "out", out


def _rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_metrics_csv_holds_the_golden_numbers(golden_run):
    rows = _rows(golden_run[0] / "metrics.csv")
    assert list(rows[0]) == ["arm", "case_id", "region", "metric", "value"]
    found = {(r["case_id"], r["region"], r["metric"]): r["value"] for r in rows}
    for case, expected in EXPECTED.items():
        for region in ("WT", "TC", "ET"):
            label = expected["per_label"][region]
            golden = {
                "dice": label["deepmind_surface_distance"]["dice"],
                "nsd_1mm": label["deepmind_surface_distance"]["nsd_1mm"],
                "hd95_mm": label["deepmind_surface_distance"]["hd95"],
                "hd95_max_directed_mm": label["scipy"]["hd95_max_of_directed"],
                "hd95_pooled_mm": label["scipy"]["hd95_pooled"],
                "assd_mm": label["scipy"]["assd"],
                "lesionwise_dice": expected["brats2023"]["BraTS-GLI"][region]["LesionWise_Score_Dice"],
                "lesions_fp": expected["brats2023"]["BraTS-GLI"][region]["Num_FP"],
            }
            for metric, value in golden.items():
                ours = found[f"BraTS-SSA-0000{case}-000", region, metric]
                if value not in (None, "nan", "inf"):
                    assert float(ours) == pytest.approx(float(value), abs=1e-6), (case, region, metric)
                else:  # absent in both: undefined; absent in one: the penalty
                    assert ours in ("nan", "374")


def test_official_table_is_written_on_request(golden_run):
    rows = {(r["case_id"], r["Labels"]): r for r in _rows(golden_run[0] / "brats2023.csv")}
    for case, expected in EXPECTED.items():
        for region, official in expected["brats2023"]["BraTS-GLI"].items():
            row = rows[f"BraTS-SSA-0000{case}-000", region]
            for name, value in official.items():
                assert float(row[name]) == pytest.approx(float(value), abs=1e-6), (case, region, name)


def test_summary_and_report_are_written_and_nothing_else_is_left(golden_run):
    folder, out = golden_run
    content = json.loads((folder / "summary.json").read_text())
    dice = content["arms"]["tool"]["WT"]["dice"]
    assert dice["n"] == 5 and dice["n_undefined"] == 1
    assert content["settings"]["absent_regions"]["policy"] == "penalise"
    assert content["runs"]["tool"]["missing"] == [] and len(content["sha256"]["tool"]) == len(EXPECTED)
    page = (folder / "report.html").read_text()
    assert "simulated" in page and "http://" not in page.replace("http://www.w3.org", "") and "<img" in page
    assert {p.name for p in folder.iterdir()} - {"viewer.html"} == {
        "brats2023.csv", "lesions.csv", "metrics.csv", "report.html", "summary.json",
    }  # fmt: skip
    assert "Dice" in out and "n=5" in out


def test_two_arms_in_different_label_schemes_are_compared_and_gaps_are_listed(tmp_path):
    for case in "03":
        truth, pred = ARRAYS[f"{case}/truth"], ARRAYS[f"{case}/pred"]
        _nifti(tmp_path / "refs" / f"c{case}.nii.gz", truth, kind="int16")
        _nifti(tmp_path / "new" / f"c{case}.nii.gz", pred)
        _nifti(tmp_path / "old" / f"c{case}.nii.gz", np.where(pred == 3, 4, pred))
    _nifti(tmp_path / "old" / "c9.nii.gz", np.where(pred == 3, 4, pred))
    (tmp_path / "new" / "c3.nii.gz").unlink()
    code, out, err = _evaluate(
        f"--predictions={tmp_path / 'new'}", f"--predictions=b={tmp_path / 'old'}",
        f"--references={tmp_path / 'refs'}", f"--output={tmp_path / 'out'}", *QUICK,
    )  # fmt: skip
    assert code == 0 and "no 3-D viewer" not in err, err
    assert "labels brats2021" in out and "labels brats2023" in out
    line = "new has no prediction for 1 of 2 reference cases, which are in none of its means: c3"
    assert f"WARNING: {line}" in out and "b: 1 extra cases, without a reference: c9" in err
    assert f'<p class="banner" role="note">Incomplete: {line}.</p>' in (tmp_path / "out" / "report.html").read_text()
    content = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert content["runs"]["new"]["missing"] == ["c3"] and content["runs"]["b"]["extra"] == ["c9"]
    dice = next(c for c in content["comparisons"] if c["metric"] == "dice" and c["region"] == "ET")
    assert dice["first"] == "new" and dice["n"] == 1 and dice["mean_difference"] == 0 and dice["ties"] == 1
    assert not (tmp_path / "out" / "viewer.html").exists()


def test_missing_predictions_end_in_exit_code_1_where_all_are_required(tmp_path):
    labels = np.zeros((8, 9, 10), np.uint8)
    labels[2:6, 2:6, 2:6] = 1
    for file in ("refs/a", "refs/b", "pred/a"):
        _nifti(tmp_path / f"{file}.nii.gz", labels)
    arguments = (f"--predictions={tmp_path / 'pred'}", f"--references={tmp_path / 'refs'}", "--require_all", *QUICK)
    code, out, err = _evaluate(*arguments, f"--output={tmp_path / 'out'}")
    assert code == 1 and "WARNING: pred has no prediction for 1 of 2" in out
    assert err == "error: predictions are missing, and --require_all was given\n"
    assert (tmp_path / "out" / "summary.json").exists()
    assert (tmp_path / "out" / "report.html").exists()
    (tmp_path / "refs" / "b.nii.gz").unlink()
    code, out, _ = _evaluate(*arguments, "--nopage", f"--output={tmp_path / 'out'}")
    assert code == 0 and "WARNING" not in out
    assert not (tmp_path / "out" / "report.html").exists()  # it told of the evaluation before


def test_references_of_two_brats_releases_are_read_by_their_names(tmp_path):
    labels = np.zeros((8, 9, 10), np.uint8)
    labels[2:6, 2:6, 2:6], labels[3, 3, 3] = 2, 3
    old, new = "BraTS2021_00017", "BraTS-SSA-00002-000"
    _nifti(tmp_path / "refs" / f"{old}_seg.nii.gz", np.where(labels == 3, 4, labels))
    _nifti(tmp_path / "refs" / f"{new}-seg.nii.gz", labels)
    for name in (old, new):
        _nifti(tmp_path / "pred" / f"{name}.nii.gz", labels)
    code, out, err = _evaluate(f"--predictions={tmp_path / 'pred'}", f"--references={tmp_path / 'refs'}",
                               f"--output={tmp_path / 'out'}", *QUICK)  # fmt: skip
    assert code == 0, err
    assert "labels brats2023, brats2021 in 1 cases" in out
    dice = {r["case_id"]: float(r["value"]) for r in _rows(tmp_path / "out" / "metrics.csv")
            if (r["region"], r["metric"]) == ("ET", "dice")}  # fmt: skip
    assert dice == {old: 1.0, new: 1.0}


def test_every_table_of_the_report_scrolls_in_its_own_box(golden_run):
    page = (golden_run[0] / "report.html").read_text()
    boxes = re.findall(r'<div class="scroll[^>]*>\s*<table', page)
    assert len(boxes) == page.count("<table") > 3
    assert re.search(r"\.scroll \{[^}]*overflow-x: auto", page)


def test_a_place_that_can_not_be_written_is_told_before_anything_is_read(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in ("refs", "pred"):
        _nifti(tmp_path / folder / "a.nii.gz", np.ones((8, 9, 10)))
    for place in ("file", "file/below"):
        code, out, err = _evaluate(f"--predictions={tmp_path / 'pred'}", f"--references={tmp_path / 'refs'}",
                                   f"--output={tmp_path / place}", *QUICK)  # fmt: skip
        assert (code, out) == (1, "") and err.count("\n") == 1
        assert "a file where a folder is needed; give another path" in err and str(tmp_path / "file") in err


def test_folders_are_looked_for_before_any_is_read_and_empty_label_maps_are_told(tmp_path):
    labels = np.zeros((8, 9, 10), np.uint8)
    _nifti(tmp_path / "pred" / "a.nii.gz", labels)
    labels[2:6, 2:6, 2:6] = 1
    _nifti(tmp_path / "refs" / "a.nii.gz", labels)
    arguments = (f"--references={tmp_path / 'refs'}", f"--output={tmp_path / 'out'}", *QUICK)
    code, out, err = _evaluate(f"--predictions={tmp_path / 'absent'}", *arguments)
    assert (code, out) == (1, "") and "absent: no such folder" in err
    code, out, err = _evaluate(f"--predictions={tmp_path / 'pred'}", *arguments)
    assert code == 0 and err == "WARNING: every label map of pred is empty\n"


def test_results_do_not_take_the_place_of_what_is_no_evaluations(tmp_path):
    labels = np.zeros((8, 9, 10), np.uint8)
    labels[2:6, 2:6, 2:6] = 1
    for folder in ("refs", "pred"):
        _nifti(tmp_path / folder / "a.nii.gz", labels)
    arguments = (f"--predictions={tmp_path / 'pred'}", f"--references={tmp_path / 'refs'}", *QUICK)
    for folder in ("refs", "pred"):
        code, _, err = _evaluate(*arguments, f"--output={tmp_path / folder}")
        assert code == 1 and "holds the label maps to be measured" in err
    out = tmp_path / "out"
    out.mkdir()
    (out / "metrics.csv").write_text("my,own")
    code, _, err = _evaluate(*arguments, f"--output={out}")
    assert code == 1 and "metrics.csv was not written by this program" in err
    (out / "metrics.csv").rename(out / "mine.csv")
    for _ in range(2):  # an evaluation is replaced by the same one
        code, said, err = _evaluate(*arguments, f"--output={out}")
        assert code == 0, err
        assert "metrics.csv, report.html, summary.json" in said and "mine.csv" not in said
    _nifti(tmp_path / "pred" / "a.nii.gz", np.roll(labels, 1, 0))
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000,) * 2)"  # less than the page needs
    limited = f"import os, resource, sys; {limit}; os.execv(sys.argv[1], sys.argv[1:])"
    failed = subprocess.run(
        [sys.executable, "-c", limited, sys.executable, ROOT / "launch" / "evaluate.py", *arguments, f"--output={out}"],
        capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert failed.returncode == 1 and failed.stderr.startswith(f"error: {out}: more was to be written")
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_regions_of_any_label_map_are_given_by_json(tmp_path):
    labels = np.zeros((8, 9, 10), np.uint8)
    labels[2:6, 2:6, 2:6], labels[6, 6, 6] = 7, 12
    _nifti(tmp_path / "refs" / "a.nii.gz", labels)
    _nifti(tmp_path / "pred" / "a.nii.gz", labels)
    regions = tmp_path / "regions.json"
    regions.write_text('{"regions": {"liver": [7, 12], "tumour": [12]}}')
    code, _, err = _evaluate(
        f"--predictions={tmp_path / 'pred'}", f"--references={tmp_path / 'refs'}",
        f"--output={tmp_path / 'out'}", f"--regions={regions}", *QUICK,
    )  # fmt: skip
    assert code == 0, err
    assert {r["region"] for r in _rows(tmp_path / "out" / "metrics.csv")} == {"liver", "tumour"}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"shape": (7, 9, 10)}, "case a (pred): prediction has shape (7, 9, 10), reference (8, 9, 10)"),
        ({"origin": (0, 0, 5)}, "case a (pred): prediction and reference lie up to 5 mm apart"),
        ({"value": 9}, "label values [0, 9] fit no scheme (first in case a"),
        ({"case": "b"}, "pred: no case in"),
        ({"flag": "--regions={broken"}, "--regions={broken: not JSON"),
        ({"flag": "--predictions=references=x"}, "the name 'references' means the truth; give another"),
        ({"flag": "--labels=other=brats2021"}, "--labels names ['other']"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_bad_input_is_one_line_and_exit_code_1(tmp_path, change, message):
    shape, value = change.get("shape", (8, 9, 10)), change.get("value", 1)
    _nifti(tmp_path / "refs" / "a.nii.gz", np.ones((8, 9, 10)))
    labels = np.zeros(shape)
    labels[2, 2, 2] = value
    file = tmp_path / "pred" / f"{change.get('case', 'a')}.nii.gz"
    _nifti(file, labels, origin=change.get("origin", (0, 0, 0)))
    code, _, err = _evaluate(
        f"--predictions={tmp_path / 'pred'}", f"--references={tmp_path / 'refs'}",
        f"--output={tmp_path / 'out'}", *QUICK, *([change["flag"]] if "flag" in change else []),
    )  # fmt: skip
    assert code == 1
    assert message in err and err.count("\n") == 1 and "Traceback" not in err
    assert list((tmp_path / "out").glob("*")) == []

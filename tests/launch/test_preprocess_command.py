"""The command prints what it found, ends with the right code, and never shows a traceback for bad input."""

import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments):
    command = [sys.executable, str(ROOT / "launch" / "preprocess.py"), *map(str, arguments)]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": "/nonexistent"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


@pytest.fixture
def raw(tmp_path):
    """Two sound cases under a folder with a space and a letter outside ASCII."""
    folder = tmp_path / "räw data"
    rng = np.random.default_rng(0)
    for number in range(2):
        name = f"BraTS-SSA-{number:05d}-000"
        (folder / name).mkdir(parents=True)
        for content in ("t1n", "t1c", "t2w", "t2f", "seg"):
            array = np.zeros((9, 12, 11), np.uint8)
            array[2:7, 3:9, 2:8] = 2 if content == "seg" else rng.integers(1, 200, (5, 6, 6))
            nib.save(nib.Nifti1Image(array, np.eye(4)), folder / name / f"{name}-{content}.nii.gz")
    return folder


def test_command_makes_a_store_with_the_users_splits(raw, tmp_path):
    splits = tmp_path / "splits_final.json"
    splits.write_text(json.dumps([{"train": ["BraTS-SSA-00000-000"], "val": ["BraTS-SSA-00001-000"]}]))
    result = run(f"--input={raw}", f"--output={tmp_path / 'store'}", f"--splits={splits}", "--workers=1")
    assert result.returncode == 0, result.stderr
    assert "2 cases (train 1, val 1, test 0, 1 folds)" in result.stdout
    assert "preprocess: 2/2" in result.stderr
    assert json.loads((tmp_path / "store" / "splits.json").read_text())["val"] == ["BraTS-SSA-00001-000"]


@pytest.mark.parametrize("flag", ["--check-only", "--check_only"])
def test_check_lists_all_problems_and_writes_the_report(raw, tmp_path, flag):
    assert run(f"--input={raw}", flag).returncode == 0
    (raw / "BraTS-SSA-00000-000" / "BraTS-SSA-00000-000-t1c.nii.gz").unlink()
    cut = raw / "BraTS-SSA-00001-000" / "BraTS-SSA-00001-000-t2f.nii.gz"
    cut.write_bytes(cut.read_bytes()[:60])
    result = run(f"--input={raw}", flag, f"--report={tmp_path / 'report.json'}", "--workers=1")
    assert result.returncode == 1
    assert "missing modality" in result.stdout and "unreadable file" in result.stdout
    assert result.stdout.endswith("2 problems, 0 warnings\n")
    report = json.loads((tmp_path / "report.json").read_text())
    assert [entry["kind"] for entry in report] == ["missing modality", "unreadable file"]


def test_bad_input_is_one_line_and_exit_code_1(raw, tmp_path):
    out = f"--output={tmp_path / 'store'}"
    cut = raw / "BraTS-SSA-00001-000" / "BraTS-SSA-00001-000-t2f.nii.gz"
    cut.write_bytes(cut.read_bytes()[:60])
    (tmp_path / "file").write_text("")
    for arguments in (
        [f"--input={tmp_path / 'nowhere'}", out],
        [f"--input={raw}"],
        [f"--input={raw}", out],
        [f"--input={raw}", out, "--label_map=x"],
        [f"--input={raw}", out, "--skip-bad", f"--splits={tmp_path / 'none.json'}"],
        [f"--input={raw}", f"--output={tmp_path / 'file'}"],
        [f"--input={raw}", out, "extra"],
    ):
        result = run(*arguments)
        assert result.returncode == 1, arguments
        (line,) = [line for line in result.stderr.splitlines() if not line.startswith("preprocess: ")]
        assert line.startswith("error: ") and "Traceback" not in result.stderr
    assert run(f"--input={raw}", out, "--skip-bad").returncode == 0

"""launch/simulate.py as a user runs it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline import simulate

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments):
    command = [sys.executable, "launch/simulate.py", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_two_workers_write_what_one_process_writes(tmp_path):
    given = ("--source_cases=1", "--target_cases=1", "--spacing_mm=6", "--seed=5", "--workers=2")
    done = run(f"--output={tmp_path / 'two'}", *given)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "two" / "source"), str(tmp_path / "two" / "target")]
    assert "simulate: 2/2 cases" in done.stderr
    simulate.simulate(tmp_path / "one", 1, 1, 6.0, seed=5, workers=1)
    files = sorted(path.relative_to(tmp_path / "two") for path in (tmp_path / "two").rglob("*") if path.is_file())
    assert len(files) == 2 * (5 + 1 + 1)
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "error: nothing to do: give --output=FOLDER for cohorts or --montage=FILE.png for a picture"),
        (("--output=unused", "--spacing_mm=9"), "error: spacing_mm is 9: it must be from 0.8 to 6"),
    ],
)
def test_bad_arguments_end_in_one_line(arguments, message):
    done = run(*arguments)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [message]

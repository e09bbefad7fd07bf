"""The whole study, from cohorts to its conclusions, where the right conclusions are known."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.study.cohorts import write_cohort

ROOT = Path(__file__).resolve().parents[2]


pytestmark = pytest.mark.timeout(1800)  # a whole study; minutes on free cores


@pytest.fixture(scope="module")
def concluded(tmp_path_factory) -> dict:
    """results.json of the toy study."""
    folder = tmp_path_factory.mktemp("toy")
    roots = [f"--config.{name}.root={write_cohort(folder / name, 14, target)}"
             for name, target in (("source", False), ("target", True))]  # fmt: skip
    command = [sys.executable, str(ROOT / "launch" / "study.py"), f"--config={Path(__file__).parent / 'toy.py'}",
               f"--workdir={folder / 'study'}", *roots]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=1700, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "study" / "results.json").read_text())


def test_an_arm_that_cannot_learn_is_found_worse_than_one_that_learns(concluded):
    estimates = concluded["estimates"]
    assert estimates["frozen - full"]["high"] < -0.1
    assert estimates["full - zero_shot"]["low"] > 0.1


def test_an_arm_that_cannot_learn_is_exactly_no_adaptation(concluded):
    assert concluded["estimates"]["frozen - zero_shot"]["mean"] == 0


def test_two_arms_that_are_the_same_method_have_a_difference_whose_interval_covers_zero(concluded):
    again = concluded["estimates"]["again - full"]
    assert again["low"] <= 0 <= again["high"]
    assert again["mean"] != 0  # they are not one run shown twice


def test_the_drop_between_the_cohorts_is_found(concluded):
    assert concluded["estimates"]["drop"]["low"] > 0.1


def test_what_the_arms_rule_out_is_left_out_and_said(concluded):
    said = [line for line in concluded["deviations"] if line.startswith("Not put in: permuted_channels, squeezed")]
    assert len(said) == 1 and "config.arms lacks paper_sequential" in said[0]
    assert "Faults of the released study" not in concluded["tables"]
    assert concluded["tables"]["Few-shot"]["header"] == ["arm", "1 case", "4 cases"]
    assert [row[0] for row in concluded["tables"]["Few-shot"]["rows"]] == ["full", "zero-shot"]

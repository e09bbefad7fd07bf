"""The study's plan: which commands run, in which order, and what happens when one of them stops."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "launch"))

import study_steps  # noqa: E402

from configs import study as study_config  # noqa: E402


def run(*flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "launch" / "study.py"), *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)


def test_every_arm_is_trained_then_predicts_and_all_are_evaluated_once(tmp_path):
    config = study_config.get_config("demo")
    names = [step.name for step in study_steps.steps(config, tmp_path)]
    assert len(names) == len(set(names)) == study_steps.count(config)
    assert names[:3] == ["simulate", "preprocess_source", "preprocess_target"]
    for arm, _, _ in config.arms:
        assert names.index(f"train_{arm}@0") + 1 == names.index(f"predict_target_{arm}@0")
    assert names[-2:] == ["evaluate_source", "evaluate_target"]


def test_every_arm_but_scratch_starts_from_the_same_pretrained_network(tmp_path):
    steps = {step.name: step.argv for step in study_steps.steps(study_config.get_config("demo"), tmp_path)}
    base = f"--config.init_from={tmp_path / 'runs' / 'pretrain@0'}"
    assert base in steps["train_full@0"] and base in steps["train_conv_adapter@0"]
    assert not any("init_from" in word for word in steps["train_scratch@0"])


def test_seeds_multiply_the_arms_and_change_weights_and_subset(tmp_path):
    config = study_config.get_config("demo")
    config.seeds = (3, 4)
    steps = {step.name: step.argv for step in study_steps.steps(config, tmp_path)}
    assert len(steps) == study_steps.count(config)
    assert {"--config.seed=4", "--config.data.subset_seed=4"} <= set(steps["train_full@4"])


def test_a_finished_step_is_skipped_but_not_when_its_command_was_another(tmp_path):
    step = study_steps.Step("one", ("python", "a.py", "--x=1"))
    assert not step.is_done(tmp_path)
    step.mark_done(tmp_path, 2.0)
    assert step.is_done(tmp_path)
    with pytest.raises(ValueError, match="done by another command"):
        study_steps.Step("one", ("python", "a.py", "--x=2")).is_done(tmp_path)
    assert json.loads((tmp_path / "done" / "one.json").read_text())["seconds"] == 2.0


def test_a_study_without_data_says_in_one_line_what_to_do(tmp_path):
    result = run("--config=configs/study.py:real", f"--workdir={tmp_path / 'study'}")
    assert result.returncode == 1
    assert len(result.stderr.strip().splitlines()) == 1 and "--config.source.root" in result.stderr


def test_a_failing_step_ends_the_study_with_its_name_and_command(tmp_path):
    (tmp_path / "empty").mkdir()
    result = run(
        "--config=configs/study.py:real", f"--workdir={tmp_path / 'study'}",
        f"--config.source.root={tmp_path / 'empty'}", f"--config.target.root={tmp_path / 'empty'}",
    )  # fmt: skip
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: step 'preprocess_source' ended with exit code 1") and "launch/preprocess.py" in last

"""The SLURM scripts, without SLURM: they parse, pass flags that exist, and queue again only what was preempted."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from configs import default
from mednext_jax.train import workdir

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "launch" / "slurm").glob("*.sbatch"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_parses_and_is_queued_again_by_slurm_too(script):
    assert subprocess.run(["bash", "-n", script], timeout=20).returncode == 0
    asked = set(re.findall(r"^#SBATCH (--[a-z-]+)", script.read_text(), re.MULTILINE))
    assert {"--requeue", "--signal", "--open-mode", "--nodes", "--gpus-per-node"} <= asked


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_flags_that_a_script_names_exist(script):
    text = "\n".join(line for line in script.read_text().splitlines() if not line.startswith("#SBATCH"))
    fields = workdir.leaves(workdir.plain(default.get_config()))
    named = re.findall(r"--config\.([\w.]+)=", text)
    assert "n_devices" in fields and set(named) <= fields.keys()
    for launcher, words in re.findall(r"(launch/\w+\.py)((?:[^\n]|\\\n)*)", text):
        defined = re.findall(r'DEFINE_\w+\(\s*"(\w+)"', (ROOT / launcher).read_text())
        assert set(re.findall(r"--(\w+)=", words)) <= set(defined), launcher
    for path in re.findall(r"configs/\w+\.py", text):
        assert (ROOT / path).is_file()


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (1, False), (75, True), (130, False)])
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_only_a_run_that_was_preempted_is_queued_again(script, tmp_path, code, requeued):
    for name, body in (("srun", f'echo "$@" > {tmp_path}/srun.txt; exit {code}'),
                       ("scontrol", f'echo "$@" > {tmp_path}/scontrol.txt')):  # fmt: skip
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "17"}
    command = ["bash", script, "--config=configs/peft.py", "--workdir=runs/a b"]
    result = subprocess.run(command, env=environment, capture_output=True, timeout=20, cwd=ROOT)
    assert result.returncode == code
    launcher = "study" if script.stem == "study" else "train"
    called = (tmp_path / "srun.txt").read_text()
    assert f"launch/{launcher}.py --config=configs/peft.py --workdir=runs/a b" in called
    assert (tmp_path / "scontrol.txt").exists() == requeued
    assert not requeued or (tmp_path / "scontrol.txt").read_text() == "requeue 17\n"

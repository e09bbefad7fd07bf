r"""Runs the study of a config: pre-train, adapt by every arm, predict the test cases, compare.

    python launch/study.py --config=configs/study.py:demo --workdir=runs/demo
    python launch/study.py --config=configs/study.py:real --workdir=runs/study \
        --config.source.root=DATA/BraTS2021 --config.target.root=DATA/BraTS-Africa

Every step is one of the other commands in a process of its own, printed before it runs, and could be run by hand.
Finished steps are skipped, so that the same command goes on where it stopped.
"""

import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # configs/ is not installed

import command
import study_steps
import study_table
from absl import flags
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Study file with its variant, such as configs/study.py:demo.", lock_config=True
)
WORKDIR = flags.DEFINE_string("workdir", None, "Everything the study makes goes here.")


def run_step(step: study_steps.Step, number: int, total: int, folder: Path) -> None:
    """Runs one step unless it is done.

    Raises:
      ValueError: the step was done by another command, or fails.
    """
    title = f"[{number}/{total}] {step.name}"
    if step.is_done(folder):
        print(f"{title}: done before", flush=True)
        return
    print(f"{title}\n  {step.shown()}", flush=True)
    began = time.monotonic()
    step.prepare()
    code = subprocess.run(step.argv, check=False).returncode
    if code:
        raise ValueError(f"step {step.name!r} ended with exit code {code}; its message is above, its command is: "
                         f"{step.shown()}")
    step.mark_done(folder, seconds=time.monotonic() - began)


def main(_) -> int:
    config = CONFIG.value
    if config is None or not WORKDIR.value:
        raise ValueError("give --config=configs/study.py:demo (or :real) and --workdir=FOLDER")
    folder = Path(WORKDIR.value)
    began = time.monotonic()
    number = 0
    for number, step in enumerate(study_steps.steps(config, folder), start=1):
        run_step(step, number, study_steps.count(config), folder)
    print(study_table.text(config, folder))
    print(f"{number} steps, {(time.monotonic() - began) / 60:.1f} minutes\nreport: {study_steps.report(folder)}")
    return 0


if __name__ == "__main__":
    command.run(main)

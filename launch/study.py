r"""Runs the study of a config: pre-train, choose learning rates, adapt by every arm, test once, compare.

    python launch/study.py --config=configs/study.py:demo --workdir=runs/demo
    python launch/study.py --config=configs/study.py:simulated --workdir=runs/simulated --jobs=2
    python launch/study.py --config=configs/study.py:real --workdir=runs/study \
        --config.source.root=DATA/BraTS2021 --config.target.root=DATA/BraTS-Africa

Every step is one of the other commands in a process of its own, could be run by hand, and writes to
<workdir>/logs. Finished steps are skipped, so that the same command goes on where it stopped; the same command on
several GPUs or machines (with CUDA_VISIBLE_DEVICES, or one job each) shares the steps among them.
"""

import contextlib
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # configs/ is not installed

import command
import study_cost
import study_plan
import study_result
import study_steps
from absl import flags
from ml_collections import config_flags
from study_worker import Worker

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Study file with its variant, such as configs/study.py:demo.", lock_config=True
)
WORKDIR = flags.DEFINE_string("workdir", None, "Everything the study makes goes here.")
JOBS = flags.DEFINE_integer("jobs", 1, "Steps that run at the same time on this machine.", lower_bound=1)
EXPECTED = flags.DEFINE_string(
    "expected", None, "results.json of the same study done before: exit code 1 unless all means lie in its intervals."
)
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Show how many runs the study has and their arithmetic; no data.")
TFLOPS = flags.DEFINE_float("tflops", 6.0, "With --dry_run: operations per second of the device, in 10^12.", 1e-3)
POLL_SECONDS = 0.2
LOOK_SECONDS = 10  # how often to look whether other processes did something
STOP_SECONDS = 120  # for a stopped step to save
REQUEUE = 75


class Stopped(Exception):
    """The study was asked to stop."""


@dataclass
class Running:
    """A step at work: who does it, its claim and when it began."""

    step: study_steps.Step
    worker: Worker
    claim: contextlib.ExitStack
    began: float = field(default_factory=time.monotonic)


class Study:
    """The steps of a study, done by this process together with others like it."""

    def __init__(self, config, folder: Path, jobs: int):
        self.config, self.folder, self.jobs = config, folder, jobs
        self.running: dict[str, Running] = {}
        self.idle: list[Worker] = []
        self.done: set[str] = set()
        self.acted = False  # a step that needed no process was done: there may be others now

    def to_the_end(self) -> int:
        """Does every step; returns how many there were.

        Raises:
          ValueError: a step fails.
        """
        try:
            while True:
                steps = study_plan.plan(self.config, self.folder)
                waiting = [step for step in steps if not self._is_done(step)]
                if not waiting and not self.running:
                    return len(steps)
                for step in waiting:
                    if len(self.running) < self.jobs and self.done.issuperset(step.needs):
                        self._begin(step, len(steps))
                self._collect(len(steps))
        finally:
            self._stop()

    def _is_done(self, step: study_steps.Step) -> bool:
        if step.name not in self.done and step.is_done(self.folder):
            self.done.add(step.name)
        return step.name in self.done

    def _begin(self, step: study_steps.Step, known: int) -> None:
        if step.name in self.running:
            return
        stack = contextlib.ExitStack()
        claim = stack.enter_context(study_steps.claimed(self.folder, step.name))
        if claim is None or step.is_done(self.folder):  # another process has it, or had it
            stack.close()
            return
        began = time.monotonic()
        with contextlib.ExitStack() as failing:
            failing.callback(stack.close)
            step.action()
            if step.argv:
                worker = self.idle.pop() if self.idle else Worker()
                self.running[step.name] = Running(step, worker, stack, began)
                worker.begin(step.argv[1:], study_steps.log_of(self.folder, step.name), claim)
            failing.pop_all()
        if not step.argv:
            step.mark_done(self.folder, time.monotonic() - began)
            stack.close()
            self.acted = True
            self._say(step, known, "")

    def _collect(self, known: int) -> None:
        """Waits until a command ends, or long enough to look around again, and takes note."""
        until = time.monotonic() + LOOK_SECONDS
        ended: dict[str, int] = {}
        while not ended and time.monotonic() < until and (self.running or not self.acted):
            time.sleep(POLL_SECONDS)
            codes = {name: running.worker.poll() for name, running in self.running.items()}
            ended = {name: code for name, code in codes.items() if code is not None}
        self.acted = False
        for name, code in ended.items():
            self._end(self.running.pop(name), code, known)

    def _end(self, running: Running, code: int, known: int) -> None:
        """Takes note that a command ended; its worker gets the next one, or goes."""
        step, seconds = running.step, time.monotonic() - running.began
        if code == 0:
            step.mark_done(self.folder, seconds, running.worker.cpu_seconds)
        running.claim.close()
        if code == 0 and running.worker.started < self.config.steps_per_process:
            self.idle.append(running.worker)
        else:
            running.worker.close(STOP_SECONDS)
        log = study_steps.log_of(self.folder, step.name)
        said = study_steps.last_line(log)
        if code:
            raise ValueError(f"step {step.name!r} ended with exit code {code}: {said} (log: {log}; command: "
                             f"{step.shown()})")
        self._say(step, known, f"  {seconds:.0f} s  {said[:100]}")

    def _say(self, step: study_steps.Step, known: int, rest: str) -> None:
        self.done.add(step.name)
        print(f"[{len(self.done)}/{known}] {step.name}{rest}", flush=True)

    def _stop(self) -> None:
        """Asks what still runs to save and end."""
        for running in self.running.values():
            running.worker.ask_to_stop()
        for running in self.running.values():
            running.worker.close(STOP_SECONDS)
            running.claim.close()
        for worker in self.idle:
            worker.close(STOP_SECONDS)
        self.running.clear()
        self.idle.clear()


def _on_signal(number, frame) -> None:
    raise Stopped


def main(_) -> int:
    """Goes on with the study; returns the exit code, 1 if a step failed or --expected does not agree."""
    config = CONFIG.value
    if config is None or not (WORKDIR.value or DRY_RUN.value):
        raise ValueError("give --config=configs/study.py:demo (or :simulated, or :real) and --workdir=FOLDER")
    study_plan.split_names(config)
    if DRY_RUN.value:
        print(study_cost.report(config, TFLOPS.value))
        return 0
    folder, began = Path(WORKDIR.value), time.monotonic()
    study_plan.check(config, folder)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _on_signal)
    try:
        steps = Study(config, folder, JOBS.value).to_the_end()
    except Stopped:
        print("stopped; the same command goes on", flush=True)
        return REQUEUE
    print(study_result.text(folder))
    print(f"{steps} steps, {(time.monotonic() - began) / 60:.1f} minutes\nreport: {study_result.page(folder)}")
    if not EXPECTED.value:
        return 0
    said, agrees = study_result.compared(folder, Path(EXPECTED.value))
    print(said)
    return 0 if agrees else 1


if __name__ == "__main__":
    command.run(main)

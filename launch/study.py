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
import os
import signal
import sys
import textwrap
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # configs/ is not installed

import command
import study_check
import study_cost
import study_plan
import study_result
import study_runs
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
TELL_SECONDS = 60  # after this, and twice this and so on, a step that is still at work says how far it is
SAID_CHARACTERS = 100  # of what a step says, so that a line of the study stays a line
STOP_SECONDS = 120  # for a stopped step to save
REQUEUE = 75


class Stopped(Exception):
    """The study was asked to stop."""


@dataclass
class Clock:
    """How long a step has been at work, and when that is told next."""

    began: float = field(default_factory=time.monotonic)
    tell_after: float = TELL_SECONDS

    @property
    def seconds(self) -> float:
        """Since it began, or was first seen."""
        return time.monotonic() - self.began

    def is_due(self) -> bool:
        """Whether it is to be told now; then the next time is put off."""
        if self.seconds <= self.tell_after:
            return False
        self.tell_after *= 2
        return True


@dataclass
class Running:
    """A step at work: who does it, its claim and since when."""

    step: study_steps.Step
    worker: Worker
    claim: contextlib.ExitStack
    clock: Clock = field(default_factory=Clock)


class Study:
    """The steps of a study, done by this process together with others like it."""

    def __init__(self, config, folder: Path, jobs: int):
        self.config, self.folder, self.jobs = config, folder, jobs
        self.running: dict[str, Running] = {}
        self.idle: list[Worker] = []
        self.done: set[str] = set()
        self.acted = False  # a step that needed no process was done: there may be others now
        self.elsewhere: dict[str, Clock] = {}  # steps that other processes do, while this one waits for them

    def to_the_end(self) -> tuple[int, int]:
        """Does every step; returns how many there were, and how many of them were done before.

        Raises:
          ValueError: a step fails.
        """
        before = None
        try:
            while True:
                steps = study_plan.plan(self.config, self.folder)
                waiting = [step for step in steps if not self._is_done(step)]
                if before is None:
                    before = len(steps) - len(waiting)
                    if before:
                        print(f"{before} of {len(steps)} steps known so far are done", flush=True)
                for name in self.done & self.elsewhere.keys():
                    clock = self.elsewhere.pop(name)
                    self._say(name, len(steps), f"  {clock.seconds:.0f} s waited for another process")
                if not waiting and not self.running:
                    return len(steps), before
                ready = [step for step in waiting if self.done.issuperset(step.needs)]
                for step in ready:
                    if len(self.running) < self.jobs:
                        self._begin(step, len(steps))
                if not self.running and not self.acted:
                    self._wait_for(ready)
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
        if step.argv:
            print(f"{step.name} ...", flush=True)
        with contextlib.ExitStack() as failing:
            failing.callback(stack.close)
            step.action()
            if step.argv:
                worker = self.idle.pop() if self.idle else Worker()
                self.running[step.name] = Running(step, worker, stack)
                worker.begin(step, self.folder, claim)
            failing.pop_all()
        if not step.argv:
            step.mark_done(self.folder, time.monotonic() - began)
            stack.close()
            self.acted = True
            self._say(step.name, known, "")

    def _collect(self, known: int) -> None:
        """Waits until a command ends, or long enough to look around again, and takes note."""
        until = time.monotonic() + LOOK_SECONDS
        ended: dict[str, int] = {}
        while not ended and time.monotonic() < until and (self.running or not self.acted):
            time.sleep(POLL_SECONDS)
            self._say_how_far()
            codes = {name: running.worker.poll() for name, running in self.running.items()}
            ended = {name: code for name, code in codes.items() if code is not None}
        self.acted = False
        for name, code in ended.items():
            self._end(self.running.pop(name), code, known)

    def _end(self, running: Running, code: int, known: int) -> None:
        """Takes note that a command ended; its worker gets the next one, or goes."""
        step = running.step
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
        self._say(step.name, known, f"  {running.clock.seconds:.0f} s  {_shortened(said)}")

    def _say(self, name: str, known: int, rest: str) -> None:
        self.done.add(name)
        print(f"[{len(self.done)}/{known}] {name}{rest}", flush=True)

    def _say_how_far(self) -> None:
        """The last line of every step that has been at work for long, at growing intervals."""
        own = {name: running.clock for name, running in self.running.items()}
        for name, clock in (own or self.elsewhere).items():
            if clock.is_due():
                said = study_steps.last_line(study_steps.log_of(self.folder, name))
                print(f"{name} ... {clock.seconds:.0f} s  {_shortened(said)}", flush=True)

    def _wait_for(self, ready: list[study_steps.Step]) -> None:
        """Names the processes whose steps this one has to wait for, once each."""
        for step in ready:
            if step.name not in self.elsewhere:
                self.elsewhere[step.name] = Clock()
                who = study_steps.signed_by(self.folder, step.name)
                print(f"{step.name} is at work in {who}; waiting", flush=True)

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


def _shortened(said: str) -> str:
    return textwrap.shorten(said, SAID_CHARACTERS, placeholder=" ...")


def _on_signal(number, frame) -> None:
    raise Stopped


def main(_) -> int:
    """Goes on with the study; returns the exit code, 1 if a step failed or --expected does not agree."""
    config = CONFIG.value
    if config is None or not (WORKDIR.value or DRY_RUN.value):
        raise ValueError("give --config=configs/study.py:demo (or :simulated, or :real) and --workdir=FOLDER")
    study_check.split_names(config)
    if DRY_RUN.value:
        study_check.check_config(config)
        for line in (*study_runs.left_out(config), *study_cost.report(config, TFLOPS.value)):
            print(line, flush=True)
        return 0
    folder = Path(os.path.abspath(WORKDIR.value))  # part of every step's command, which is the same from anywhere
    began = time.monotonic()
    study_check.check(config, folder)
    expected = study_result.published(Path(EXPECTED.value)) if EXPECTED.value else None
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _on_signal)
    for line in study_runs.left_out(config):
        print(line, flush=True)
    try:
        steps, before = Study(config, folder, JOBS.value).to_the_end()
    except Stopped:
        print("stopped; the same command goes on", flush=True)
        return REQUEUE
    print(study_result.text(folder))
    minutes = f"{(time.monotonic() - began) / 60:.1f} minutes"
    print(f"{steps} steps{f' ({before} were done before)' if before else ''}, {minutes}")
    print(f"report: {study_result.page(folder)}")
    if expected is None:
        return 0
    said, agrees = study_result.compared(folder, expected)
    print(said)
    return 0 if agrees else 1


if __name__ == "__main__":
    command.run(main)

"""A study that is killed with -9, all its processes at once, and started again; compared with one left alone."""

import contextlib
import json
import os
import random
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults import bench, kills, topology
from tests.study import cohorts, toy

CASES = 14
# An adapter instead of the arm that cannot learn: its weights would be right whatever became of its run.
ARMS = "full,again,conv_adapter"
SAVE_EVERY = 10
# Learning rates chosen by trials and a fault of the data, which the toy study does without.
WHOLE = ("--config.rates.trials=3", "--config.rates.max_trials=4", "--config.rates.overrides=('eval.every=60',)",
         "--config.ablations=permuted_channels", "--config.ablation.arms=full,conv_adapter",
         "--config.ablation.replicates=1")  # fmt: skip
OFTEN = (f"checkpoint_every={SAVE_EVERY}", "log_every=1")  # so that a killed run goes on in its middle
UNHURT = 4  # last steps of the plan, that are left to two processes side by side
SECONDS = 900.0  # longest life of a study
GONE_SECONDS = 20.0  # for killed processes to go
COMPARED = ("evaluation*/*.csv", "predictions/**/*.nii.gz", "runs/**/*.safetensors", "runs/**/metrics.jsonl")


@dataclass
class KilledStudy:
    """What was tried and seen.

    Attributes:
      processes: that were killed, of all kills together.
      in_training: kills that left a training run half done.
      shares: steps that each of the processes of the last stretch did.
    """

    killed: int = 0
    processes: int = 0
    in_training: int = 0
    restarts: int = 0
    shares: list[int] = field(default_factory=list)
    compared: int = 0
    mismatches: int = 0
    faults: list[str] = field(default_factory=list)


def study_flags(folder: Path) -> tuple[str, ...]:
    """Of the toy study, whose cohorts are written to ``folder``: their paths are part of a study's protocol."""
    c = toy.get_config()
    roots = (f"--config.{name}.root={cohorts.write_cohort(folder / name, CASES, name == 'target')}"
             for name in ("source", "target"))  # fmt: skip
    return (
        f"--config={toy.__file__}", *WHOLE, f"--config.arms={ARMS}", f"--config.overrides={(*c.overrides, *OFTEN)}",
        f"--config.pretrain.overrides={(*c.pretrain.overrides, *OFTEN)}", *roots,
    )  # fmt: skip


def members(group: int) -> list[int]:
    """Processes of a group that have not ended."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended just now
            state, _, own = file.read_text().rpartition(")")[2].split()[:3]
            if int(own) == group and state not in "ZX":
                found.append(int(file.parent.name))
    return found


def kill(command: bench.Command) -> int:
    """Kills a study and its workers at once, and waits until none is left; returns how many there were."""
    alive = members(command.pid)
    if alive:
        os.killpg(command.pid, signal.SIGKILL)
    deadline = time.monotonic() + GONE_SECONDS
    while members(command.pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    return len(alive)


@contextlib.contextmanager
def studying(flags: Sequence[str], workdir: Path, name: str) -> Iterator[bench.Command]:
    """A study at work in a session of its own, so that it can be killed with its workers; none is left behind."""
    log = workdir.with_name(f"{workdir.name}-{name}.log")
    with bench.Command("study.py", *flags, f"--workdir={workdir}", log=log, wrapper=os.setsid) as command:
        try:
            yield command
        finally:
            kill(command)


def notes(workdir: Path) -> dict[str, float]:
    """The steps that are done, in the order in which they were, and the seconds that each took."""
    files = sorted((workdir / "done").glob("*.json"), key=lambda file: file.stat().st_mtime_ns)
    return {file.stem: json.loads(file.read_text())["seconds"] for file in files}


def half_trained(workdir: Path) -> list[str]:
    """Training runs that have begun and not ended."""
    return [file.parent.name for file in (workdir / "runs").rglob("metrics.jsonl")
            if not (file.parent / "result.json").exists()]  # fmt: skip


def steps_done(command: bench.Command) -> int:
    """Steps that this process says it did; for some it may have waited."""
    lines = command.read().splitlines()
    return sum(line.startswith("[") and not line.endswith("waited for another process") for line in lines)


def outcome(workdir: Path) -> dict[str, bytes]:
    """All that two studies of the same cohorts must have in common: results without times, tables, maps, weights."""
    results = json.loads((workdir / "results.json").read_text())
    cost = results["tables"]["Accuracy against compute"]
    kept = [i for i, column in enumerate(cost["header"]) if not column.startswith("seconds")]
    cost["rows"] = [[row[i] for i in kept] for row in cost["rows"]]
    files = sorted(path for pattern in COMPARED for path in workdir.glob(pattern))
    return {"results.json": json.dumps(results).encode(),
            **{str(path.relative_to(workdir)): path.read_bytes() for path in files}}  # fmt: skip


def die_in_training(command: bench.Command, workdir: Path, run: str, lines: int) -> int:
    """Kills a study when a training run has written so many lines of metrics."""
    command.wait_for(lambda: topology.written(workdir / "runs" / run) >= lines, SECONDS)
    return kill(command)


def die_after(command: bench.Command, workdir: Path, step: str, seconds: float) -> int:
    """Kills a study some seconds after a step was done."""
    command.wait_for((workdir / "done" / f"{step}.json").exists, SECONDS)
    command.wait_for(lambda: False, seconds)
    return kill(command)


def _ended(found: KilledStudy, what: str, command: bench.Command, code: int = 0) -> bool:
    end = command.wait(SECONDS)
    if end.code != code:
        found.faults.append(f"{what}: code {end.code} instead of {code}: {end.errors.strip()[-300:]}")
    return end.code == code


def kill_study(flags: Sequence[str], folder: Path, seed: int) -> KilledStudy:
    """Kills a study twice: at a random step of a random training run, and at a random time of a random later step.

    It is started again with the same command each time; the last stretch is done by two such processes side by side.
    """
    found, rng = KilledStudy(), random.Random(seed)
    straight, workdir = folder / "straight", folder / "killed"
    with studying(flags, straight, "0") as command:
        if not _ended(found, "the study that was left alone", command):
            return found
    took = notes(straight)
    steps = list(took)
    first = rng.choice([i for i, step in enumerate(steps) if step.startswith("train_")])
    second = rng.randrange(first + 1, len(steps) - UNHURT)
    run = steps[first].removeprefix("train_").replace("trials_", "trials/", 1)  # its folder
    lines = rng.randrange(SAVE_EVERY + 1, topology.written(straight / "runs" / run))
    ways = (
        lambda command: die_in_training(command, workdir, run, lines),
        lambda command: die_after(command, workdir, steps[second - 1], rng.uniform(0, took[steps[second]])),
    )
    for number, die in enumerate(ways):
        with studying(flags, workdir, str(number)) as command:
            processes = die(command)
            if not _ended(found, f"kill {number}", command, -signal.SIGKILL):
                return found
            if left := members(command.pid):
                found.faults.append(f"kill {number}: processes {left} are still there")
        found.killed += 1
        found.processes += processes
        found.in_training += bool(half_trained(workdir))
        found.restarts += 1
    if not found.in_training:
        found.faults.append("no kill hit a training run")
    with studying(flags, workdir, "2") as one, studying(flags, workdir, "3") as other:
        ended = [_ended(found, "a process of the last stretch", command) for command in (one, other)]
        found.shares = [steps_done(command) for command in (one, other)]
    if not all(ended):
        return found
    if not all(found.shares):
        found.faults.append(f"the two processes of the last stretch did {found.shares} steps")
    expected, seen = outcome(straight), outcome(workdir)
    found.compared = len(expected)
    names = kills.differing(expected, seen)
    found.mismatches = len(names)
    if names:
        found.faults.append(f"the killed study (seed {seed}) differs in {', '.join(names)}")
    return found

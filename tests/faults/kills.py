"""Runs that are killed with -9 again and again, started again each time, and compared with one left alone."""

import json
import os
import random
import shutil
import signal
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from mednext_jax.train.checkpoints import UNFINISHED
from tests.faults import bench

STEPS = 40
FLAGS = (
    *bench.ADAPTER, f"--config.optim.total_steps={STEPS}", "--config.checkpoint_every=2", "--config.eval.every=10",
    "--config.log_every=7",
)  # fmt: skip
LATEST_SECONDS = 0.06  # after a save began; a save of the tiny state takes about a tenth of a second
MOST_STARTS = 60  # of one run: one that never ends hangs


@dataclass
class Kills:
    """What was tried and seen.

    Attributes:
      during_saves: kills that left a checkpoint half written.
      seconds: that the run which was left alone took.
    """

    tried: int = 0
    during_saves: int = 0
    restarts: int = 0
    runs: int = 0
    seconds: float = 0.0
    mismatches: int = 0
    faults: list[str] = field(default_factory=list)


def outcome(workdir: Path) -> dict[str, bytes | str]:
    """All that two runs of the same bits must have in common: metrics, models, adapter, and the last state.

    The state (parameters, optimizer, average, counters, key) by the CRC32 of its leaves, and the data position.
    """
    result = {"metrics.jsonl": (workdir / "metrics.jsonl").read_bytes()}
    for file in ("base", "best", "model", "adapter"):
        for path in sorted((workdir / file).glob("*")):
            result[f"{file}/{path.name}"] = path.read_bytes()
    last = max((f for f in (workdir / "checkpoints").iterdir() if f.name.isdigit()), key=lambda f: int(f.name))
    for item in ("leaves", "data", "progress", "config"):
        result[f"last {item}"] = json.dumps(json.loads((last / item / "metadata").read_text()), sort_keys=True)
    summary = json.loads((workdir / "result.json").read_text())
    del summary["cost"]  # seconds and bytes
    return {**result, "last step": last.name, "result": json.dumps(summary)}


def differing(one: dict, other: dict) -> list[str]:
    """Names of what differs."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def half_written(workdir: Path) -> list[Path]:
    """Checkpoints that are being written, or were when the writer died."""
    return list((workdir / "checkpoints").glob(f"*{UNFINISHED}*"))


def die(command: bench.Command, workdir: Path, rng: random.Random, whole_seconds: float) -> None:
    """Lets a run live for a while, half the times until some moment of a save, then kills it."""
    if rng.random() < 0.5:
        command.wait_for(lambda: False, rng.uniform(0, whole_seconds))
    else:
        for _ in range(rng.randint(1, 3)):  # the first, second or third save from here
            if command.wait_for(lambda: half_written(workdir)):
                command.wait_for(lambda: not half_written(workdir), rng.uniform(0, LATEST_SECONDS))
    if command.alive:
        os.kill(command.pid, signal.SIGKILL)


def run_and_kill(flags: tuple[str, ...], workdir: Path, rng: random.Random, wanted: int, kills: Kills) -> None:
    """One run, started again after every kill until it ends by itself; left alone once ``wanted`` kills were tried."""
    kills.runs += 1
    for start in range(MOST_STARTS):
        kills.restarts += start > 0
        with bench.Command("train.py", *flags, f"--workdir={workdir}", log=workdir.with_suffix(".log")) as command:
            if kills.tried < wanted:
                die(command, workdir, rng, kills.seconds)
            end = command.wait()
        if end.code == -signal.SIGKILL:
            kills.tried += 1
            kills.during_saves += bool(half_written(workdir))
            continue
        if end.code != 0:
            kills.faults.append(f"{workdir.name}: code {end.code}: {end.errors.strip()[-300:]}")
        return
    kills.faults.append(f"{workdir.name}: not finished after {MOST_STARTS} starts")


def kill_runs(flags: tuple[str, ...], folder: Path, wanted: int, seed: int) -> Kills:
    """Kills at least ``wanted`` times, over as many runs as that takes; every run ends and is compared.

    After every run the counts are written to ``<folder>/kills.json``; called again, it goes on from there.
    """
    kept = folder / "kills.json"
    kills = Kills(**json.loads(kept.read_text())) if kept.exists() else Kills()
    if not kills.runs:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        started = time.monotonic()
        straight = bench.run("train.py", *flags, f"--workdir={folder / 'straight'}", log=folder / "straight.log")
        if straight.code != 0:
            raise RuntimeError(f"the run that was left alone failed: {straight.errors[-500:]}")
        kills.seconds = time.monotonic() - started
    expected = outcome(folder / "straight")
    while kills.tried < wanted and not kills.faults:
        workdir = folder / f"run{kills.runs}"
        shutil.rmtree(workdir, ignore_errors=True)
        run_and_kill(flags, workdir, random.Random(f"{seed} {kills.runs}"), wanted, kills)
        if not kills.faults and (names := differing(outcome(workdir), expected)):
            kills.mismatches += 1
            kills.faults.append(f"{workdir.name} (seed {seed}) differs in {', '.join(names)}")
        kept.write_text(json.dumps(asdict(kills)))
    return kills

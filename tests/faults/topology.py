"""One run on 1 to 8 devices in 1 to 4 processes over loopback: the same losses, stopping, going on, losing one."""

import json
import os
import random
import signal
import socket
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path

import numpy as np

from mednext_jax.train.logging import VALIDATION
from tests.faults import bench, kills

COMBINATIONS = tuple((d, p) for d in (1, 2, 4, 8) for p in (1, 2, 4) if p <= d)
BATCH_SIZE = 8
SURVIVOR_SECONDS = 120.0  # twice the heartbeat after which JAX counts a silent process as lost
REMEDY = "start the same command again"
FLAGS = (
    *bench.TINY, f"--config.data.batch_size={BATCH_SIZE}", "--config.n_devices=0", "--config.log_every=1",
    "--config.eval.every=0", "--config.optim.name=sgd", "--config.optim.peak_lr=0.05", "--config.optim.warmup_steps=2",
)  # fmt: skip


@dataclass
class Topology:
    """What was tried and seen.

    Attributes:
      differences: largest one of a loss to one device in one process, by name of the combination.
      scores: the same of a validation score, where the runs validate.
      stopped: signals that were sent, by name and who got it.
    """

    differences: dict[str, float] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    stopped: Counter = field(default_factory=Counter)
    lost: int = 0
    faults: list[str] = field(default_factory=list)


def free_port() -> int:
    """A port of the loopback interface that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def together(flags: Sequence[str], workdir: Path, devices: int, processes: int) -> Iterator[list[bench.Command]]:
    """Starts one run in several processes, each with its share of the devices."""
    place = f"--coordinator=127.0.0.1:{free_port()}"
    with ExitStack() as stack:
        group = []
        for number in range(processes):
            own = (place, f"--process_count={processes}", f"--process_id={number}") if processes > 1 else ()
            log = workdir.with_name(f"{workdir.name}-{number}.log")
            command = bench.Command(
                "train.py", *flags, f"--workdir={workdir}", *own, log=log, n_devices=devices // processes
            )
            group.append(stack.enter_context(command))
        yield group


def run(flags: Sequence[str], workdir: Path, devices: int, processes: int) -> list[bench.Outcome]:
    """To the end."""
    with together(flags, workdir, devices, processes) as group:
        return [command.wait() for command in group]


def values(workdir: Path, prefix: str) -> dict[tuple[int, str], float]:
    """Of every step, all that the run wrote under names which begin so."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {(line["step"], name): line[name] for line in lines for name in line if name.startswith(prefix)}


def difference(one: Path, other: Path, prefix: str = "loss") -> float:
    """Largest difference of a step's loss, or of other values; infinite if the two have not the same ones."""
    a, b = values(one, prefix), values(other, prefix)
    if a.keys() != b.keys():
        return float("inf")
    return float(np.max([abs(a[name] - b[name]) for name in a], initial=0))  # NaN if one is NaN


def _failed(found: Topology, what: str, ends: Sequence[bench.Outcome], code: int = 0) -> bool:
    wrong = [end for end in ends if end.code != code]
    found.faults += [f"{what}: code {end.code} instead of {code}: {end.errors.strip()[-300:]}" for end in wrong]
    return bool(wrong)


def matrix(flags: Sequence[str], folder: Path, combinations: Sequence[tuple[int, int]], name: str) -> Topology:
    """Trains ten steps on every combination of devices and processes; the first one is what others are held to.

    Combinations that ended well before are not trained again.
    """
    found = Topology()
    folder.mkdir(parents=True, exist_ok=True)
    flags = (*flags, "--config.optim.total_steps=10", "--config.checkpoint_every=100")
    for devices, processes in combinations:
        what = f"{name}, {devices} x {processes}"
        workdir = folder / f"{devices}x{processes}"
        done = (workdir / "result.json").exists()
        if done or not _failed(found, what, run(flags, workdir, devices, processes)):
            first = folder / "{}x{}".format(*combinations[0])
            found.differences[what] = difference(first, workdir)
            if values(first, VALIDATION):
                found.scores[what] = difference(first, workdir, VALIDATION)
    return found


def written(workdir: Path) -> int:
    """Steps whose metrics are written."""
    file = workdir / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def stop_and_go_on(
    flags: Sequence[str], folder: Path, chain: Sequence[tuple[int, int]], steps: int, seed: int
) -> Topology:
    """One run that is asked to stop again and again and goes on with other devices and processes each time.

    A random process of the group gets the signal, by turns SIGTERM and SIGUSR1; all must save and end with 75. One
    alone gets by turns SIGINT, which is Ctrl-C and ends with 130, SIGTERM and SIGUSR1. JAX looks once a second
    whether one of several was asked, so ``steps`` must leave every run seconds of work after it.
    """
    found, rng = Topology(), random.Random(seed)
    several = cycle((signal.SIGTERM, signal.SIGUSR1))
    alone = cycle((signal.SIGINT, signal.SIGTERM, signal.SIGUSR1))
    folder.mkdir(parents=True)
    flags = (*flags, f"--config.optim.total_steps={steps}", "--config.checkpoint_every=1")
    if _failed(found, "straight", run(flags, folder / "straight", *chain[-1])):
        return found
    workdir = folder / "moved"
    for devices, processes in chain[:-1]:
        what = f"stopping on {devices} x {processes}"
        until = written(workdir) + 3
        with together(flags, workdir, devices, processes) as group:
            asked = next(several if processes > 1 else alone)
            if group[0].wait_for(lambda until=until: written(workdir) >= until):
                os.kill(rng.choice(group).pid, asked)
                found.stopped[f"{asked.name} to {'one of several' if processes > 1 else 'one alone'}"] += 1
            code = 130 if asked == signal.SIGINT else 75
            if _failed(found, f"{what} by {asked.name}", [command.wait() for command in group], code):
                return found
    if not _failed(found, "going on", run(flags, workdir, *chain[-1])):
        path = " -> ".join(f"{d} x {p}" for d, p in chain)
        found.differences[f"stopped and moved, {path}"] = difference(folder / "straight", workdir)
    return found


def lose_processes(flags: Sequence[str], folder: Path, times: int, seed: int) -> Topology:
    """One of two processes is killed with -9: the other ends in one clear line; started again, all bits agree."""
    found, rng = Topology(), random.Random(seed)
    folder.mkdir(parents=True)
    flags = (*flags, "--config.optim.total_steps=30", "--config.checkpoint_every=2")
    if _failed(found, "straight", run(flags, folder / "straight", 2, 2)):
        return found
    workdir = folder / "broken"
    for number in range(times):
        with together(flags, workdir, 2, 2) as group:
            until = written(workdir) + rng.randint(1, 5)
            victim = rng.randrange(2)
            if not group[0].wait_for(lambda until=until: written(workdir) >= until):
                break  # finished
            os.kill(group[victim].pid, signal.SIGKILL)
            end = group[1 - victim].wait(SURVIVOR_SECONDS, REMEDY)
        found.lost += 1
        # An error in Python, or JAX's client that noticed first and aborts the process.
        ended = end.told and end.code in (1, -signal.SIGABRT)
        if not ended or REMEDY not in end.errors:
            dumped = [line for line in end.errors.splitlines() if bench.is_dump(line)]
            at = end.errors.find(dumped[0]) if dumped else 0
            shown = f"{end.errors[at : at + 2000]} ... {end.errors[-300:]}"
            found.faults.append(f"survivor {number}: code {end.code}: {shown}")
    if not _failed(found, "going on", run(flags, workdir, 2, 2)):
        names = kills.differing(kills.outcome(folder / "straight"), kills.outcome(workdir))
        found.faults += [f"after lost processes {names} differ"] if names else []
    return found

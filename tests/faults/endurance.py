"""A long run, watched from outside: memory, open files and shared memory early and late."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.faults import bench


@dataclass(frozen=True)
class Use:
    """What a run and its workers hold.

    Attributes:
      step: the last one whose metrics were written.
      memory_mib: resident memory that is their own (RssAnon: mapped files belong to the system's cache).
      shared_mib: pages of shared memory that they have touched.
      open_files: file descriptors.
      segments: mapped pieces of shared memory.
    """

    step: int
    memory_mib: float
    shared_mib: float
    open_files: int
    segments: int


def family(pid: int) -> list[int]:
    """A process and all its descendants."""
    found = [pid]
    for parent in found:
        for thread in Path(f"/proc/{parent}/task").glob("*/children"):
            found += [int(child) for child in thread.read_text().split()]
    return found


def _kilobytes(status: str, name: str) -> int:
    return next((int(line.split()[1]) for line in status.splitlines() if line.startswith(f"{name}:")), 0)


def measure(pid: int, step: int) -> Use:
    """Looks at a running process. Raises OSError if it ended."""
    memory = shared = files = 0
    segments = set()
    for number in family(pid):
        status = Path(f"/proc/{number}/status").read_text()
        memory, shared = memory + _kilobytes(status, "RssAnon"), shared + _kilobytes(status, "RssShmem")
        files += len(os.listdir(f"/proc/{number}/fd"))
        maps = Path(f"/proc/{number}/maps").read_text().splitlines()
        segments |= {line.split(maxsplit=5)[-1] for line in maps if "/dev/shm/" in line}
    return Use(step, memory / 1024, shared / 1024, files, len(segments))


def last_step(workdir: Path) -> int:
    """Of metrics.jsonl; 0 before the first line."""
    try:
        with open(workdir / "metrics.jsonl", "rb") as file:
            file.seek(max(os.path.getsize(workdir / "metrics.jsonl") - 2000, 0))
            return json.loads(file.read().splitlines()[-1])["step"]
    except (OSError, ValueError, IndexError):
        return 0


def watch(flags: tuple[str, ...], workdir: Path, early: int, steps: int) -> dict[str, dict]:
    """Trains ``steps`` steps; what was held at step ``early``, at ten times that, and at the last log line before the
    end. At the first look the memory of compiling is not yet given back.

    A validation and a checkpoint come every ``early * 0.9`` steps, so that both have happened before the first look.
    """
    every = early * 9 // 10
    flags = (
        *flags, f"--config.optim.total_steps={steps}", f"--config.eval.every={every}", "--config.log_every=10",
        f"--config.checkpoint_every={every}", f"--workdir={workdir}",
    )  # fmt: skip
    seen = {}
    with bench.Command("train.py", *flags, log=workdir.with_suffix(".log")) as command:
        for name, step in (("early", early), ("middle", 10 * early), ("late", steps - 10)):
            if not command.wait_for(lambda step=step: last_step(workdir) >= step, seconds=3600):
                raise RuntimeError(f"ended before step {step}: {command.read('.err')[-500:]}")
            seen[name] = asdict(measure(command.pid, last_step(workdir)))
        end = command.wait()
    if end.code != 0:
        raise RuntimeError(f"code {end.code}: {end.errors[-500:]}")
    return seen


def growth(seen: dict[str, dict], what: str) -> list[str]:
    """Faults: what was more at the last look than before.

    Memory than at any look, by more than the noise of an allocator: the first one holds that of compiling. Files and
    segments than at every look: batches on their way between processes come and go.
    """
    *before, late = seen.values()
    early = {name: (min if name == "memory_mib" else max)(look[name] for look in before) for name in late}
    limits = {"memory_mib": 0.1 * early["memory_mib"], "shared_mib": 1.0, "open_files": 0, "segments": 0}
    return [
        f"{what}: {name} grew from {early[name]:.1f} to {late[name]:.1f}"
        for name, most in limits.items()
        if late[name] > early[name] + most
    ]

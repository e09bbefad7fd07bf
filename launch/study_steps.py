"""One step of a study: a command or an action, what it needs, and the note that says it is done."""

import contextlib
import fcntl
import json
import os
import shlex
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data_pipeline import atomic

LAUNCH = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Step:
    """What is done at once.

    Attributes:
      name: unique; also the name of its note, its log and its claim.
      argv: the command; empty for a step that only acts.
      action: done by the study's own process, before the command.
      needs: names of the steps that must be done before.
    """

    name: str
    argv: tuple[str, ...] = ()
    action: Callable[[], None] = lambda: None
    needs: tuple[str, ...] = ()

    def shown(self) -> str:
        """The command as one would type it."""
        return shlex.join(["python", *self.argv[1:]])

    def is_done(self, folder: Path) -> bool:
        """Whether the step is done, by this very command.

        Raises:
          ValueError: it was done by another command.
        """
        note = note_of(folder, self.name)
        if not note.is_file():
            return False
        if json.loads(note.read_text())["command"] != list(self.argv[1:]):
            raise ValueError(f"step {self.name!r} in {folder} was done by another command (see {note}); use a new "
                             "--workdir, or remove that file to do the step again")
        return True

    def mark_done(self, folder: Path, seconds: float, cpu_seconds: float = 0.0) -> None:
        """Leaves a note that the step is done, and what it took."""
        note_of(folder, self.name).parent.mkdir(parents=True, exist_ok=True)
        content = {"command": list(self.argv[1:]), "seconds": round(seconds, 1),
                   "cpu_seconds": round(cpu_seconds, 1)}
        atomic.write_json(note_of(folder, self.name), content)


def note_of(folder: Path, name: str) -> Path:
    """The file that says a step is done, and how long it took."""
    return folder / "done" / f"{name}.json"


def log_of(folder: Path, name: str) -> Path:
    """Where a step's command writes what it has to say."""
    return folder / "logs" / f"{name}.log"


def claim_of(folder: Path, name: str) -> Path:
    """The file that is locked while a step is done, and says by whom."""
    return folder / "claims" / f"{name}.lock"


def last_line(log: Path) -> str:
    """The last line of a log that says anything."""
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


@contextlib.contextmanager
def claimed(folder: Path, name: str) -> Iterator[int | None]:
    """The right to do a step, as the descriptor of a locked file; None if another process has it.

    The system gives the lock back when all that hold it have ended, however they ended.
    """
    file = claim_of(folder, name)
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        sign(stream.fileno())
        yield stream.fileno()


def sign(claim: int) -> None:
    """Writes into a claim that this process does its step now."""
    os.truncate(claim, 0)
    os.write(claim, f"process {os.getpid()} on {socket.gethostname()}".encode())


def signed_by(folder: Path, name: str) -> str:
    """Who does a step that is claimed."""
    return claim_of(folder, name).read_text() or "another process"


def launcher(name: str, *flags: str) -> tuple[str, ...]:
    """``python launch/<name>.py --flag ...``."""
    return (sys.executable, str(LAUNCH / f"{name}.py"), *(f"--{flag}" for flag in flags))

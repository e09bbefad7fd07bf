"""How a result was made: command, versions, time, code."""

import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

PACKAGES = ("mednext-jax", "numpy", "scipy", "nibabel", "matplotlib")


def record(argv: Sequence[str]) -> dict:
    """JSON-able record of this process."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "command": shlex.join([Path(sys.executable).name, *argv]),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions,
        "git": _commit(),
    }


def _commit() -> str | None:
    """Commit of the source tree this runs from, "+changes" if it was edited; None outside git."""
    folder = Path(__file__).resolve().parent
    try:
        answers = [
            subprocess.run(
                ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
            ).stdout.strip()
            for arguments in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no", "."))
        ]
    except (OSError, subprocess.SubprocessError):
        return None
    return answers[0] + ("+changes" if answers[1] else "")

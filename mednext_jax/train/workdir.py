"""A run's folder: one owner at a time, its config and environment, and whether it may be resumed."""

import fcntl
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from mednext_jax import directories

LOCK_FILE = ".lock"
CONFIG_FILE = "config.json"
ENVIRONMENT_FILE = "environment.json"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "mednext-jax")

# Fields that do not change what a run computes (or only where it reads from): a resumed run may change them.
FREE = (
    "log_every", "checkpoint_every", "resume_step", "n_devices", "max_bad_steps", "optim.shard_state",
    "data.root", "data.store", "data.workers", "data.threads", "data.buffer",
)  # fmt: skip


def plain(config: Any) -> dict[str, Any]:
    """A config (``ConfigDict`` or mapping) as plain JSON values: tuples become lists."""
    as_dict = config.to_dict() if hasattr(config, "to_dict") else config
    return json.loads(json.dumps(as_dict))


def write_json(file: Path, value: Any) -> None:
    """Writes JSON whole or not at all."""
    write_whole(file, (json.dumps(value, indent=1) + "\n").encode())


def write_whole(file: Path, content: bytes) -> None:
    """Writes to ``.NAME.PID`` beside the file, then renames."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


class Lock:
    """Makes this process the only one that trains in ``workdir``, until :meth:`release` or its end."""

    def __init__(self, workdir: Path):
        self._workdir, self._is_new = workdir, not workdir.exists()
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            self._file = open(workdir / LOCK_FILE, "w")  # noqa: SIM115 (held open)
        except OSError as error:
            raise OSError(
                f"cannot write to the workdir {workdir} ({error}): choose another --workdir"
            ) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise OSError(
                f"another process is training in {workdir}: wait for it or choose another --workdir"
            ) from None
        except OSError as error:
            self._file.close()
            raise OSError(
                f"{workdir} lies on a file system that cannot lock files ({error}): choose another --workdir"
            ) from error
        directories.tidy(workdir)
        for left in workdir.glob(".*.json*.*"):  # half-written, by a process that was killed
            if left.suffix[1:].isdecimal():
                left.unlink(missing_ok=True)

    def release(self) -> None:
        """Lets others in. Of a run that was refused before it wrote anything, no new folder stays."""
        if self._is_new and all(path.is_dir() or path.name == LOCK_FILE for path in self._workdir.rglob("*")):
            shutil.rmtree(self._workdir, ignore_errors=True)
        self._file.close()


def check_shared(workdir: Path) -> None:
    """Raises OSError if another process than the first does not see the lock that the first one took."""
    if not (workdir / LOCK_FILE).exists():
        raise OSError(
            f"process {jax.process_index()} does not see the workdir {workdir} of process 0: all processes "
            "need the same --workdir, on a disk that their machines share"
        )


def leaves(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested config -> {"optim.peak_lr": value}."""
    flat = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= leaves(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def check_same_config(stored: Mapping[str, Any], config: Mapping[str, Any], where: Path) -> None:
    """Raises ValueError, naming the field, if a run would go on with another config than it began with."""
    old, new = leaves(stored), leaves(config)
    for name in sorted(old.keys() | new.keys()):
        if name not in FREE and old.get(name) != new.get(name):
            raise ValueError(
                f"the run in {where} began with config.{name}={old.get(name)!r}, now it is "
                f"{new.get(name)!r}: restore the old value or choose another --workdir"
            )


def _git_hash() -> str:
    """Commit of the source tree, with "+changes" if it has any; empty if it is not a repository."""
    root = Path(__file__).resolve().parents[2]
    try:

        def git(*arguments: str) -> str:
            command = ["git", "-C", str(root), *arguments]
            return subprocess.run(
                command, capture_output=True, text=True, timeout=10, check=True
            ).stdout.strip()

        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def write_environment(folder: Path, found: Mapping[str, Any]) -> list[str]:
    """Writes ``environment.json``; what it said of earlier parts of the run stays, as its ``earlier``.

    Returns: a line for the user if versions changed.
    """
    file, found = folder / ENVIRONMENT_FILE, plain(found)
    try:
        before = dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        before = {}
    earlier = before.pop("earlier", [])
    if before and before != found:
        earlier = [*earlier, before]
    write_json(file, found | ({"earlier": earlier} if earlier else {}))
    now, old = found["versions"], before.get("versions", {})
    changed = [f"{name} {old[name]} before, {now.get(name)} now" for name in old if old[name] != now.get(name)]
    return [f"other versions than before, so the bits may differ: {'; '.join(changed)}"] if changed else []


def environment() -> dict[str, Any]:
    """What a result may depend on beside the config: versions, devices, source commit, flags."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "backend": jax.default_backend(),
        "devices": [device.device_kind for device in jax.devices()],
        "processes": jax.process_count(),
        "git": _git_hash(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }

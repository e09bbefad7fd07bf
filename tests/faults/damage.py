"""Damage to what a run has written: checkpoints hit in every file, disks that fill up or cannot be written.

The truth is what the checkpoint held before. Damage must be refused in one line, or not matter: what comes back
is then equal, bit for bit, records included.
"""

import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mednext_jax.train.checkpoints import Checkpoints, describe_record
from tests.faults import bench


@dataclass
class Damage:
    """Counts by kind of damage; ``harmless``: the same bits came back; ``faults``: what should not be."""

    tried: Counter = field(default_factory=Counter)
    detected: Counter = field(default_factory=Counter)
    harmless: Counter = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


def flip(file: Path, rng: random.Random) -> None:
    """Changes one bit."""
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(bytes(content))


def truncate(file: Path, rng: random.Random) -> None:
    """Cuts the end off."""
    content = file.read_bytes()
    file.write_bytes(content[: rng.randrange(len(content))])


def lose(file: Path, rng: random.Random) -> None:
    """Deletes the file."""
    file.unlink()


def lose_folder(file: Path, rng: random.Random) -> None:
    """Deletes the file's folder, an item of the checkpoint or a part of one."""
    shutil.rmtree(file.parent)


KINDS: dict[str, Callable[[Path, random.Random], None]] = {
    "flipped bit": flip, "truncated file": truncate, "missing file": lose, "missing folder": lose_folder,
}  # fmt: skip


def content(folder: Path, step: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Records and leaves of a step, as a run that resumes gets them."""
    checkpoints = Checkpoints(folder)
    try:
        return checkpoints.records(step), checkpoints.restore(_template(folder, step), step)
    finally:
        checkpoints.close()


def _template(folder: Path, step: int, known: dict = {}) -> dict[str, np.ndarray]:  # noqa: B006 (remembered)
    """What the run needs; read once, before anything is damaged."""
    if not known:
        leaves = json.loads((folder / str(step) / "leaves" / "metadata").read_text())
        for path, leaf in leaves["leaves"].items():
            known[path] = np.empty(leaf["shape"], leaf["dtype"])
    return known


def damage_checkpoints(original: Path, scratch: Path, rounds: int, seed: int) -> Damage:
    """Hits every file of the newest step in every way, ``rounds`` times, in a copy of the folder.

    Args:
      original: the ``checkpoints`` folder of a finished run.
    """
    found, rng = Damage(), random.Random(seed)
    step = max(int(f.name) for f in original.iterdir() if f.name.isdigit())
    expected = content(original, step)
    files = sorted(f.relative_to(original) for f in (original / str(step)).rglob("*") if f.is_file())
    for number in range(rounds):
        for name in files:
            for kind, hit in KINDS.items():
                if not (original / name).stat().st_size and hit in (flip, truncate):
                    continue
                if number and hit in (lose, lose_folder):
                    continue  # the same again
                copy = scratch / f"{found.tried.total()}"
                shutil.copytree(original, copy)
                hit(copy / name, rng)
                _judge(found, kind, f"{kind} {name}", lambda copy=copy: content(copy, step), expected)
                shutil.rmtree(copy)
    return found


def _judge(found: Damage, kind: str, what: str, read: Callable, expected: tuple) -> None:
    found.tried[kind] += 1
    try:
        records, leaves = read()
    except (ValueError, OSError) as error:
        if "\n" in str(error) or not str(error):
            found.faults.append(f"{what}: not one line: {str(error)[:200]!r}")
        found.detected[kind] += 1
        return
    except Exception as error:
        found.faults.append(f"{what}: {type(error).__name__}: {str(error)[:200]}")
        return
    same = records == expected[0] and leaves.keys() == expected[1].keys()
    if same and all(np.array_equal(leaves[path], leaf, equal_nan=True) for path, leaf in expected[1].items()):
        found.harmless[kind] += 1
    else:
        found.faults.append(f"{what}: restored, but different")


def _hit(name: str, hit: Callable[[Path], None]) -> Callable[[Path], None]:
    """The same as a function of the workdir; ``name`` is a file or folder of it, or the largest that fits it."""
    return lambda workdir: hit(max(workdir.glob(name), key=lambda file: file.stat().st_size))


def _change_middle(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def _forge(step: Path, right_sum: bool) -> None:
    """Changes a record of a checkpoint by hand; with ``right_sum`` its CRC32 is made to fit."""
    file, leaves = step / "progress" / "metadata", step / "leaves" / "metadata"
    record = {**json.loads(file.read_text()), "window": "x"}
    file.write_text(json.dumps(record))
    if right_sum:
        described = json.loads(leaves.read_text())
        described["records"]["progress"] = describe_record(record)
        leaves.write_text(json.dumps(described))


def damage_runs(flags: tuple[str, ...], straight: Path, scratch: Path) -> Damage:
    """Starts ``launch/train.py`` again on copies of a finished run whose newest checkpoint, or base, was hit.

    It must end in one line that names what was hit, and leave the checkpoints alone; or end as the run did.
    """
    from tests.faults import fuzz, kills

    found, expected = Damage(), kills.outcome(straight)
    newest = f"checkpoints/{expected['last step']}"
    state = f"{newest}/state/d/*"  # the leaves, in the copy that is read
    hits = {
        "changed byte": (newest, _hit(state, _change_middle)),
        "truncated file": (newest, _hit(state, lambda file: file.write_bytes(file.read_bytes()[:100]))),
        **{f"no {item}": (newest, _hit(f"{newest}/{item}", shutil.rmtree)) for item in ("state", "leaves", "progress")},
        "forged record": (newest, _hit(newest, lambda step: _forge(step, right_sum=False))),
        "forged record under its CRC32": (newest, _hit(newest, lambda step: _forge(step, right_sum=True))),
        "changed byte of the base": ("base", _hit("base/model.safetensors", _change_middle)),
        "no base": ("base", _hit("base", shutil.rmtree)),
    }  # fmt: skip
    for number, (what, (named, hit)) in enumerate(hits.items()):
        workdir = scratch / f"hit{number}"
        shutil.copytree(straight, workdir)
        hit(workdir)
        before = fuzz.listing(workdir / "checkpoints")
        found.tried["run"] += 1
        end = bench.run("train.py", *flags, f"--workdir={workdir}", log=scratch / f"hit{number}.log")
        if end.clean and f"hit{number}/{named}" in end.errors and fuzz.listing(workdir / "checkpoints") == before:
            found.detected["run"] += 1
        elif end.code == 0 and not kills.differing(kills.outcome(workdir), expected):
            found.harmless["run"] += 1
        else:
            found.faults.append(f"{what}: code {end.code}: {end.errors.strip()[-400:]}")
    return found


def namespaces_work() -> bool:
    """Whether this system lets a user mount a small disk of his own (Linux with user namespaces)."""
    try:
        return subprocess.run(["unshare", "-Urm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], timeout=20).returncode == 0
    except (OSError, subprocess.SubprocessError):
        return False


# $1: where the small disk is mounted, $2: its size, $3: "ro" or "rw", $4: a folder to begin with (or ""), $5: where
# to copy what it holds in the end; the rest is the command.
_ON_SMALL_DISK = """
mount -t tmpfs -o size=$2 tmpfs "$1" || exit 99
[ -z "$4" ] || cp -a "$4" "$1/run" || exit 99
[ "$3" = ro ] && mount -o remount,ro "$1"
disk="$1" copy="$5"; shift 5
"$@"; code=$?
[ -d "$disk/run" ] && cp -a "$disk/run" "$copy"
exit $code
"""


def on_small_disk(flags: tuple[str, ...], folder: Path, size: str, mode: str, begin: str = "") -> bench.Outcome:
    """Trains with its workdir on a disk of ``size``, in a new interpreter; what it left is ``folder/left``."""
    disk = folder / "disk"
    disk.mkdir(parents=True)
    places = (str(disk), size, mode, begin, str(folder / "left"))
    command = ["unshare", "-Urm", "sh", "-c", _ON_SMALL_DISK, "sh", *places,
               sys.executable, str(bench.ROOT / "launch/train.py"), *flags, f"--workdir={disk}/run"]  # fmt: skip
    env = {**os.environ, "XLA_FLAGS": bench.xla_flags()}
    done = subprocess.run(command, capture_output=True, text=True, timeout=bench.SECONDS, cwd=bench.ROOT, env=env)
    return bench.Outcome(done.returncode, done.stdout, done.stderr)


def fill_disks(flags: tuple[str, ...], straight: Path, scratch: Path, sizes: list[str]) -> Damage:
    """Runs on disks that are too small at different moments, and on ones that cannot be written.

    Each must end in one line; what it left goes on, with room, to the result of the ``straight`` run.
    """
    from tests.faults import kills

    found, expected = Damage(), kills.outcome(straight)
    tries = [("full disk", size, "rw", "") for size in sizes]
    tries += [("read-only folder", "8m", "ro", ""), ("read-only folder", "8m", "ro", str(straight))]
    for number, (kind, size, mode, begin) in enumerate(tries):
        folder, what = scratch / f"disk{number}", f"{kind} {size} {'with a run' if begin else 'empty'}"
        found.tried[kind] += 1
        end = on_small_disk(flags, folder, size, mode, begin)
        if end.clean:
            found.detected[kind] += 1
        else:
            found.faults.append(f"{what}: code {end.code}: {end.errors[-1500:]}")
        left = folder / "left"
        again = bench.run("train.py", *flags, f"--workdir={left}", log=folder / "again.log")
        if again.code != 0 or (names := kills.differing(kills.outcome(left), expected)):
            found.faults.append(f"{what}: does not go on: {again.errors[-300:] if again.code else names}")
    return found

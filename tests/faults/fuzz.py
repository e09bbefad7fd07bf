"""Malformed inputs given to the real commands: each must be refused in one line, and leave nothing but that line.

An input is written into a sandbox, ``<sandbox>/in``; the command may write below ``<sandbox>/out`` alone. It runs in
``<sandbox>/at/work``, so that a file in its working directory, or two folders above, is seen too. Judged are
the exit code, what was printed, every file outside ``out``, what lies in ``out``, and the memory that was taken.
"""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np

from data_pipeline import preprocess
from mednext_jax import modeldir, peft
from mednext_jax.nn import paths
from mednext_jax.nn.mednext import MedNeXt, parameter_shapes
from tests.faults import bench

MOST_BYTES = 400 << 20  # that a refusal may take beyond the imported libraries; the small inputs take a few
SECONDS = 60.0
RESULTS = (
    "dataset.json", "model.json", "adapter_config.json", "export.json", "result.json", "*.safetensors", "*.nii.gz",
)  # fmt: skip


@dataclass(frozen=True)
class Malformed:
    """One input.

    Attributes:
      area, name: what reads it, and what is wrong with it.
      command: file in ``launch/``.
      flags: with ``{in}``, ``{out}`` and ``{good}`` (folder of sound inputs) for the paths.
      make: writes the input into the folder ``in``.
      harmless: the damage may as well be one that changes nothing; then the command may succeed.
      told: the refusal must name one of these, so that it is for this input and not for another reason.
    """

    area: str
    name: str
    command: str
    flags: tuple[str, ...]
    make: Callable[[Path], None] = lambda folder: None
    harmless: bool = False
    told: tuple[str, ...] = ()


@dataclass
class Fuzzed:
    """Counts by area; ``accepted``: harmless inputs that were processed to the end."""

    tried: Counter = field(default_factory=Counter)
    refused: Counter = field(default_factory=Counter)
    accepted: Counter = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    most_mib: float = 0.0


def make_good(folder: Path) -> Path:
    """Sound inputs beside which the malformed ones are made: raw cases, a store, a model and an adapter on it."""
    bench.write_cases(folder / "raw", count=4, shape=(20, 19, 18))
    preprocess.preprocess(folder / "raw", folder / "store", workers=1, progress=False)
    model = MedNeXt(in_channels=4, n_channels=2, n_classes=3, exp_r=1, kernel_size=1, block_counts=(0,) * 9)
    rng = np.random.default_rng(0)
    shapes = parameter_shapes(model)
    flat = {path: rng.normal(0, 0.1, leaf.shape).astype(np.float32) for path, leaf in shapes.items()}
    info = modeldir.ModelInfo(
        kwargs={"in_channels": 4, "n_channels": 2, "n_classes": 3, "exp_r": 1, "kernel_size": 1,
                "block_counts": [0] * 9},
        channels=("t1n", "t1c", "t2w", "t2f"), normalization="zscore_brain", output="regions",
        label_scheme="brats2023", regions={"WT": [1, 2, 3], "TC": [1, 3], "ET": [3]}, patch_voxels=(16, 16, 16),
    )  # fmt: skip
    info = modeldir.save_model(folder / "model", info, flat)
    method = peft.create("head")
    _, params = method.apply_to(model, paths.unflatten(flat), jax.random.key(0))
    peft.save_adapter(folder / "adapter", method, params, flat, info)
    return folder


def listing(folder: Path) -> dict[str, str]:
    """Every entry below a folder: what it is, and for a file a hash of its content."""
    found = {}
    for root, folders, files in os.walk(os.fsencode(folder)):
        for name in folders + files:
            path = os.path.join(root, name)
            if os.path.islink(path):
                found[os.fsdecode(path)] = f"link {os.fsdecode(os.readlink(path))}"
            elif os.path.isfile(path):
                with open(path, "rb") as file:
                    found[os.fsdecode(path)] = hashlib.file_digest(file, "sha256").hexdigest()
            else:
                found[os.fsdecode(path)] = "other"
    return found


def try_all(inputs: Sequence[Malformed], good: Path, scratch: Path) -> Fuzzed:
    """Gives every input to its command; called again, it goes on, and tries again what was at fault."""
    scratch.mkdir(parents=True, exist_ok=True)
    kept = scratch / "fuzzed.json"
    passed: dict[str, list] = json.loads(kept.read_text()) if kept.exists() else {}
    found = Fuzzed()
    sound = listing(good)
    for number, malformed in enumerate(inputs):
        found.tried[malformed.area] += 1
        name = f"{malformed.area}: {malformed.name}"
        if name not in passed:
            sandbox = scratch / f"{number}"
            shutil.rmtree(sandbox, ignore_errors=True)
            (sandbox / "in").mkdir(parents=True)
            (sandbox / "out").mkdir()
            (sandbox / "at" / "work").mkdir(parents=True)
            malformed.make(sandbox / "in")
            faults, end = _try(malformed, good, sandbox)
            found.faults += [f"{name}: {fault}" for fault in faults]
            if faults:
                continue
            shutil.rmtree(sandbox)
            passed[name] = [end.code, end.peak_bytes / 2**20, end.errors.strip()[-300:]]  # the words, to be read
            kept.write_text(json.dumps(passed))
        code, mib = passed[name][:2]
        (found.refused if code else found.accepted)[malformed.area] += 1
        found.most_mib = max(found.most_mib, mib)
    if listing(good) != sound:
        found.faults.append("a sound input was changed")
    return found


def _try(malformed: Malformed, good: Path, sandbox: Path) -> tuple[list[str], bench.Outcome]:
    """What is wrong with how the command took it, and how it ended."""
    places = {"in": sandbox / "in", "out": sandbox / "out", "good": good}
    flags = tuple(flag.format(**places) if "{" in flag else flag for flag in malformed.flags)
    before = listing(sandbox)
    log = sandbox.with_name(f"{sandbox.name}.log")
    with bench.Command(malformed.command, *flags, log=log, folder=sandbox / "at" / "work") as command:
        end = command.wait(SECONDS)
    faults = []
    out = os.fspath(sandbox / "out")
    after = {path: what for path, what in listing(sandbox).items() if not path.startswith(out + os.sep)}
    if after != before:
        faults.append(f"changed outside the output: {sorted(after.items() ^ before.items())[:3]}")
    if end.peak_bytes > MOST_BYTES:
        faults.append(f"took {end.peak_bytes / 2**20:.0f} MiB")
    if end.code == 0 and malformed.harmless and "Traceback" not in end.output + end.errors:
        return faults, end
    if malformed.told and not any(word in end.errors for word in malformed.told):
        faults.append(f"refused for something else: {end.errors.strip()[-200:]}")
    if not end.clean:
        faults.append(f"code {end.code}: {(end.errors or end.output).strip()[-400:]}")
    return faults + [f"partial result {name}" for name in partial(sandbox / "out")], end


def partial(out: Path) -> list[str]:
    """What a refusal must not leave behind: anything that looks like a result, and temporary files.

    The base of a training run is none: it is written whole before the first step, and again by the next start.
    """
    left = [path for pattern in RESULTS for path in out.rglob(pattern) if path.parent.name != "base"]
    left += [path for path in out.rglob(".*") if path.name != ".lock"]
    return [str(path.relative_to(out)) for path in left]

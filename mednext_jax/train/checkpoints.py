"""Checkpoints: Orbax writes them, we decide what may come back.

A step holds the training state (trainable leaves, optimizer, average, counters, key), JSON records (data
position, progress, config), and the item ``leaves``: shape, dtype and CRC32 of every leaf, CRC32 of every record.
The base is stored once per run, outside.

Orbax alone restores a flipped byte without a word, pads leaves of another shape and casts leaves of another
dtype (measured on 0.12.8). So a step is restored into the tree that its own list of leaves describes, each
leaf is checked against its CRC32, and only then compared with what the run needs.
"""

import json
import os
import shutil
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as preservation

from mednext_jax.train import devices, failed_reads, waits

RECORDS = ("data", "progress", "config")
UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of a step that was being written when the run died
WRITE_SECONDS = 1800.0  # longest time for one step to be on disk
SPARE_BYTES = 1 << 20  # for manifests and records
KEEP_LATEST = 2  # the newest and, should it be damaged, the one before; the best one is kept besides


def flatten_state(state: Any) -> dict[str, Any]:
    """Any tree as a flat dict ``{"trainable/stem/kernel": leaf}``, with JAX's own path names."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def describe_leaves(flat: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Shape, dtype and CRC32 of every leaf, as plain JSON."""
    return {
        path: {
            "shape": list(leaf.shape),
            "dtype": str(leaf.dtype),
            "crc32": zlib.crc32(np.ascontiguousarray(leaf).tobytes()),
        }
        for path, leaf in flat.items()
    }


def describe_record(record: Any) -> int:
    """CRC32 of a JSON value, the same before it was written and after it was read."""
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def compare(found: Mapping[str, Mapping[str, Any]], expected: Mapping[str, Any], where: str) -> None:
    """Raises ValueError, naming a leaf, unless ``found`` has exactly the leaves, shapes and dtypes expected.

    Args:
      found: what :func:`describe_leaves` gave.
      expected: flat dict of arrays or shapes.
      where: what the message calls the checkpoint.
    """
    for kind, paths in (("lacks", expected.keys() - found.keys()), ("has", found.keys() - expected.keys())):
        if paths:
            verb = "which this run needs" if kind == "lacks" else "which this run does not know"
            raise ValueError(
                f"{where} {kind} {min(paths)} (and {len(paths) - 1} more), {verb}: it belongs to another "
                "model, method or optimizer; give another --workdir or the config it was made with"
            )
    for path, leaf in expected.items():
        shape, dtype = tuple(found[path]["shape"]), found[path]["dtype"]
        if (shape, dtype) != (tuple(leaf.shape), str(leaf.dtype)):
            raise ValueError(
                f"{where}: {path} is {dtype}{list(shape)}, this run needs {leaf.dtype}{list(leaf.shape)}: "
                "it belongs to another model"
            )


class _Step(preservation.PreservationPolicy):
    """Keeps one step. Which, the run knows; Orbax's own memory of scores ends with the process."""

    step = 0

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        return [checkpoint.step == self.step for checkpoint in checkpoints]


class Checkpoints:
    """The ``checkpoints`` folder of a run. Saving goes on in the background while training does."""

    def __init__(self, directory: str | os.PathLike):
        self.directory = Path(directory).absolute()
        self._best = _Step()
        kept = preservation.AnyPreservationPolicy([preservation.LatestN(KEEP_LATEST), self._best])
        options = ocp.CheckpointManagerOptions(preservation_policy=kept)
        # Orbax would clean up in a thread that nobody waits for, and that fails aloud when a run ends at once.
        if jax.process_index() == 0:
            for unfinished in self.directory.glob(f"*{UNFINISHED}*"):
                shutil.rmtree(unfinished, ignore_errors=True)
        try:
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        except OSError as error:
            raise OSError(
                f"cannot use {self.directory} for checkpoints: {error}; choose another --workdir"
            ) from error
        except (ValueError, TypeError) as error:  # Orbax reads its own description of every step
            raise ValueError(
                f"a step in {self.directory} is damaged ({error}): move the folder of the newest one away and run the "
                "same command again; it goes on from the step before"
            ) from error

    def steps(self) -> list[int]:
        """Complete steps, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, records: Mapping[str, Any], best: int = 0) -> None:
        """Starts to write a step; copies the state first, so it may be donated at once.

        Args:
          state: tree of arrays, equal on all devices.
          records: JSON values for each of :data:`RECORDS`.
          best: the step to keep beside the newest ones, this or an earlier one; 0: none.
        """
        flat = flatten_state(devices.to_host(state))
        items = {name: ocp.args.JsonSave(records[name]) for name in RECORDS}
        self._check_space(step, sum(leaf.nbytes for leaf in flat.values()))
        sums = {name: describe_record(records[name]) for name in RECORDS}
        items["leaves"] = ocp.args.JsonSave({"leaves": describe_leaves(flat), "records": sums})
        args = ocp.args.Composite(state=ocp.args.StandardSave(flat), **items)
        self.wait()  # Orbax would too, without a limit
        self._best.step = best
        with self._writing(step):
            if not self._manager.save(step, args=args, force=True):
                raise OSError("Orbax skipped it")

    def _check_space(self, step: int, state_bytes: int) -> None:
        """Refuses before anything is written: a background write that fails is told late and at length."""
        free = shutil.disk_usage(self.directory).free
        if free < state_bytes + SPARE_BYTES:
            raise OSError(
                f"checkpoint {self.directory / str(step)} needs {(state_bytes + SPARE_BYTES) / 1e6:.1f} MB, "
                f"the disk has {free / 1e6:.1f} MB left: make room, run the same command again; it goes on "
                f"from step {self._manager.latest_step() or 0}"
            )

    def wait(self) -> None:
        """Returns when everything is on disk.

        Raises:
          OSError: that failed.
          TimeoutError: it took longer than :data:`WRITE_SECONDS`.
        """
        step = self._manager.latest_step()

        def finish() -> None:
            with self._writing(step):
                self._manager.wait_until_finished()

        told = (f"checkpoint {self.directory / str(step)} was not written within {WRITE_SECONDS:g} s: check the disk, "
                "run the same command again; it goes on from the newest complete step")  # fmt: skip
        waits.within(WRITE_SECONDS, finish, told)

    def close(self) -> None:
        """Waits and frees the background threads."""
        self.wait()
        self._manager.close()

    def discard_after(self, step: int) -> None:
        """Deletes the steps after ``step``: a run that goes back to it will write them anew."""
        for later in self.steps():
            if later > step:
                self._manager.delete(later)

    def records(self, step: int) -> dict[str, Any]:
        """The JSON records of a step. Raises as :meth:`restore`."""
        if step not in self.steps():
            raise FileNotFoundError(
                f"checkpoint {self.directory / str(step)} does not exist; complete steps are {self.steps()}"
            )
        records = self._read(step, {name: ocp.args.JsonRestore() for name in RECORDS})
        sums = self._described(step)["records"]
        for name, record in records.items():
            if describe_record(record) != sums.get(name):
                raise self.damaged(step, f"its record {name} does not have its CRC32")
            if not isinstance(record, dict):
                raise self.damaged(step, f"its record {name} is none")
        return records

    def restore(self, template: Any, step: int) -> Any:
        """The state of a step as numpy arrays, checked leaf by leaf.

        Args:
          template: tree of arrays or shapes that the state must have.
          step: one of :meth:`steps`.

        Raises: ValueError or FileNotFoundError naming the folder and, where one is at fault, the leaf.
        """
        leaves = self._described(step)["leaves"]
        expected = flatten_state(template)
        try:
            compare(leaves, expected, f"checkpoint {self.directory / str(step)}")
        except (KeyError, TypeError, AttributeError) as error:
            raise self.damaged(step, "its list of leaves is none") from error
        own = {path: np.empty(leaf["shape"], leaf["dtype"]) for path, leaf in leaves.items()}
        flat = self._read(step, {"state": ocp.args.StandardRestore(own)})["state"]
        for path, found in describe_leaves(flat).items():
            if found != leaves[path]:
                raise self.damaged(step, f"{path} does not have its CRC32")
        _, structure = jax.tree_util.tree_flatten(template)
        return jax.tree_util.tree_unflatten(structure, [flat[path] for path in expected])

    def _described(self, step: int) -> dict[str, dict[str, Any]]:
        """The item that says what the others must be."""
        described = self._read(step, {"leaves": ocp.args.JsonRestore()})["leaves"]
        if not isinstance(described, dict) or not all(
            isinstance(described.get(part), dict) for part in ("leaves", "records")
        ):
            raise self.damaged(step, "its list of leaves is none")
        return described

    def damaged(self, step: int, reason: str) -> ValueError:
        """The error that names a step's folder and what to do."""
        where = self.directory / str(step)
        return ValueError(f"checkpoint {where} is damaged: {reason}. {self._remedy(step)}")

    def _read(self, step: int, items: Mapping[str, Any]) -> dict[str, Any]:
        try:
            found = self._manager.restore(step, args=ocp.args.Composite(**items))
            missing = [name for name in items if found[name] is None]
        except Exception as error:  # Orbax and TensorStore raise a dozen kinds for files cut, lost or altered
            failed_reads.silence()
            first_line = (str(error).splitlines() or [""])[0][:200]
            raise ValueError(
                f"checkpoint {self.directory / str(step)} can not be read "
                f"({type(error).__name__}: {first_line}). {self._remedy(step)}"
            ) from error
        if missing:
            raise ValueError(
                f"checkpoint {self.directory / str(step)} lacks its item {missing[0]}. {self._remedy(step)}"
            )
        return {name: found[name] for name in items}

    def _remedy(self, step: int) -> str:
        earlier = [s for s in self.steps() if s < step]
        if earlier:
            return f"To go on from the step before, add --config.resume_step={earlier[-1]}"
        return "There is no earlier step: start anew in another --workdir"

    def _writing(self, step: int | None) -> "_Writing":
        return _Writing(f"checkpoint {self.directory / str(step)} could not be written")


class _Writing:
    """Turns whatever a background write raises into one OSError with a remedy; a lost process is no matter of disks."""

    def __init__(self, message: str):
        self.message = message

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, traceback) -> None:
        if isinstance(error, Exception) and not devices.lost_another(error):
            first_line = (str(error).splitlines() or [""])[0][:200]
            raise OSError(f"{self.message} ({first_line}): check free space and permissions") from error

"""Devices: the ``("data",)`` mesh over all of them, and putting arrays on it. One program for 1 to N."""

import os
import socket
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import multihost

Tree = Any


# Variables that launchers set to the number of tasks: SLURM's srun (not sbatch: its script is one process) and
# Open MPI's mpirun.
LAUNCHER_SIZES = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
BY_HAND = "name the first one with --coordinator=HOST:PORT, --process_count and --process_id"
DETERMINISTIC_FLAG = "--xla_gpu_deterministic_ops=true"
JOIN_SECONDS = 300  # longest wait for all processes to be there
MEET_SECONDS = 1800  # longest wait for the slowest to compile, or to validate its cases
FREE_SECONDS = 60  # longest wait for the processes of the run before to give the port back
HEARTBEAT_SECONDS = 60  # a process that was silent for so long is lost
LOST_SIGNS = ("Gloo", "NCCL", "coordination", "UNAVAILABLE", "DEADLINE_EXCEEDED", "heartbeat")


def process_place(coordinator: str = "", process_count: int = 0, process_id: int = -1) -> dict[str, Any] | None:
    """Where this process stands among several, as ``jax.distributed.initialize`` takes it; None for a single one.

    Args:
      coordinator: ``host:port`` of the first process, with ``process_count`` and ``process_id``; empty: ask
        the launcher (SLURM, Open MPI) if there is one with more than one task. Then JAX finds the place: {}.

    Raises: ValueError, naming the flag or the launcher's variable, for what says no place.
    """
    if not coordinator and (process_count or process_id >= 0):
        raise ValueError("--process_count and --process_id need --coordinator=HOST:PORT, the first process's address")
    if coordinator:
        if process_count < 1 or not 0 <= process_id < process_count:
            raise ValueError(
                f"--coordinator needs --process_count (it is {process_count}) and --process_id, from 0 to "
                f"one less (it is {process_id})"
            )
        if not coordinator.rpartition(":")[2].isdecimal():
            raise ValueError(f"--coordinator is {coordinator!r}: give the first process's address as HOST:PORT")
        return {"coordinator_address": coordinator, "num_processes": process_count, "process_id": process_id}
    return {} if any(_launched(name) > 1 for name in LAUNCHER_SIZES) else None


def join_processes(coordinator: str = "", process_count: int = 0, process_id: int = -1) -> None:
    """Makes this process one of several, before any device is touched; does nothing for a single one.

    Args: as :func:`process_place`.

    Raises:
      ValueError: as :func:`process_place`.
      OSError: the processes do not find each other. Some of that JAX does not say but aborts, from C++: what can be
        found out before is.
    """
    found = process_place(coordinator, process_count, process_id)
    if found is None:
        return
    if coordinator and process_count > 1:
        _wait_for_address(coordinator, process_id)
    try:
        jax.distributed.initialize(
            **found, initialization_timeout=JOIN_SECONDS, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
        )
    except (ValueError, LookupError) as error:  # of a launcher's variable that is absent or garbage; JAX reads several
        raise ValueError(
            f"the launcher's variables do not say where this run's processes are ({error}): {BY_HAND}"
        ) from error
    except RuntimeError as error:  # JAX's own errors are RuntimeErrors
        raise _not_found((str(error).splitlines() or [""])[0][:200]) from error


def _not_found(reason: str) -> OSError:
    return OSError(
        f"the processes of this run did not find each other ({reason}): start as many as asked for, within five "
        "minutes, and check that the first one's host and port can be reached"
    )


def _wait_for_address(coordinator: str, process_id: int) -> None:
    """Until the first process can serve at its port, or the others reach it there. Raises OSError naming the port."""
    host, _, port = coordinator.rpartition(":")
    until = time.monotonic() + (JOIN_SECONDS if process_id else FREE_SECONDS)
    while True:
        try:
            if process_id:
                socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            else:
                with socket.socket() as probe:
                    # Connections of an ended run linger for a minute; only a port that is served is taken.
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind(("", int(port)))
            return
        except (OSError, OverflowError) as error:
            if time.monotonic() < until and not isinstance(error, OverflowError):
                time.sleep(0.5)
            elif process_id:
                raise _not_found(f"none answers at {coordinator}: {error}") from error
            else:
                raise OSError(
                    f"port {port} cannot be opened ({error}): wait for the run that has it to end, or give another "
                    "port to all processes"
                ) from error


def _launched(name: str) -> int:
    """The number of tasks that a launcher's variable holds; 1 without it."""
    value = os.environ.get(name) or "1"
    if not value.isdecimal():
        raise ValueError(f"the launcher's variable {name} is {value!r}, no number of processes: unset it, or {BY_HAND}")
    return int(value)


def lost_another(error: BaseException | None) -> bool:
    """Whether an error says that the network to another process broke, not that something is wrong here.

    Orbax's threads hand JAX's error on as a ValueError, or as the cause of a TimeoutError.
    """
    while error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError | ValueError) and any(s in str(error) for s in LOST_SIGNS):
            return True
        error = error.__cause__
    return False


def meet(name: str) -> None:
    """Waits until all processes are here, in a connection that does not mind how long that takes.

    The first collective between processes does: on CPUs it gives up after half a minute, and processes that share
    a machine compile more than that apart (measured on two busy cores).
    """
    multihost.get_barrier_sync_fn()(key=name, timeout_ms=MEET_SECONDS * 1000)


def make_deterministic() -> None:
    """Asks XLA for GPU kernels that give the same bits every time; before any device is touched."""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DETERMINISTIC_FLAG}".strip()


def check_deterministic() -> None:
    """Raises ValueError if a GPU is used and XLA was not asked, or no longer could be."""
    if jax.default_backend() == "gpu" and DETERMINISTIC_FLAG not in os.environ.get("XLA_FLAGS", ""):
        raise ValueError(
            f"config.deterministic needs XLA_FLAGS={DETERMINISTIC_FLAG} in the environment before JAX starts; "
            "launch/train.py sets it by itself"
        )


def make_mesh(n_devices: int = 0) -> Mesh:
    """A mesh with one axis ``data`` over the first ``n_devices`` devices of all processes; 0 means all.

    The axis type is Auto: the default of ``jax.make_mesh`` is Explicit, where a gather in the loss raises.
    """
    devices = jax.devices()
    if n_devices > len(devices):
        raise ValueError(f"config.n_devices is {n_devices}: there are {len(devices)} devices")
    devices = devices[: n_devices or len(devices)]
    if len({device.process_index for device in devices}) < jax.process_count():
        raise ValueError(
            f"config.n_devices is {n_devices}, which leaves some of the {jax.process_count()} processes without a "
            "device: 0 takes all"
        )
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def check_batch_size(batch_size: int, accumulate: int, mesh: Mesh) -> None:
    """Raises ValueError, naming both numbers, unless the batch divides among devices and micro-batches."""
    n_devices = mesh.devices.size
    if batch_size < 1 or batch_size % n_devices:
        raise ValueError(
            f"config.data.batch_size is {batch_size}: it must be a multiple of the {n_devices} devices "
            "(or set config.n_devices)"
        )
    if accumulate < 1 or batch_size % (n_devices * accumulate):
        raise ValueError(
            f"config.optim.accumulate is {accumulate}: accumulate x devices ({n_devices}) must divide "
            f"config.data.batch_size ({batch_size})"
        )


def replicate(mesh: Mesh, tree: Tree) -> Tree:
    """Copies of every leaf on every device. Takes host arrays that are equal in all processes."""
    sharding = NamedSharding(mesh, PartitionSpec())
    return place(tree, jax.tree.map(lambda _: sharding, tree))


def split_shardings(mesh: Mesh, tree: Tree) -> Tree:
    """For every leaf the sharding that gives each device one slice of it, along its largest axis that divides.

    A leaf without such an axis (a bias of 3 on 4 devices, a counter) is replicated.
    """

    def split(leaf: Any) -> NamedSharding:
        sizes = [size if size % mesh.devices.size == 0 else 0 for size in leaf.shape]
        if not any(sizes):
            return NamedSharding(mesh, PartitionSpec())
        axis = int(np.argmax(sizes))
        return NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))

    return jax.tree.map(split, tree)


def place(tree: Tree, shardings: Tree) -> Tree:
    """Global arrays with these shardings. Takes host arrays that are equal in all processes."""

    def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
        leaf = np.asarray(leaf)
        with jax.transfer_guard("allow"):  # asked for, but among several processes JAX takes it for an accident
            return jax.make_array_from_process_local_data(sharding, leaf, leaf.shape)

    return jax.tree.map(put, tree, shardings)


def shard_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Splits this process's rows of the batch over its devices; returns global arrays."""
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    with jax.transfer_guard("allow"):  # see place
        return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}


def to_host(tree: Tree) -> Tree:
    """Numpy copies that own their memory; a leaf that is split over processes is gathered by all of them.

    ``jax.device_get`` may return a view of the device's buffer on CPU, which a donating step then overwrites.
    """

    def copy(leaf: Any) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
        return np.array(jax.device_get(leaf), copy=True)

    return jax.tree.map(copy, tree)

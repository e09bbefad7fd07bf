"""The program that was compiled last for such a run, loaded while JAX finds out which one this run needs.

With everything in JAX's compilation cache a run still waits for tracing and lowering, which say what is wanted, and
then for loading it. Loading needs no Python, so it can go on beside them, if one guesses: that what was compiled last
for arrays of these shapes is wanted again. A guess is used only if the lowered text is the same to the letter, made by
the same libraries and flags for the same processor and devices. Otherwise JAX compiles, or reads its cache, as ever.
"""

import contextlib
import gc
import hashlib
import os
import pickle
import platform
import threading
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jaxlib
from jax.experimental import serialize_executable

from mednext_jax.train.workdir import write_whole

FOLDER = "last_programs"  # in JAX's compilation cache
KEEPER = "keeper of the last program"

# What JAX reports when it has compiled a program and kept it. One that it found in its cache must not be written down:
# read again, that lacks functions and fails when it runs (jaxlib 0.10.2, CPU).
PUT_INTO_THE_CACHE = "/jax/compilation_cache/cache_misses"


def compiled(jitted: Any, arguments: tuple, devices: Sequence[jax.Device]) -> jax.stages.Compiled:
    """``jitted.lower(*arguments).compile()``, sooner if the last run with such arguments compiled the same.

    On CPU, in a single process and with a compilation cache; elsewhere it is just that.

    Args:
      jitted: a function under ``jax.jit``.
      arguments: trees of arrays or ``ShapeDtypeStruct``.
      devices: those that the program runs on.
    """
    file = _file_for(arguments, devices)
    if file is None:
        return jitted.lower(*arguments).compile()
    with ThreadPoolExecutor(1) as beside, _collector_paused():
        guess = beside.submit(_load, file, devices)
        lowered = jitted.lower(*arguments)
        identity = _identity(lowered.as_text(), devices)
        found, program = guess.result()
    if found == identity:
        return program
    with _events() as events:
        program = lowered.compile()
    if PUT_INTO_THE_CACHE in events:  # half a second's work, which the first steps need not wait for
        threading.Thread(target=_keep, args=(file, identity, program), name=KEEPER).start()
    return program


def _file_for(arguments: tuple, devices: Sequence[jax.Device]) -> Path | None:
    """Where the last program for such arguments is kept; None if none is to be."""
    cache = jax.config.jax_compilation_cache_dir
    if not cache or "://" in cache or not jax.config.jax_enable_compilation_cache:
        return None
    if os.environ.get("XLA_FLAGS", "-").lstrip()[:1] not in ("", "-"):
        return None  # it names a file, and what that holds may change
    if jax.process_count() > 1 or devices[0].platform != "cpu":
        return None
    leaves, structure = jax.tree.flatten(arguments)
    shapes = [(leaf.shape, str(leaf.dtype)) for leaf in leaves]
    return Path(cache, FOLDER, _digest(str(structure), repr(shapes), str(len(devices))))


def _identity(text: str, devices: Sequence[jax.Device]) -> str:
    """All that a compiled program depends on, as a digest."""
    places = repr([(device.id, device.device_kind) for device in devices])
    flags = os.environ.get("XLA_FLAGS", ""), repr(sorted(jax.config.values.items()))
    return _digest(text, jax.__version__, jaxlib.__version__, *flags, _processor(), places)


def _processor() -> str:
    """What this machine's processor can do: programs use its instructions."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return repr(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    return f"{platform.machine()} {platform.processor()}"


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _load(file: Path, devices: Sequence[jax.Device]) -> tuple[str | None, jax.stages.Compiled | None]:
    """Identity and program of a file; None for both if there is none that can be loaded."""
    try:
        identity, serialized = pickle.loads(zlib.decompress(file.read_bytes()))
        return identity, serialize_executable.deserialize_and_load(*serialized, execution_devices=devices)
    except Exception:  # whatever is wrong with a file that only saves time, the way without it is open
        return None, None


def _keep(file: Path, identity: str, program: jax.stages.Compiled) -> None:
    """Puts the program in the place of the last one, if it can be written down and there is room."""
    with contextlib.suppress(OSError, ValueError, NotImplementedError):
        content = pickle.dumps((identity, serialize_executable.serialize(program)))
        file.parent.mkdir(parents=True, exist_ok=True)
        for left in file.parent.glob(f".{file.name}.*"):  # by a run that was killed while it wrote
            left.unlink()
        write_whole(file, zlib.compress(content, 1))


@contextlib.contextmanager
def _events() -> Iterator[list[str]]:
    """The names of the events that JAX reports meanwhile."""
    seen: list[str] = []

    def listener(event: str, **_: Any) -> None:
        seen.append(event)

    jax.monitoring.register_event_listener(listener)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_listener(listener)


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """Tracing makes millions of objects; looking for garbage among them takes a tenth of its time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()

"""How benchmarks time, what they know of a compiled program and of the machine, and the table they print."""

import multiprocessing
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.traffic import moved_bytes
from data_pipeline import parallel
from mednext_jax.peft.flops import flops

OURS = "ours"
SEPARATOR = ": "
Facts = dict[str, float]


@dataclass(frozen=True)
class Work:
    """One thing to time, described so that a process of its own can make it too.

    Attributes:
      name: "what: whose"; those that agree up to the colon are compared, "ours" with every other.
      make: a function of a module, ``(*arguments) -> (run, facts)``; ``run()`` does the work once and waits for its
        end, ``facts`` is what is known beforehand, such as FLOPs and bytes.
      arguments: plain values.
    """

    name: str
    make: Callable[..., tuple[Callable[[], Any], Facts]]
    arguments: tuple = ()


def compiled(function: Callable, *arguments: Any) -> tuple[Callable[[], Any], Facts]:
    """``function`` compiled for ``arguments``, and what its program costs."""
    program = jax.jit(function).lower(*arguments).compile()
    return lambda: jax.block_until_ready(program(*arguments)), costs(program, function, arguments)


def costs(program: jax.stages.Compiled, function: Callable, arguments: tuple) -> Facts:
    """What ``program``, compiled from ``function``, does, moves and holds."""
    return {
        "gflop": flops(function, *arguments) / 1e9,
        "gbytes": moved_bytes(program.as_text()) / 1e9,
        "temporaries_gb": program.memory_analysis().temp_size_in_bytes / 1e9,
    }


def measure(works: Sequence[Work], repeats: int) -> list[dict[str, Any]]:
    """Times the works alternating, all in this process, after one run of each to warm up.

    Returns: one row per work: medians and spread in seconds, processor seconds, and the work's facts.
    """
    made = [work.make(*work.arguments) for work in works]
    for run, _ in made:
        run()
    samples: list[list[Facts]] = [[] for _ in works]
    for _ in range(repeats):
        for (run, _), own in zip(made, samples, strict=True):
            own.append(timed(run))
    return [medians(work.name, own) | facts for work, own, (_, facts) in zip(works, samples, made, strict=True)]


def measure_apart(works: Sequence[Work], repeats: int, memory: bool = False) -> list[dict[str, Any]]:
    """Times the works alternating, each in a process of its own, after one run of each to warm up.

    In one process a library would find what the others leave: PyTorch's forward pass takes up to twice as long on a
    CPU when no backward pass beside it keeps memory in the process.

    Args:
      memory: also the peak memory of each, in a second run that is not timed.

    Returns: rows as of :func:`measure`; of a peer's work that failed, its name and ``failed``, one line.
    """
    on_gpu = jax.default_backend() == "gpu"  # asked once: a peer's process need not open the card for JAX
    rows: list[dict[str, Any]] = [{"name": work.name} for work in works]
    samples: list[list[Facts]] = [[] for _ in works]
    with ExitStack() as stack:
        processes = [stack.enter_context(_process()) for _ in works]

        def within(i: int, function: Callable[..., Facts], *arguments: Any) -> Facts:
            try:
                found = processes[i].submit(_within, function, _is_ours(works[i].name), on_gpu, *arguments).result()
            except BrokenProcessPool:
                found = "its process died, probably out of memory"
                if _is_ours(works[i].name):
                    raise ChildProcessError(f"{works[i].name}: {found}") from None
            if isinstance(found, str):
                rows[i]["failed"] = found
            return {} if isinstance(found, str) else found

        for i, work in enumerate(works):
            began = time.perf_counter()
            rows[i] |= within(i, _prepare, work, memory)
            taken = time.perf_counter() - began
            print(f"{work.name}: {rows[i].get('failed', 'ready')} after {taken:.1f} s", file=sys.stderr, flush=True)
        for _ in range(repeats):
            for i, own in enumerate(samples):
                if "failed" not in rows[i] and (sample := within(i, _turn)):
                    own.append(sample)
    return [row if "failed" in row else medians(row["name"], own) | row for row, own in zip(rows, samples, strict=True)]


def timed(run: Callable[[], Any]) -> Facts:
    """Seconds and processor seconds of one run."""
    began = time.perf_counter(), time.process_time()
    run()
    return {"seconds": time.perf_counter() - began[0], "cpu_seconds": time.process_time() - began[1]}


_prepared: list[Callable[[], Any]] = []  # what a process of its own runs


def _prepare(work: Work, memory: bool, on_gpu: bool) -> Facts:
    run, facts = work.make(*work.arguments)
    run()
    _prepared.append(run)
    return facts | ({"peak_memory_gb": _peak_memory(run, _is_ours(work.name), on_gpu) / 1e9} if memory else {})


def _turn(on_gpu: bool) -> Facts:
    (run,) = _prepared
    if on_gpu:
        run()  # while it waited for the others' turns, the card's clock fell
    return timed(run)


def _within(function: Callable[..., Facts], ours: bool, on_gpu: bool, *arguments: Any) -> Facts | str:
    """In a process of its own: what ``function`` gives, or for a peer's work in one line why it failed."""
    try:
        return function(*arguments, on_gpu)
    except Exception as error:  # of whatever library it uses, which this project may be unable to read
        if ours:
            raise
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    finally:
        if on_gpu and not ours:
            import torch

            torch.cuda.empty_cache()  # the others need the card's memory; the next turn's first run takes it again


def medians(name: str, samples: Sequence[Facts]) -> dict[str, Any]:
    """A row: the median of every quantity, and the spread of the seconds."""
    seconds = [sample["seconds"] for sample in samples]
    middle = {key: statistics.median(sample[key] for sample in samples) for key in samples[0]}
    return {"name": name, **middle, "fastest": min(seconds), "slowest": max(seconds)}


def apart(function: Callable, *arguments: Any) -> Any:
    """``function(*arguments)`` in a fresh process."""
    with _process() as pool:
        return pool.submit(function, *arguments).result()


def _process() -> ProcessPoolExecutor:
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, mp_context=spawn, initializer=parallel.end_with_parent)


def _is_ours(name: str) -> bool:
    return name.endswith(SEPARATOR + OURS)


def _peak_memory(run: Callable[[], Any], by_jax: bool, on_gpu: bool) -> int:
    """Most bytes in use during a run that is not the first.

    On a GPU the memory of the card, for JAX since the process began; on a CPU what this process holds in all:
    interpreter, libraries, program, arrays.
    """
    if on_gpu:
        if by_jax:
            return jax.local_devices()[0].memory_stats()["peak_bytes_in_use"]
        import torch

        torch.cuda.reset_peak_memory_stats()  # forget the trials by which the library chose its ways
        run()
        return torch.cuda.max_memory_allocated()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of compiling
    run()
    with suppress(OSError):
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # where there is no /proc: compiling included
    return most if sys.platform == "darwin" else 1024 * most


def _copy(mbytes: int) -> tuple[Callable[[], Any], Facts]:
    array = [jnp.ones((mbytes, 2**18))]
    program = jax.jit(lambda x: x + 1, donate_argnums=0)  # in place: new memory costs more than the copy

    def run() -> None:
        array[0] = jax.block_until_ready(program(array[0]))

    return run, {"bytes": 2.0 * array[0].nbytes}


def _product(edge: int, dtype: str) -> tuple[Callable[[], Any], Facts]:
    # Of noise: a card may multiply zeros or ones faster.
    m = jax.random.normal(jax.random.key(0), (edge, edge), jnp.dtype(dtype))
    run, facts = compiled(lambda m: m @ m, m)
    return run, {"flop": 1e9 * facts["gflop"]}


def ceilings(dtype: str) -> dict[str, Any]:
    """This machine's copy bandwidth (GB/s, read plus written) and its rate for matrices of ``dtype`` (GFLOP/s)."""
    on_cpu = jax.default_backend() == "cpu"
    mbytes, edge = (256, 2048) if on_cpu else (4096, 8192)
    copy, product = measure([Work("copy", _copy, (mbytes,)), Work("product", _product, (edge, dtype))], 5)
    return {"copy_gb_per_s": copy["bytes"] / copy["fastest"] / 1e9,
            "matmul_gflop_per_s": product["flop"] / product["fastest"] / 1e9, "dtype": dtype}  # fmt: skip


def result(rows: list[dict[str, Any]], dtype: str = "float32", **more: Any) -> dict[str, Any]:
    """What ``--json`` writes: rows beside the machine's ceilings for ``dtype``, ratios to the peer, and what failed."""
    limits = ceilings(dtype)
    failed = {row["name"]: row["failed"] for row in rows if "failed" in row}
    rows = [row for row in rows if "failed" not in row]
    for row in rows:
        if "gflop" in row:
            arithmetic = row["gflop"] / limits["matmul_gflop_per_s"]
            floor = max(arithmetic, row.get("gbytes", 0.0) / limits["copy_gb_per_s"])
            row |= {"floor_seconds": floor, "floor_share": floor / row["seconds"]}
    device = jax.devices()[0]
    return {
        "command": sys.argv,
        "device": device.device_kind if device.platform != "cpu" else f"{platform.machine()}, {os.cpu_count()} cores",
        "jax": jax.__version__,
        "ceilings": limits,
        "rows": rows,
        "ratio_to_peer": ratios(rows),
        "failed": failed,
        **more,
    }


def ratios(rows: Sequence[dict[str, Any]]) -> dict[str, Facts]:
    """Ours over each peer's, by work and peer: of median time, and of peak memory where it was measured."""
    named = {row["name"]: row for row in rows}
    found = {}
    for name, row in named.items():
        work, separator, who = name.partition(SEPARATOR)
        ours = named.get(f"{work}{SEPARATOR}{OURS}")
        if separator and who != OURS and ours:
            quantities = [key for key in ("seconds", "cpu_seconds", "peak_memory_gb") if key in row and key in ours]
            found[f"{work} against {who}"] = {key: ours[key] / row[key] for key in quantities}
    return found


def plain_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The lines of a table of rows that each have a name and numbers."""
    columns = list(dict.fromkeys(key for row in rows for key in row if key != "name"))
    width = max(len(row["name"]) for row in rows) + 2
    widths = {key: max(len(key), 9) + 3 for key in columns}
    lines = [" " * width + "".join(f"{key:>{widths[key]}}" for key in columns)]
    for row in rows:
        cells = {key: format(row[key], ".4g") if key in row else "-" for key in columns}
        lines.append(f"{row['name']:{width}}" + "".join(f"{cells[key]:>{widths[key]}}" for key in columns))
    return lines


def table(found: dict[str, Any]) -> str:
    """The rows as plain text, then ratios and ceilings."""
    lines = plain_table(found["rows"])
    for name, ratio in found["ratio_to_peer"].items():
        lines.append(f"{name}: " + ", ".join(f"{value:.3f} of its {key}" for key, value in ratio.items()))
    limits = found["ceilings"]
    lines.append(f"{found['device']}, jax {found['jax']}: copies {limits['copy_gb_per_s']:.1f} GB/s, multiplies "
                 f"{limits['matmul_gflop_per_s']:.0f} GFLOP/s in {limits['dtype']}")
    return "\n".join(lines)

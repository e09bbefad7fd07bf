"""How benchmarks time, what they know of a compiled program and of the machine, and the table they print."""

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.traffic import moved_bytes
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


def measure(works: Sequence[Work], repeats: int, told: bool = True) -> list[dict[str, Any]]:
    """Times the works alternating, all in this process, after one run of each to warm up.

    Args:
      told: whether a line on stderr says when each is ready.

    Returns: one row per work: medians and spread in seconds, processor seconds, and the work's facts.
    """
    made = []
    for work in works:
        began = time.perf_counter()
        made.append(work.make(*work.arguments))
        made[-1][0]()
        if told:
            tell(f"{work.name}: ready", began)
    samples: list[list[Facts]] = [[] for _ in works]
    for _ in range(repeats):
        for (run, _), own in zip(made, samples, strict=True):
            own.append(timed(run))
    return [medians(work.name, own) | facts for work, own, (_, facts) in zip(works, samples, made, strict=True)]


def tell(line: str, began: float) -> None:
    """A line on stderr with the time that something took, for whoever waits."""
    print(f"{line} after {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)


def timed(run: Callable[[], Any]) -> Facts:
    """Seconds and processor seconds of one run."""
    began = time.perf_counter(), time.process_time()
    run()
    return {"seconds": time.perf_counter() - began[0], "cpu_seconds": time.process_time() - began[1]}


def medians(name: str, samples: Sequence[Facts]) -> dict[str, Any]:
    """A row: the median of every quantity, and the spread of the seconds."""
    seconds = [sample["seconds"] for sample in samples]
    middle = {key: statistics.median(sample[key] for sample in samples) for key in samples[0]}
    return {"name": name, **middle, "fastest": min(seconds), "slowest": max(seconds)}


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
    copy, product = measure([Work("copy", _copy, (mbytes,)), Work("product", _product, (edge, dtype))], 5, told=False)
    return {"copy_gb_per_s": copy["bytes"] / copy["fastest"] / 1e9,
            "matmul_gflop_per_s": product["flop"] / product["fastest"] / 1e9, "dtype": dtype}  # fmt: skip


def result(rows: list[dict[str, Any]], dtype: str = "float32") -> dict[str, Any]:
    """What ``--json`` writes: rows beside the machine's ceilings for ``dtype``, ratios to the peer, and what failed."""
    limits = ceilings(dtype)
    failed = {row["name"]: row["failed"] for row in rows if "failed" in row}
    rows = [row for row in rows if "failed" not in row]
    for row in rows:
        if "gflop" in row or "gbytes" in row:
            arithmetic = row.get("gflop", 0.0) / limits["matmul_gflop_per_s"]
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
    }


def is_ours(name: str) -> bool:
    """Whether a work of this name is ours: it says so, or names nobody."""
    return SEPARATOR not in name or name.endswith(SEPARATOR + OURS)


def ratios(rows: Sequence[dict[str, Any]]) -> dict[str, Facts]:
    """Ours over each peer's, by work and peer: of median time, and of peak memory where it was measured."""
    named = {row["name"]: row for row in rows}
    found = {}
    for name, row in named.items():
        work, _, who = name.partition(SEPARATOR)
        ours = named.get(f"{work}{SEPARATOR}{OURS}")
        if ours and not is_ours(name):
            found[f"{work} against {who}"] = shares(ours, row)
    return found


def shares(ours: dict[str, Any], peers: dict[str, Any]) -> Facts:
    """Ours over the peer's, of what was measured of both."""
    quantities = [key for key in ("seconds", "cpu_seconds", "peak_memory_gb") if key in ours and key in peers]
    return {key: ours[key] / peers[key] for key in quantities}


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
    for name, operations in found.get("profile", {}).items():
        where = "added up over all threads or streams (the profiler slows small operations)"
        lines += ["", f"{name}, what takes longest in one run more, {where}:", *plain_table(operations)]
    if "trace" in found:
        lines += ["", f"traces, for ui.perfetto.dev: {found['trace']}"]
    limits = found["ceilings"]
    lines.append(f"{found['device']}, jax {found['jax']}: copies {limits['copy_gb_per_s']:.1f} GB/s, multiplies "
                 f"{limits['matmul_gflop_per_s']:.0f} GFLOP/s in {limits['dtype']}")
    return "\n".join(lines)

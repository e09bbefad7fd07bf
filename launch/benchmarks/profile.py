"""Where the time of one run goes, operation by operation, as JAX's profiler sees it."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import jax

from benchmarks.timing import Work

MOST = 25  # operations that are told
NUMBER = re.compile(r"([._](clone|\d+))+$")  # by which equal operations of a program differ
AROUND = ("while", "conditional", "call")  # what they hold is seen by itself


def of(work: Work, folder: str) -> list[dict[str, Any]]:
    """Runs the work once more, with the trace left in ``folder`` (for ui.perfetto.dev): see :func:`longest`."""
    run, _ = work.make(*work.arguments)
    run()
    with jax.profiler.trace(folder):
        run()
    newest = max(Path(folder).rglob("*.trace.json.gz"), key=lambda file: file.stat().st_mtime_ns)
    with gzip.open(newest) as file:
        return longest(json.load(file)["traceEvents"])


def longest(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the operations that take the longest, by the names that XLA gives them, of the others and of all:
    milliseconds, how often, and the share of all operations' time.

    Args: of a trace in Chrome's format.
    """
    threads = {(event["pid"], event["tid"]): event["args"]["name"]
               for event in events if event.get("name") == "thread_name"}  # fmt: skip
    on_streams = {place for place, name in threads.items() if name.startswith("Stream")}  # of a GPU; other lines repeat
    found: dict[str, list[float]] = {}
    for event in events:
        if "hlo_op" not in event.get("args", {}) or (on_streams and (event["pid"], event["tid"]) not in on_streams):
            continue
        if (name := NUMBER.sub("", event["name"])) in AROUND:
            continue
        own = found.setdefault(name, [0.0, 0])
        own[0] += event.get("dur", 0.0) / 1e3
        own[1] += 1
    if not found:
        raise ValueError("the profiler saw no operation")
    ordered = sorted(found.items(), key=lambda item: -item[1][0])
    told = [*ordered[:MOST], ("others", _sum(ordered[MOST:])), ("all", _sum(ordered))]
    total = told[-1][1][0]
    return [{"name": name, "milliseconds": ms, "times": n, "share": ms / total} for name, (ms, n) in told if n]


def _sum(operations: list[tuple[str, list[float]]]) -> list[float]:
    return [sum(own[column] for _, own in operations) for column in (0, 1)]

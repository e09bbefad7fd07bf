"""Timing several networks or libraries, each in a process of its own."""

import multiprocessing
import queue
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import jax

from benchmarks import timing
from benchmarks.timing import Facts, Work
from data_pipeline import parallel


def measure(works: Sequence[Work], repeats: int, memory: bool = False) -> list[dict[str, Any]]:
    """Times the works alternating, each in a process of its own, after one run of each to warm up.

    In one process a library would find what the others leave: PyTorch's forward pass takes up to twice as long on a
    CPU when no backward pass beside it keeps memory in the process.

    Args:
      memory: also the peak memory of each, in a second run that is not timed.

    Returns: rows as of :func:`timing.measure`; of a peer's work that failed, its name and ``failed``, one line.
    """
    on_gpu = jax.default_backend() == "gpu"  # asked once: a peer's process need not open the card for JAX
    rows: list[dict[str, Any]] = [{"name": work.name} for work in works]
    samples: list[list[Facts]] = [[] for _ in works]
    with ExitStack() as stack:
        processes = [stack.enter_context(_process()) for _ in works]

        def within(i: int, function: Callable[..., Facts], *arguments: Any) -> Facts:
            try:
                found = _result(processes[i], _within, function, timing.is_ours(works[i].name), on_gpu, *arguments)
            except BrokenProcessPool:
                found = "its process died, probably out of memory"
                if timing.is_ours(works[i].name):
                    raise ChildProcessError(f"{works[i].name}: {found}") from None
            if isinstance(found, str):
                rows[i]["failed"] = found
            return {} if isinstance(found, str) else found

        for i, work in enumerate(works):
            began = time.perf_counter()
            rows[i] |= within(i, _prepare, work, memory)
            timing.tell(f"{work.name}: {rows[i].get('failed', 'ready')}", began)
        for _ in range(repeats):
            for i, own in enumerate(samples):
                if "failed" not in rows[i] and (sample := within(i, _turn)):
                    own.append(sample)
    pairs = zip(rows, samples, strict=True)
    return [row if "failed" in row else timing.medians(row["name"], own) | row for row, own in pairs]


def beside(
    works: Sequence[Work], peers: Sequence[Work], repeats: int, memory: bool = False
) -> list[dict[str, Any]]:
    """Our works and other libraries': as :func:`measure` does, but without peers all in this process."""
    return measure([*works, *peers], repeats, memory) if peers else timing.measure(works, repeats)


_prepared: list[Callable[[], Any]] = []  # what a process of its own runs


def _prepare(work: Work, memory: bool, on_gpu: bool) -> Facts:
    run, facts = work.make(*work.arguments)
    run()
    _prepared.append(run)
    return facts | ({"peak_memory_gb": _peak_memory(run, timing.is_ours(work.name), on_gpu) / 1e9} if memory else {})


def _turn(on_gpu: bool) -> Facts:
    (run,) = _prepared
    if on_gpu:
        run()  # while it waited for the others' turns, the card's clock fell
    return timing.timed(run)


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


def run(function: Callable, *arguments: Any) -> Any:
    """``function(*arguments)`` in a fresh process."""
    with _process() as pool:
        return _result(pool, function, *arguments)


@contextmanager
def _process() -> Iterator[ProcessPoolExecutor]:
    """A process that does not outlive the block: what it is at is not waited for if the block is interrupted."""
    context, others = multiprocessing.get_context("spawn"), set(multiprocessing.active_children())
    with ProcessPoolExecutor(1, mp_context=context, initializer=parallel.end_with_parent) as pool:
        try:
            yield pool
        except BaseException:
            for process in set(multiprocessing.active_children()) - others:
                process.kill()
            raise


def _result(pool: ProcessPoolExecutor, function: Callable, *arguments: Any) -> Any:
    """What the process's function gives; Ctrl-C ends the wait, and leaves the process alone."""
    ended: queue.SimpleQueue[Future] = queue.SimpleQueue()
    with parallel.ctrl_c_waits():
        pool.submit(function, *arguments).add_done_callback(ended.put)
    return ended.get().result()  # by a queue: see parallel.py


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

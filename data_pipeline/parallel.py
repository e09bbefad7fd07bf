"""Work over many cases in several processes."""

import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

from data_pipeline.progress import track

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_MOST_WORKERS = 16
ITEM_SECONDS = 1800.0  # longest time in which not one item is done


def run(
    function: Callable[[_Item], _Result],
    items: Sequence[_Item],
    *,
    workers: int | None,
    title: str,
    progress: bool = True,
) -> list[_Result]:
    """``[function(item) for item in items]`` in several processes.

    Args:
      function: a module-level function or a ``functools.partial`` of one: it travels to fresh processes.
      workers: number of processes; None takes one per usable core, at most 16, since each may need half a
        gigabyte. With 1, or for one item, no process is started. More need a
        ``if __name__ == "__main__":`` guard in the main script.

    Raises:
      ValueError: workers below 1.
      ChildProcessError: a worker died, most often for want of memory.
      TimeoutError: no worker was done with an item for :data:`ITEM_SECONDS`. They are killed; one that a dead disk
        keeps alive keeps Python from ending too, but for ``os._exit``.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers is {workers}: at least 1 is needed")
    count = min(workers or min(usable_cores(), _MOST_WORKERS), len(items))

    def watched(results: Iterable) -> Iterable:
        return track(results, len(items), title) if progress else results

    if count > 1:
        return _run_pool(function, items, count, watched, title)
    return list(watched(map(function, items)))


def usable_cores() -> int:
    """Cores this process may use, which on a shared machine are fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run_pool(function: Callable, items: Sequence, workers: int, watched: Callable, title: str) -> list:
    # Spawned, not forked: the caller may run threads (JAX does), which a fork would break.
    context, others = multiprocessing.get_context("spawn"), set(multiprocessing.active_children())
    with ProcessPoolExecutor(workers, mp_context=context, initializer=end_with_parent) as pool:
        ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        with ctrl_c_waits():
            futures = [pool.submit(function, item) for item in items]
            for future in futures:
                future.add_done_callback(partial(_tell, ended))
        try:
            for error in watched(_as_done(ended, len(futures), title)):
                if error is not None:
                    raise error
        except BrokenProcessPool as error:
            text = "a worker process died (out of memory?); try fewer --workers; cases already written are kept"
            raise ChildProcessError(text) from error
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(error, TimeoutError):
                for worker in set(multiprocessing.active_children()) - others:
                    worker.kill()
            raise
        return [future.result() for future in futures]


def _tell(ended: queue.SimpleQueue, future: Future) -> None:
    if not future.cancelled():
        ended.put(future.exception())


def _as_done(ended: queue.SimpleQueue, count: int, title: str) -> Iterator[BaseException | None]:
    """What each item ended with, as they end; the wait for the next one has an end.

    By a queue: who waits for futures takes their locks, and Ctrl-C in the main thread could come between taking and
    giving back. The pool would wait for such a lock for ever.
    """
    for _ in range(count):
        try:
            error = ended.get(timeout=ITEM_SECONDS)
        except queue.Empty:
            raise TimeoutError(f"{title}: no case was done within {ITEM_SECONDS:g} s; check the disk that holds the "
                               "files and run the same command again; cases already written are "
                               "kept") from None  # fmt: skip
        yield error


@contextmanager
def ctrl_c_waits() -> Iterator[None]:
    """Ctrl-C acts when the block is done, and in this process alone: those that it starts inherit the mask.

    The mask alone would not do: another thread may get the signal, and Python then interrupts the main one, between
    starting a process and telling it what to do.
    """
    pressed, handler = [], signal.getsignal(signal.SIGINT)
    if own := threading.current_thread() is threading.main_thread():  # no other may have handlers
        signal.signal(signal.SIGINT, lambda *which: pressed.append(which))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if own:
            signal.signal(signal.SIGINT, handler)
        if pressed and callable(handler):
            handler(*pressed[0])


def end_with_parent() -> None:
    """Ends this worker when the parent is gone without stopping it."""

    def wait() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()

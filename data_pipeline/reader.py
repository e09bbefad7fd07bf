"""Reads a Grain dataset: threads or worker processes, bounded buffers, and no wait without an end."""

from __future__ import annotations

import functools
import multiprocessing
import os
import queue
import shutil
import signal
import sys
import tempfile
import threading
from pathlib import Path

import grain
import numpy as np
from absl import flags

from data_pipeline import parallel

CLOSE_SECONDS = 10.0  # a worker that is well ends in a fraction of a second


class Reader:
    """Reads a dataset of dicts of arrays from its start, one element per ``read``.

    Reading and closing are done in threads, so that the waiting for them can end: Grain itself waits for ever on
    a worker that is alive but stuck.
    """

    def __init__(self, dataset, workers: int, threads: int, buffer: int):
        self._pids = tempfile.mkdtemp(prefix="stream-reader-") if workers else ""
        self._iterator = iterate(dataset, workers, threads, buffer, self._pids)
        self._shared = workers > 0
        self._orders: queue.SimpleQueue = queue.SimpleQueue()
        self._results: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=self._serve, name="stream-reader", daemon=True).start()

    def _serve(self) -> None:
        while self._orders.get():
            try:
                element = next(self._iterator)
                if self._shared:  # out of shared memory, which is small (64 MB in many containers)
                    element = {name: np.array(value) for name, value in element.items()}
                self._results.put((element, None))
            except BaseException as error:  # handed to the caller, who raises it
                self._results.put((None, error))

    def read(self, timeout: float):
        """Returns the next element, or raises what went wrong; after that only ``close`` is allowed."""
        self._orders.put(True)
        try:
            batch, error = self._results.get(timeout=timeout)
        except queue.Empty:
            raise TimeoutError(
                f"no training batch within {timeout:g} s: a reader hangs; check the disk that holds the store"
            ) from None
        if isinstance(error, RuntimeError) and "terminated unexpectedly" in str(error):
            cause, remedy = str(error).split(". ")[0], "if memory or /dev/shm ran out, use fewer data workers"
            raise ChildProcessError(f"{cause}; {remedy} (0 reads in threads)") from error
        if error is not None:
            raise error
        return batch

    def close(self) -> None:
        """Ends threads and workers; those that do not end by themselves are killed."""
        self._orders.put(False)
        closing = threading.Thread(target=self._iterator.close, name="stream-reader-close", daemon=True)
        closing.start()
        closing.join(CLOSE_SECONDS)
        if closing.is_alive():
            # Not other children of this process, whose own readers may be well.
            for process in multiprocessing.active_children():
                if self._pids and Path(self._pids, str(process.pid)).exists():
                    process.kill()
            closing.join(CLOSE_SECONDS)
        if self._pids:
            shutil.rmtree(self._pids, ignore_errors=True)


def iterate(dataset, workers: int, threads: int, buffer: int, pids: str):
    """Returns Grain's iterator over the dataset, which reads ahead at most about ``buffer`` elements.

    In ``threads`` of this process (0: when asked) or in ``workers`` processes, each with one thread. Each worker
    leaves an empty file in the folder ``pids``, named by its process id.
    """
    if workers == 0:
        # Grain's default buffer is 500 elements: 500 batches would not fit in memory.
        ahead = max(buffer, threads) if threads else 0
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
        return iter(dataset.to_iter_dataset(options))
    if not flags.FLAGS.is_parsed():  # Grain reads absl flags, which a notebook or a test never parses
        flags.FLAGS.mark_as_parsed()
    one_by_one = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    options = grain.MultiprocessingOptions(
        num_workers=workers, per_worker_buffer_size=max(1, buffer // workers)
    )
    set_up = functools.partial(_set_up_worker, pids)
    return iter(dataset.to_iter_dataset(one_by_one).mp_prefetch(options, worker_init_fn=set_up))


def _set_up_worker(pids: str, index: int, count: int) -> None:
    """Keeps a worker process off the accelerator, deaf to signals, and from outliving its parent; says which it is."""
    Path(pids, str(os.getpid())).touch()
    os.environ["JAX_PLATFORMS"] = "cpu"
    if "jax" in sys.modules:  # Grain imports it where it is installed
        sys.modules["jax"].config.update("jax_platforms", "cpu")
    # Terminals and schedulers signal the whole group. It is the parent's business: it saves, then closes the workers.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    parallel.end_with_parent()

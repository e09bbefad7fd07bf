"""Waiting that ends: reading and writing have no limit of their own on a disk that never answers."""

import queue
import threading
from collections.abc import Callable
from typing import TypeVar

_Result = TypeVar("_Result")


def within(seconds: float, call: Callable[[], _Result], told: str) -> _Result:
    """What ``call()`` returns; what it raises is raised.

    It runs in a thread of its own, which nobody waits for once the time is up, not even the end of the program.

    Raises: TimeoutError(``told``) if it takes longer.
    """
    results: queue.SimpleQueue = queue.SimpleQueue()

    def serve() -> None:
        try:
            results.put((call(), None))
        except BaseException as error:  # the caller raises it
            results.put((None, error))

    threading.Thread(target=serve, name="limited-wait", daemon=True).start()
    try:
        result, error = results.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(told) from None
    if error is not None:
        raise error
    return result

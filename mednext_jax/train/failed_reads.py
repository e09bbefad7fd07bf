"""Keeps what a failed restore leaves behind from being printed as tracebacks.

Orbax reads all arrays at once, in an event loop that ends with the first error. TensorStore's reads that are still
out find it closed, and asyncio finds exceptions that nobody fetched; both tell so at any later time, from threads
of their own, with a traceback for every array. The error itself was raised and is told in one line.
"""

import functools
import logging
import sys
from typing import Any


def silence() -> None:
    """Drops these messages from now on; everything else is told as before."""
    logging.getLogger("asyncio").addFilter(_is_news)  # adding it twice changes nothing
    if getattr(sys.unraisablehook, "func", None) is not _tell:
        sys.unraisablehook = functools.partial(_tell, sys.unraisablehook)


def _is_news(record: logging.LogRecord) -> bool:
    return "exception was never retrieved" not in record.getMessage()


def _tell(before: Any, unraisable: Any) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
        before(unraisable)

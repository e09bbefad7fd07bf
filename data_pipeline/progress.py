"""Progress of long work: a bar with rate and time left on a terminal, a plain line now and then elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
_SECONDS_BETWEEN_LINES = 15.0


def track(items: Iterable[T], total: int, label: str, unit: str = "case") -> Iterator[T]:
    """Passes ``items`` on and shows on stderr how far they are.

    Args:
      total: number of items.
      label: what is being done, such as ``simulate source``.
    """
    if sys.stderr.isatty():
        yield from tqdm(items, desc=label, total=total, unit=unit, dynamic_ncols=True)
        return
    start = shown = time.monotonic()
    for number, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if number == total or now - shown >= _SECONDS_BETWEEN_LINES:
            shown = now
            left = (now - start) / number * (total - number)
            print(f"{label}: {number}/{total} {unit}s, {left:.0f} s left", file=sys.stderr, flush=True)

"""From the data stream to the devices: one batch is always there already when a step asks for it."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from mednext_jax.train import devices


class Fed(NamedTuple):
    """A batch on the devices.

    Attributes:
      arrays: ``image`` and ``label``, global arrays split over the mesh.
      case_ids: the cases of the whole batch, all processes' rows in order, for messages.
      position: the stream's state after this batch: where to go on once it was used.
    """

    arrays: dict[str, jax.Array]
    case_ids: list[str]
    position: dict[str, Any]


class Feed:
    """Reads one batch ahead: call :meth:`take`, dispatch the step, then :meth:`prefetch` while it runs."""

    def __init__(self, stream: Iterator[dict[str, np.ndarray]], mesh: jax.sharding.Mesh):
        self._stream = stream
        self._mesh = mesh
        self._next: Fed | None = None

    def prefetch(self) -> None:
        """Reads the next batch and starts its way to the devices, unless one waits already."""
        if self._next is None:
            batch = next(self._stream)
            arrays = devices.shard_batch(self._mesh, {name: batch[name] for name in ("image", "label")})
            self._next = Fed(arrays, [str(case) for case in batch["batch_case_id"]], self._stream.get_state())

    def take(self) -> Fed:
        """The next batch."""
        self.prefetch()
        fed, self._next = self._next, None
        return fed

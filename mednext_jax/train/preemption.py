"""Stopping on request: SIGTERM, SIGUSR1 and Ctrl-C become a wish that the loop grants at its next step."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import jax
from jax.experimental import multihost_utils

REQUEUE_EXIT_CODE = 75  # EX_TEMPFAIL: "try again later"; schedulers requeue on it
CTRL_C_EXIT_CODE = 130  # 128 + SIGINT, as a shell reports it
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Interrupted(Exception):
    """The run was asked to stop and saved its state first.

    Args:
      step: where it stopped; None before training, where there is nothing to save.

    Attributes:
      exit_code: what the process should end with.
    """

    def __init__(self, signal_number: int, step: int | None, workdir: object):
        name = signal.Signals(signal_number).name
        where = "stopped before training" if step is None else f"saved at step {step}"
        super().__init__(f"{name}: {where}; the same command with --workdir={workdir} goes on from there")
        self.exit_code = CTRL_C_EXIT_CODE if signal_number == signal.SIGINT else REQUEUE_EXIT_CODE


@contextmanager
def stopped_at_once(workdir: object) -> Iterator[None]:
    """Ends the block at the first of :data:`SIGNALS`: for work before training that keeps what it has finished.

    Raises: Interrupted, whatever else the signal brought about in the block.
    """
    caught: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        raise KeyboardInterrupt  # which no library takes for an error of its own

    # With several processes SIGTERM is JAX's, and nothing here takes long.
    numbers = SIGNALS if jax.process_count() == 1 else ()
    previous = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    except BaseException:
        if not caught:
            raise
        raise Interrupted(caught[0], None, workdir) from None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Stopped(Exception):
    """Something that takes long, or for ever, was given up because the run was asked to stop."""


class StopRequests:
    """Context manager that catches :data:`SIGNALS`. A second one of the same kind acts as it always did."""

    def __init__(self) -> None:
        self.signal_number = 0
        self._waits = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopRequests":
        # With several processes SIGTERM is JAX's, which tells all of them; other signals are turned into it.
        alone = jax.process_count() == 1
        for number in SIGNALS if alone else SIGNALS[1:]:
            self._previous[number] = signal.signal(number, self._note if alone else self._pass_on)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal_number = number
        signal.signal(number, self._previous[number])
        if self._waits:
            raise Stopped

    @contextmanager
    def ending_the_wait(self) -> Iterator[None]:
        """A signal ends the block at once: a batch that does not come must not outlast the time that is left to save.

        With several processes it does not, since all must stop at the same step.

        Raises: Stopped.
        """
        self._waits = True
        try:
            if self.signal_number:  # it came just before
                raise Stopped
            yield
        finally:
            self._waits = False

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        signal.signal(number, self._previous[number])
        os.kill(os.getpid(), signal.SIGTERM)

    def requested(self, step: int) -> int:
        """The signal that asks this run to stop, or 0; to be called at every step.

        With several processes all of them get the same answer for the same step: JAX's coordination service
        passes a SIGTERM on to every process and agrees on a step.
        """
        if jax.process_count() > 1:
            return signal.SIGTERM if multihost_utils.reached_preemption_sync_point(step) else 0
        return self.signal_number

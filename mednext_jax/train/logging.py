"""What a run writes down: metrics.jsonl, TensorBoard, and a progress bar or plain lines.

``metrics.jsonl`` holds no clock: two runs that computed the same have equal files. Speed goes to TensorBoard
and to the terminal.
"""

import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

# tensorboardX imports PyTorch wherever it is installed, which takes seconds, for tensors that we never hand it.
_HIDDEN = {} if "torch" in sys.modules else {"torch": None}
sys.modules.update(_HIDDEN)
try:
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.summary import scalar
finally:
    for _name in _HIDDEN:
        del sys.modules[_name]

METRICS_FILE = "metrics.jsonl"
VALIDATION = "val/"  # prefix of validation scores


def truncate_metrics(file: Path, step: int, written: tuple[int, int]) -> None:
    """Drops what a run resumed at ``step`` will write again, and a half-written last line; see :class:`RunLog`."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            last = written[0] if VALIDATION + "mean" in record else written[1] if "loss" in record else step
            if record["step"] <= last:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(file)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


class Board:
    """TensorBoard's events, written at once.

    tensorboardX's own ``SummaryWriter`` hands them to a thread, and waits for that thread for ever when a full disk
    has ended it.
    """

    def __init__(self, folder: Path, first_step: int):
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"), f".{first_step}")  # two starts in one second are two files
        # TensorBoard drops what an interrupted run wrote from here on.
        self._write(Event(step=first_step + 1, session_log=SessionLog(status=SessionLog.START)))

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._writer.write_event(event)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the values of a step."""
        for name, value in values.items():
            self._write(Event(step=step, summary=scalar(name, value)))
        self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()


class RunLog:
    """The log of one run; on processes other than the first it does nothing.

    Args:
      workdir: gets ``metrics.jsonl`` and ``tensorboard/``.
      first_step: steps done before; later records of an interrupted run are dropped.
      written: last of them whose validation, and whose line of means, was written before the checkpoint was.
      total_steps: for the time left.

    Raises: OSError naming the folder, here and whenever something is written.
    """

    def __init__(self, workdir: Path, first_step: int, written: tuple[int, int], total_steps: int, active: bool):
        self.active, self.total_steps, self._workdir = active, total_steps, workdir
        self.seconds_per_step: float | None = None  # mean since the last pause
        self._since, self._timed_steps = None, 0
        if not active:
            return
        with self._writing():
            truncate_metrics(workdir / METRICS_FILE, first_step, written)
            self._file = open(workdir / METRICS_FILE, "a", encoding="utf-8")  # noqa: SIM115 (closed in close)
            self._board = Board(workdir / "tensorboard", first_step)
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(
                f"cannot write the log of {self._workdir} ({error.strerror or error}): make room on its disk, check "
                "its permissions, run the same command again"
            ) from error

    def say(self, line: str) -> None:
        """One line for the person at the terminal."""
        if self.active and self._bar is not None:
            self._bar.write(line)
        elif self.active:
            print(line, flush=True)

    def record(self, step: int, metrics: Mapping[str, float | int | str | list]) -> None:
        """Appends one line to metrics.jsonl (NaN as null) and its numbers to TensorBoard."""
        if not self.active:
            return
        clean = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in metrics.items()
        }
        with self._writing():
            self._file.write(json.dumps({"step": step, **clean}) + "\n")
            self._file.flush()
            self._board.add(step, {name: value for name, value in metrics.items() if isinstance(value, int | float)})

    def tick(self) -> None:
        """One step was finished."""
        now = time.monotonic()
        if self._since is not None:
            self._timed_steps += 1
            self.seconds_per_step = (now - self._since) / self._timed_steps
        else:
            self._since = now
        if self.active and self._bar is not None:
            self._bar.update()

    def pause(self) -> None:
        """Something else than steps follows: forget the clock."""
        self._since, self._timed_steps = None, 0

    def progress(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows loss, learning rate, step time and time left."""
        seconds = self.seconds_per_step
        timing = ""
        if seconds is not None:
            timing = f"  {seconds:.3g} s/step  left {_clock(seconds * (self.total_steps - step))}"
            if self.active:
                with self._writing():
                    self._board.add(step, {"seconds_per_step": seconds})
        values = f"loss {metrics['loss']:.4f}  lr {metrics['learning_rate']:.3g}"
        self.say(f"step {step}/{self.total_steps}  {values}{timing}")

    def close(self) -> None:
        """Flushes and closes everything."""
        if self.active:
            if self._bar is not None:
                self._bar.close()
            with self._writing():
                self._board.close()
                self._file.close()

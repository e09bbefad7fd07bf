"""What a run writes down: metrics.jsonl, TensorBoard, and a progress bar or plain lines.

``metrics.jsonl`` holds no clock: two runs that computed the same have equal files. Speed goes to TensorBoard
and to the terminal.
"""

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

# tensorboardX imports PyTorch wherever it is installed, which takes seconds, for tensors that we never hand it.
_HIDDEN = {} if "torch" in sys.modules else {"torch": None}
sys.modules.update(_HIDDEN)
try:
    from tensorboardX import SummaryWriter
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
    for line in file.read_text(encoding="utf-8").splitlines():
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


class RunLog:
    """The log of one run; on processes other than the first it does nothing.

    Args:
      workdir: gets ``metrics.jsonl`` and ``tensorboard/``.
      first_step: steps done before; later records of an interrupted run are dropped.
      written: last of them whose validation, and whose line of means, was written before the checkpoint was.
      total_steps: for the time left.
    """

    def __init__(self, workdir: Path, first_step: int, written: tuple[int, int], total_steps: int, active: bool):
        self.active, self.total_steps = active, total_steps
        self.seconds_per_step: float | None = None  # mean since the last pause
        self._since, self._timed_steps = None, 0
        if not active:
            return
        truncate_metrics(workdir / METRICS_FILE, first_step, written)
        self._file = open(workdir / METRICS_FILE, "a", encoding="utf-8")  # noqa: SIM115 (closed in close)
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step + 1)
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True)

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
        self._file.write(json.dumps({"step": step, **clean}) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            if isinstance(value, int | float):
                self._board.add_scalar(name, value, step)

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
                self._board.add_scalar("seconds_per_step", seconds, step)
        values = f"loss {metrics['loss']:.4f}  lr {metrics['learning_rate']:.3g}"
        self.say(f"step {step}/{self.total_steps}  {values}{timing}")

    def close(self) -> None:
        """Flushes and closes everything."""
        if self.active:
            if self._bar is not None:
                self._bar.close()
            self._board.close()
            self._file.close()

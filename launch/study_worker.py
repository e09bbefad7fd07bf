"""A process that does the commands of one step of a study after another.

Starting Python, importing JAX and tracing a network cost a small run as much as its training does; a worker pays for
them once. Every command is run as if typed: its own flags, its own log, its own exit code.
"""

import contextlib
import json
import os
import runpy
import select
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import command  # noqa: F401  shared by all commands: its flags stay defined
from absl import flags
from study_steps import Step, log_of, sign

MESSAGE_BYTES = 65536
DIED = 1  # exit code of a command whose worker ended without one


class Worker:
    """Such a process, seen from the one that gives it work.

    Attributes:
      started: commands it was given.
    """

    def __init__(self):
        self._channel, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, __file__, str(theirs.fileno())]
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(),))
        self.started = 0

    def begin(self, step: Step, folder: Path, claim: int) -> None:
        """Starts the command of a step; what it prints is appended to the step's log.

        A command that ends well leaves the step's note: it counts even if the process that gave the work is killed.

        Args:
          claim: file descriptor of the step's claim. The worker keeps it open while the command runs, so that the
            step stays claimed as well.
        """
        log_of(folder, step.name).parent.mkdir(parents=True, exist_ok=True)
        order = json.dumps({"name": step.name, "argv": step.argv, "folder": str(folder.absolute())}) + "\n"
        socket.send_fds(self._channel, [order.encode()], [claim])
        self.started += 1

    def poll(self) -> int | None:
        """Exit code of the command; None while it runs."""
        if not select.select([self._channel], [], [], 0)[0]:
            return None
        with contextlib.suppress(ConnectionError):
            if answer := self._channel.recv(MESSAGE_BYTES):
                return json.loads(answer)
        return self._process.wait() or DIED

    def ask_to_stop(self) -> None:
        """Training saves and ends; anything else ends at once."""
        self._process.terminate()
        self._channel.close()

    def close(self, seconds: float | None = None) -> None:
        """Waits until the process has ended, and kills it after that many seconds."""
        self._channel.close()
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def run(argv: Sequence[str]) -> int:
    """Runs a script in this process as if it were started anew; returns its exit code."""
    sys.argv = list(argv)
    try:
        runpy.run_path(argv[0], run_name="__main__")
        return 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # as Python itself would: the worker goes on, the study ends with this message
        traceback.print_exc()
        return 1
    finally:
        _forget_flags(argv[0])


def _forget_flags(script: str) -> None:
    """Removes the flags that a script defined, and those of its config's fields: the next script defines its own."""
    own = {flag.name for flag in flags.FLAGS.flags_by_module_dict().get(script, [])}
    for name in own | {name for name in flags.FLAGS if name.startswith("config.")}:
        delattr(flags.FLAGS, name)


def serve(channel: socket.socket) -> None:
    """Does what it is told until nobody is there to tell it."""
    while True:
        order, descriptors, _, _ = socket.recv_fds(channel, MESSAGE_BYTES, 1)
        while order and not order.endswith(b"\n"):
            order += channel.recv(MESSAGE_BYTES)
        if not order:
            return
        wanted = json.loads(order)
        step, folder = Step(wanted["name"], tuple(wanted["argv"])), Path(wanted["folder"])
        with open(log_of(folder, step.name), "ab") as log:
            for stream in (1, 2):
                os.dup2(log.fileno(), stream)
        for claim in descriptors:
            sign(claim)
        began, before = time.monotonic(), sum(os.times()[:4])
        code = run(step.argv[1:])
        if code == 0:
            step.mark_done(folder, time.monotonic() - began, sum(os.times()[:4]) - before)
        sys.stdout.flush()
        sys.stderr.flush()
        for claim in descriptors:
            os.close(claim)
        with contextlib.suppress(BrokenPipeError):
            channel.sendall(json.dumps(code).encode())


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))

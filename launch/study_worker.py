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
import traceback
from collections.abc import Sequence
from pathlib import Path

import command  # noqa: F401  shared by all commands: its flags stay defined
from absl import flags

MESSAGE_BYTES = 65536
DIED = 1  # exit code of a command whose worker ended without one


class Worker:
    """Such a process, seen from the one that gives it work.

    Attributes:
      started: commands it was given.
      cpu_seconds: processor time of the last command that ended, its own processes included.
    """

    def __init__(self):
        self._channel, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, __file__, str(theirs.fileno())]
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(),))
        self.started, self.cpu_seconds = 0, 0.0

    def begin(self, argv: Sequence[str], log: Path, claim: int) -> None:
        """Starts a command.

        Args:
          argv: script and flags.
          log: what it prints is appended here.
          claim: file descriptor of the step's claim. The worker keeps it open while the command runs, so that the
            step stays claimed even if the process that gave the work is killed.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        order = json.dumps({"argv": list(argv), "log": str(log)}) + "\n"
        socket.send_fds(self._channel, [order.encode()], [claim])
        self.started += 1

    def poll(self) -> int | None:
        """Exit code of the command; None while it runs."""
        if not select.select([self._channel], [], [], 0)[0]:
            return None
        with contextlib.suppress(ConnectionError):
            if answer := self._channel.recv(MESSAGE_BYTES):
                code, self.cpu_seconds = json.loads(answer)
                return code
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
        with open(wanted["log"], "ab") as log:
            for stream in (1, 2):
                os.dup2(log.fileno(), stream)
        before = sum(os.times()[:4])
        code = run(wanted["argv"])
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor in descriptors:
            os.close(descriptor)
        with contextlib.suppress(BrokenPipeError):
            channel.sendall(json.dumps([code, sum(os.times()[:4]) - before]).encode())


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))

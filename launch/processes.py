"""A run of several processes: joining them, and ending all of them in one clear line when one is lost.

What a lost process does to the others depends on where they are: a collective over the network fails in
Python, one on a GPU waits until JAX's heartbeat notices and aborts the process from C++, with a stack trace
and no way to say anything. So a small witness, a child process that only waits for its parent's end, has the
last word.
"""

import faulthandler
import logging
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import command
import jax

from mednext_jax.train import devices
from mednext_jax.train.preemption import Interrupted

# Reads until the parent closes the pipe, by "q" or by its death; own session: Ctrl-C is not for it.
WITNESS = "import sys; sys.stdin.read() == 'q' or print(sys.argv[1], file=sys.stderr, flush=True)"
REMEDY = "start the same command again, on all machines: it goes on from the last checkpoint"


def _is_news(record: logging.LogRecord) -> bool:
    """False for the traceback that a thread of Orbax logs when another process is lost: it is told in one line."""
    return not (record.exc_info and devices.lost_another(record.exc_info[1]))


@contextmanager
def joined(coordinator: str, process_count: int, process_id: int) -> Iterator[None]:
    """Joins the processes of this run, if there are several, until the block ends; see ``devices.join_processes``.

    An error in one of several ends this process at once, with its line and code 1: waiting for the others,
    as JAX would at exit, could take minutes, for they wait for this one.
    """
    if devices.process_place(coordinator, process_count, process_id) is None:
        yield
        return
    who = f"process {process_id} of {process_count}" if coordinator else "this process"
    fate = f"error: {who} was ended from outside, or because another process was lost or never came: {REMEDY}"
    witness = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", WITNESS, fate], stdin=subprocess.PIPE, start_new_session=True
    )
    logging.getLogger("absl").addFilter(_is_news)
    faulthandler.disable()  # absl turned it on; JAX's client aborts when another is lost, and our stack says nothing
    try:
        devices.join_processes(coordinator, process_count, process_id)
        who = f"process {jax.process_index()} of {jax.process_count()}"
        yield
        jax.distributed.shutdown()  # waits for the others, who may still write their results
    except Interrupted:
        jax.distributed.shutdown()
        raise
    except Exception as error:
        if command.DEBUG.value or not (devices.lost_another(error) or isinstance(error, command.USER_ERRORS)):
            traceback.print_exc()
        line = command.one_line(error)[:300]
        if devices.lost_another(error):
            line = f"lost another process ({line}): {REMEDY}"
        print(f"error: {who}: {line}", file=sys.stderr, flush=True)
        with suppress(OSError):  # the witness is not waited for: JAX's client may be about to abort in its own words
            witness.stdin.write(b"q")
            witness.stdin.flush()
        os._exit(1)
    finally:
        witness.communicate(b"q")

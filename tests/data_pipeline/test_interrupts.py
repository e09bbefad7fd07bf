"""Ctrl-C while processes are being started acts afterwards, whichever thread the system hands the signal to."""

import os
import signal
import threading
import time

import pytest

from data_pipeline import parallel


def test_ctrl_c_while_processes_start_acts_when_they_have_started():
    go, started = threading.Event(), []
    other = threading.Thread(target=lambda: (go.wait(30), os.kill(os.getpid(), signal.SIGINT)), daemon=True)
    other.start()  # before the mask is set, so that the signal can reach this thread

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background ignore it
    try:
        with pytest.raises(KeyboardInterrupt), parallel.ctrl_c_waits():
            go.set()
            until = time.monotonic() + 0.5
            while time.monotonic() < until:
                time.sleep(0.01)
            started.append("all")
        assert started == ["all"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, handler)

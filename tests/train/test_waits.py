import threading

import numpy as np
import pytest

from mednext_jax.train import checkpoints, validation, waits


@pytest.fixture
def hang():
    """A call that does not return before the test is over."""
    over = threading.Event()
    yield over.wait
    over.set()


def test_what_a_call_returns_or_raises_in_time_is_passed_on():
    assert waits.within(60, lambda: 7, "late") == 7
    with pytest.raises(ZeroDivisionError):
        waits.within(60, lambda: 1 // 0, "late")


def test_validation_names_the_case_that_is_never_read(hang, monkeypatch):
    monkeypatch.setattr(validation, "READ_SECONDS", 0.1)

    def load(case):
        if case == "case_b":
            hang()
        return np.zeros((3, 4, 5, 1), np.float16), np.zeros((3, 4, 5), np.uint8)

    class Window:
        def predict(self, params, image):
            return np.zeros((*image.shape[:3], 1), np.float32)

    with pytest.raises(TimeoutError, match=r"case_b was not read within 0\.1 s.*disk"):
        validation.validate(Window(), None, ["case_a", "case_b"], load, "regions", {"WT": (1, 2, 3)})


def test_checkpoint_that_is_never_written_ends_in_a_time_out_that_names_it(hang, monkeypatch, tmp_path):
    kept = checkpoints.Checkpoints(tmp_path / "checkpoints")
    kept.save(5, {"leaf": np.zeros(3, np.float32)}, {name: {} for name in checkpoints.RECORDS})
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "WRITE_SECONDS", 0.1)
        patch.setattr(kept._manager, "wait_until_finished", hang)
        with pytest.raises(TimeoutError, match=r"checkpoints/5 was not written within 0\.1 s.*newest complete step"):
            kept.wait()
        with pytest.raises(TimeoutError, match="checkpoints/5"):  # and the next save does not wait longer
            kept.save(6, {"leaf": np.zeros(3, np.float32)}, {name: {} for name in checkpoints.RECORDS})
    kept.close()
    assert kept.steps() == [5]

import errno
import json
import struct

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from mednext_jax.train.logging import RunLog, truncate_metrics


def events(folder):
    """What TensorBoard would read: records of a length, its CRC, the event and that one's CRC."""
    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        while content:
            (size,) = struct.unpack("<Q", content[:8])
            yield Event.FromString(content[12 : 12 + size])
            content = content[size + 16 :]


def test_numbers_go_to_tensorboard_and_the_file_texts_to_the_file_alone(tmp_path):
    log = RunLog(tmp_path, 4, (4, 4), 10, True)
    log.record(5, {"loss": 0.5, "val/mean": 0.25})
    log.record(6, {"skipped": 1, "cases": ["a", "b"]})
    log.close()
    found = list(events(tmp_path / "tensorboard"))
    assert found[0].file_version == "brain.Event:2"
    assert (found[1].step, found[1].session_log.status) == (5, SessionLog.START)  # what was written beyond is dropped
    scalars = [(e.step, v.tag, v.simple_value) for e in found[2:] for v in e.summary.value]
    assert scalars == [(5, "loss", 0.5), (5, "val/mean", 0.25), (6, "skipped", 1.0)]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[1] == {"step": 6, "skipped": 1, "cases": ["a", "b"]}


def test_log_that_cannot_be_written_is_told_with_its_folder_every_time(tmp_path, monkeypatch):
    log = RunLog(tmp_path, 0, (0, 0), 100, True)

    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(log._board._writer, "flush", full)
    for step in range(1, 31):  # a queue would be full after ten, and wait for ever
        with pytest.raises(OSError, match=rf"cannot write the log of {tmp_path} \(No space left.*make room"):
            log.record(step, {"loss": 0.5})
    monkeypatch.undo()
    log.close()


def test_line_that_is_no_text_is_dropped_like_a_half_written_one(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1, "loss": 0.5}\n{"step": 2, "lo\xff\xfe\n')
    truncate_metrics(file, 5, (5, 5))
    assert file.read_text() == '{"step": 1, "loss": 0.5}\n'

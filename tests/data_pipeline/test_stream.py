"""The stream of batches: every voxel tells where it came from, so a wrong crop cannot hide."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import batches, store
from data_pipeline.stream import make_stream

PATCH = (5, 4, 3)


def number(case_id: str) -> int:
    return int(case_id.split("-")[1])


def label_at(z, y, x, case):
    """The label of every test case: a fixed function of the voxel's own address."""
    return (z + 2 * y + 3 * x + case) % 4


def build_store(path, cases, shape=(9, 8, 7)):
    """Cases whose four channels are each voxel's z + 1, y + 1, x + 1 and case number."""
    records = []
    for case in cases:
        z, y, x = np.indices(tuple(np.add(shape, case % 3)))
        image = np.stack([z + 1, y + 1, x + 1, np.full_like(z, case)], -1).astype(np.float16)
        label = label_at(z, y, x, case).astype(np.uint8)
        records.append(store.write_case(path, f"case-{case}", image, label, {}))
    names = [record["case_id"] for record in records]
    return store.write_dataset(path, records, {"train": names, "val": [], "test": []}, f"hash of {path.name}")


@pytest.fixture(scope="module")
def seven(tmp_path_factory):
    return build_store(tmp_path_factory.mktemp("seven"), range(1, 8))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return build_store(tmp_path_factory.mktemp("two"), range(101, 103))


def open_stream(stores, **changes):
    options = {
        "split": "train",
        "patch_voxels": PATCH,
        "batch_size": 4,
        "foreground_fraction": 0.5,
        "seed": 0,
    }
    return make_stream(stores, **{**options, "threads": 0, **changes})


def take(count, stores, **changes):
    with open_stream(stores, **changes) as stream:
        return [next(stream) for _ in range(count)]


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def test_every_crop_is_a_crop_of_its_case(seven):
    for batch in take(5, seven):
        image, label = batch["image"], batch["label"]
        assert image.shape == (4, *PATCH, 4) and image.dtype == np.float32
        assert label.shape == (4, *PATCH) and label.dtype == np.int32
        for row in range(4):
            z, y, x = (image[row, ..., axis] - 1 for axis in range(3))
            assert (np.diff(z, axis=0) == 1).all() and (np.diff(y, axis=1) == 1).all()
            assert (np.diff(x, axis=2) == 1).all()
            assert (image[row, ..., 3] == number(batch["case_id"][row])).all()
            np.testing.assert_array_equal(label[row], label_at(z, y, x, image[row, ..., 3]))


def test_patch_larger_than_the_volume_is_padded_with_zeros(seven):
    (batch,) = take(1, seven, patch_voxels=(21, 3, 5), batch_size=7)
    for case, image in zip(batch["case_id"], batch["image"], strict=True):
        size = 9 + number(case) % 3
        before = (21 - size) // 2
        planes = image[:, 0, 0, 0]
        np.testing.assert_array_equal(planes[before : before + size], np.arange(1, size + 1))
        assert not image[:before].any() and not image[before + size :].any()


def test_every_epoch_visits_each_case_once_in_a_new_order(seven):
    order = [str(case) for batch in take(7, seven) for case in batch["case_id"]]
    epochs = [order[start : start + 7] for start in range(0, 28, 7)]
    assert all(sorted(epoch) == sorted(seven.case_ids) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_neighbouring_seeds_share_no_orders(seven):
    def epochs(seed):
        order = [str(c) for batch in take(9, seven, seed=seed, batch_size=7) for c in batch["case_id"]]
        return {tuple(order[start : start + 7]) for start in range(0, 63, 7)}

    assert len(epochs(0) & epochs(1)) == 0


def test_index_counts_the_samples_of_the_run(seven):
    np.testing.assert_array_equal(np.concatenate([b["index"] for b in take(3, seven)]), np.arange(12))


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_do_not_change_the_stream(seven, threads):
    assert_same(take(6, seven), take(6, seven, threads=threads, buffer=2))


@pytest.mark.parametrize("count", [2, 4])
def test_shards_together_are_the_global_batch_in_its_order(seven, count):
    shards = [take(3, seven, shard_index=index, shard_count=count) for index in range(count)]
    whole = take(3, seven)
    for k, batch in enumerate(whole):
        for shard in shards:  # every shard knows the ids of the whole batch
            np.testing.assert_array_equal(shard[k].pop("batch_case_id"), batch["case_id"])
        batch.pop("batch_case_id")
    joined = [{name: np.concatenate([s[k][name] for s in shards]) for name in shards[0][0]} for k in range(3)]
    assert_same(joined, whole)


def test_state_continues_exactly_with_other_threads_and_shards(seven):
    expected = take(6, seven)
    with open_stream(seven, threads=2) as stream:
        for _ in range(3):
            next(stream)
        state = json.loads(json.dumps(stream.get_state()))
    assert state["next_index"] == 3
    for shard in range(2):
        with open_stream(seven, shard_index=shard, shard_count=2) as stream:
            stream.set_state(state)
            ours = [next(stream) for _ in range(3)]
        rows = slice(2 * shard, 2 * shard + 2)
        for batch in ours:
            batch.pop("batch_case_id")
        assert_same(ours, [{name: batch[name][rows] for name in batch} for batch in expected[3:]])


def test_state_goes_back_in_a_running_stream(seven):
    with open_stream(seven, threads=2) as stream:
        start = stream.get_state()
        first = [next(stream), next(stream)]
        stream.set_state(start)
        assert_same(first, [next(stream), next(stream)])


def test_dataset_gives_any_batch_on_the_spot(seven):
    with open_stream(seven) as stream:
        assert_same([stream.dataset[4]], [take(5, seven)[4]])


@pytest.mark.parametrize(
    "field, change",
    [
        ("seed", {"seed": 1}),
        ("batch_size", {"batch_size": 2}),
        ("patch_voxels", {"patch_voxels": (5, 4, 4)}),
        ("foreground_fraction", {"foreground_fraction": 0.25}),
        ("cases", {"split": ["case-1", "case-2"]}),
    ],
)
def test_state_of_another_stream_is_refused(seven, field, change):
    state = open_stream(seven).get_state()
    with pytest.raises(ValueError, match=f"another stream: {field} was"):
        open_stream(seven, **change).set_state(state)


def test_state_of_another_store_is_refused(seven, two):
    with pytest.raises(ValueError, match="another stream: stores was"):
        open_stream(two).set_state(open_stream(seven).get_state())


@pytest.mark.parametrize("position", [-1, "3", None, 2.5])
def test_state_with_a_bad_position_is_refused(seven, position):
    with pytest.raises(ValueError, match="next_index"):
        open_stream(seven).set_state({**open_stream(seven).get_state(), "next_index": position})


def test_weights_mix_cohorts_exactly_and_without_end(seven, two):
    samples = [number(case) for b in take(50, [seven, two], weights=(3, 1)) for case in b["case_id"]]
    assert sum(case > 100 for case in samples) == 200 / 4
    counts = [samples.count(case) for case in range(1, 8)]
    assert max(counts) - min(counts) <= 1  # still epochs within each cohort


def test_stores_without_weights_are_one_pool_of_cases(seven, two):
    (batch,) = take(1, [seven, two], batch_size=9)
    assert sorted(batch["case_id"]) == sorted(seven.case_ids + two.case_ids)


def test_split_may_be_a_list_of_cases_per_store(seven, two):
    (batch,) = take(1, [seven, two], split=[["case-3"], "train"], batch_size=3)
    assert sorted(batch["case_id"]) == ["case-101", "case-102", "case-3"]


def test_one_case_fills_any_batch(seven):
    (batch,) = take(1, seven, split=["case-5"], batch_size=6)
    assert set(batch["case_id"]) == {"case-5"}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"batch_size": 3, "shard_count": 2}, "batch_size 3 is no multiple of the 2"),
        ({"shard_index": 2, "shard_count": 2}, "shard_index is 2"),
        ({"foreground_fraction": 33}, "foreground_fraction is 33"),
        ({"patch_voxels": (8, 8)}, "three positive sizes"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"weights": (1, 2)}, "2 weights for 1 stores"),
        ({"weights": (0,)}, "positive numbers"),
        ({"split": "val"}, "holds no cases"),
        ({"split": "tran"}, "no split 'tran'"),
        ({"split": ["case-9"]}, "no case 'case-9'"),
    ],
)
def test_bad_argument_is_named(seven, change, message):
    with pytest.raises(ValueError, match=message):
        open_stream(seven, **change)


def test_case_without_segmentation_is_refused_at_the_start(tmp_path):
    record = store.write_case(tmp_path, "case-1", np.ones((4, 4, 4, 4), np.float16), None, {})
    unlabelled = store.write_dataset(tmp_path, [record], {"train": ["case-1"]}, "")
    with pytest.raises(ValueError, match="case-1 has no segmentation"):
        open_stream(unlabelled)


def test_stores_with_other_channels_are_not_mixed(seven, two):
    changed = store.Store(two.path)
    changed.channels = changed.channels[::-1]
    with pytest.raises(ValueError, match="differ in channels"):
        open_stream([seven, changed])


def test_closed_stream_says_so(seven):
    stream = open_stream(seven)
    stream.close()
    stream.close()
    with pytest.raises(ValueError, match="closed"):
        next(stream)


@pytest.mark.parametrize("threads", [0, 2])
def test_damaged_case_is_an_error_that_names_it(tmp_path, threads):
    damaged = build_store(tmp_path, [1])
    os.truncate(tmp_path / "cases" / "case-1" / "image.npy", 300)
    with open_stream(damaged, threads=threads) as stream, pytest.raises(ValueError, match="case-1.*damaged"):
        next(stream)


def test_reader_that_hangs_ends_in_a_time_out(seven, monkeypatch):
    monkeypatch.setattr(batches.CutBatch, "__call__", lambda self, plans: time.sleep(0.6))
    with (
        open_stream(seven, threads=1, timeout_seconds=0.1) as stream,
        pytest.raises(TimeoutError, match="0.1 s"),
    ):
        next(stream)
    time.sleep(0.7)  # the sleeping thread ends inside this test


def test_open_files_stay_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "OPEN_CASES", 2)
    many = build_store(tmp_path, range(1, 13), shape=(6, 5, 4))
    with open_stream(many, batch_size=12, patch_voxels=(3, 3, 3)) as stream:
        next(stream)
        before = len(os.listdir("/proc/self/fd"))
        assert before < 40
        for _ in range(3):
            next(stream)
        assert len(os.listdir("/proc/self/fd")) == before


def test_worker_processes_give_the_same_stream_and_a_dead_one_an_error(seven):
    expected = take(16, seven)
    with open_stream(seven, workers=2) as stream:
        stream.set_state(open_stream(seven).get_state() | {"next_index": 2})
        assert_same([next(stream) for _ in range(2)], expected[2:4])
        assert stream.get_state()["next_index"] == 4
        for process in multiprocessing.active_children():  # as schedulers do, which signal the whole group
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                os.kill(process.pid, number)
        assert_same([next(stream) for _ in range(12)], expected[4:])
        for process in multiprocessing.active_children():
            os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(ChildProcessError, match="exit code -9"):
            for _ in range(10):
                next(stream)
    assert not multiprocessing.active_children()


def test_error_in_a_worker_process_reaches_the_caller(tmp_path):
    damaged = build_store(tmp_path, [1])
    (tmp_path / "cases" / "case-1" / "label.npy").unlink()
    with open_stream(damaged, workers=1) as stream, pytest.raises(FileNotFoundError, match="case-1.*missing"):
        next(stream)


# The first stream's worker is stopped, so it is alive and never answers; the second stream's is well.
WITH_A_STOPPED_WORKER = """
import multiprocessing, os, signal, sys, time
from data_pipeline import reader
from data_pipeline.store import Store
from data_pipeline.stream import make_stream

if __name__ == "__main__":
    reader.CLOSE_SECONDS = 1.0
    stuck, well = (make_stream(Store(sys.argv[1]), "train", (5, 4, 3), 4, 0.5, 0, workers=1) for _ in range(2))
    next(stuck)
    (child,) = multiprocessing.active_children()
    next(well)
    os.kill(child.pid, signal.SIGSTOP)
    stuck._timeout = 1.0
    started = time.monotonic()
    try:
        for _ in range(20):  # some batches were read ahead
            next(stuck)
    except TimeoutError as error:
        print("time-out", child.exitcode, round(time.monotonic() - started), error)
    next(well)
    print("others go on", flush=True)
    well.close()
"""


def test_worker_process_that_hangs_ends_in_a_time_out_and_so_does_the_program(seven, tmp_path):
    script = tmp_path / "program.py"
    script.write_text(WITH_A_STOPPED_WORKER)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, script, str(seven.path)], env=environment, capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 0, done.stderr
    assert re.match("time-out -9 [2-9] no training batch within 1 s.*\nothers go on\n", done.stdout), done

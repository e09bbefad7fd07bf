import shutil

import jax
import numpy as np
import pytest

from mednext_jax.train.checkpoints import Checkpoints, flatten_state
from mednext_jax.train.step import TrainState


def state(value=0.0, width=300):
    rng = np.random.default_rng(7)
    leaf = rng.normal(size=(3, width)).astype(np.float32) + np.float32(value)
    return TrainState(
        step=np.int32(value),
        trainable={"stem/kernel": leaf},
        optimizer=({"stem/kernel": leaf * 2}, np.int32(4)),
        ema={},
        bad_steps=np.int32(0),
        key=np.asarray([0, 5], np.uint32),
    )


def records(step):
    return {"data": {"next_index": step}, "progress": {"best_score": 0.125}, "config": {"seed": 0}}


@pytest.fixture
def folder(tmp_path):
    """Steps 1 to 5; 2 was the best, so 2, 4 and 5 are kept."""
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for step, best in [(1, 1), (2, 2), (3, 2), (4, 2), (5, 2)]:
        checkpoints.save(step, state(step), records(step), best)
    checkpoints.close()
    return tmp_path / "checkpoints"


def largest_file(step_folder):
    return max((f for f in (step_folder / "state").rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def test_best_and_latest_steps_are_kept(folder):
    checkpoints = Checkpoints(folder)
    assert checkpoints.steps() == [2, 4, 5]
    checkpoints.close()


def test_best_step_is_kept_by_a_run_that_was_started_again(folder):
    for step in (6, 7):
        checkpoints = Checkpoints(folder)
        checkpoints.save(step, state(step), records(step), 2)
        checkpoints.close()
    assert sorted(int(path.name) for path in folder.iterdir()) == [2, 6, 7]


def test_step_whose_description_is_of_another_kind_is_told_with_its_folder(folder):
    (folder / "5/_CHECKPOINT_METADATA").write_text("[]")
    with pytest.raises(ValueError, match=f"a step in {folder} is damaged .*move the folder of the newest one away"):
        Checkpoints(folder)


def test_step_comes_back_bit_for_bit_with_its_records(folder):
    checkpoints = Checkpoints(folder)
    restored = flatten_state(checkpoints.restore(state(), 5))
    for path, leaf in flatten_state(state(5)).items():
        np.testing.assert_array_equal(restored[path], leaf)
        assert restored[path].dtype == leaf.dtype
    assert checkpoints.records(5) == records(5)
    checkpoints.close()


def test_saving_copies_the_state_before_it_returns(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    live = state(1)
    expected = live.trainable["stem/kernel"].copy()
    checkpoints.save(1, live, records(1))
    live.trainable["stem/kernel"][:] = 0
    checkpoints.wait()
    np.testing.assert_array_equal(checkpoints.restore(state(), 1).trainable["stem/kernel"], expected)
    checkpoints.close()


def test_saving_goes_on_after_it_returned(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state(1, width=1_000_000), records(1))  # 24 MB, in less time than they take to write
    assert not (tmp_path / "1").exists()
    checkpoints.close()
    assert (tmp_path / "1").is_dir()


def flip(folder):
    file = largest_file(folder / "5")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


def truncate(folder):
    file = largest_file(folder / "5")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    "damage",
    [
        flip,
        truncate,
        lambda folder: largest_file(folder / "5").unlink(),
        lambda folder: shutil.rmtree(folder / "5" / "state"),
        lambda folder: shutil.rmtree(folder / "5" / "leaves"),
    ],
    ids=["flipped bit", "truncated file", "missing file", "missing state", "missing list of leaves"],
)
def test_damage_is_refused_with_the_folder_and_the_step_before(folder, damage):
    damage(folder)
    checkpoints = Checkpoints(folder)
    with pytest.raises(ValueError) as error:
        checkpoints.restore(state(), 5)
    assert str(folder / "5") in str(error.value)
    assert "--config.resume_step=4" in str(error.value)
    np.testing.assert_array_equal(checkpoints.restore(state(), 4).step, 4)
    checkpoints.close()


def test_flipped_bit_names_the_leaf(folder):
    flip(folder)
    checkpoints = Checkpoints(folder)
    with pytest.raises(ValueError, match="stem/kernel does not have its CRC32|can not be read"):
        checkpoints.restore(state(), 5)
    checkpoints.close()


@pytest.mark.parametrize(("name", "old", "new"), [("data", b"5", b"7"), ("leaves", b'"records"', b'"recordz"')])
def test_changed_record_is_refused(folder, name, old, new):
    file = folder / "5" / name / "metadata"
    file.write_bytes(file.read_bytes().replace(old, new))
    checkpoints = Checkpoints(folder)
    with pytest.raises(ValueError, match="5 is damaged: its (record data does not have its CRC32|list of leaves)"):
        checkpoints.records(5)
    checkpoints.close()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (state(width=301), r"trainable/stem/kernel is float32\[3, 300\], this run needs float32\[3, 301\]"),
        (state()._replace(ema={"stem/kernel": np.zeros(3)}), "lacks ema/stem/kernel"),
        (state()._replace(optimizer=()), "has optimizer/0/stem/kernel"),
        (state()._replace(step=np.int64(1)), "step is int32"),
    ],
    ids=["shape", "missing leaf", "surplus leaf", "dtype"],
)
def test_state_of_another_model_is_refused_naming_the_leaf(folder, template, message):
    checkpoints = Checkpoints(folder)
    with pytest.raises(ValueError, match=message):
        checkpoints.restore(template, 5)
    checkpoints.close()


def test_going_back_discards_the_later_steps(folder):
    checkpoints = Checkpoints(folder)
    checkpoints.discard_after(2)
    assert checkpoints.steps() == [2]
    checkpoints.close()


def test_step_that_is_not_there_is_named_with_those_that_are(folder):
    checkpoints = Checkpoints(folder)
    with pytest.raises(FileNotFoundError, match=r"complete steps are \[2, 4, 5\]"):
        checkpoints.records(3)
    checkpoints.close()


def test_full_disk_is_refused_before_writing(folder, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    checkpoints = Checkpoints(folder)
    with pytest.raises(OSError, match="0.0 MB left: make room, .* goes on from step 5"):
        checkpoints.save(6, state(6), records(6))
    assert checkpoints.steps() == [2, 4, 5]
    checkpoints.close()


def test_lost_process_is_not_taken_for_a_full_disk(folder, monkeypatch):
    def lose(*_, **__):
        raise jax.errors.JaxRuntimeError("UNKNOWN: Gloo AllGather failed: Connection reset by peer")

    checkpoints = Checkpoints(folder)
    monkeypatch.setattr(checkpoints._manager, "save", lose)
    with pytest.raises(jax.errors.JaxRuntimeError, match="Gloo"):
        checkpoints.save(6, state(6), records(6))
    monkeypatch.undo()
    checkpoints.close()


def test_step_that_was_being_written_when_a_run_died_is_removed(tmp_path):
    dead = tmp_path / "checkpoints" / "7.orbax-checkpoint-tmp-3"
    (dead / "state").mkdir(parents=True)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    try:
        assert checkpoints.steps() == [] and not dead.exists()
    finally:
        checkpoints.close()


def test_folder_that_can_not_be_used_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="choose another --workdir"):
        Checkpoints(tmp_path / "file" / "checkpoints")


def test_write_that_failed_for_a_lost_process_does_not_blame_the_disk(tmp_path):
    """Orbax's threads hand what the network raised on as a ValueError."""
    saving = Checkpoints(tmp_path / "checkpoints")
    lost = ValueError("UNKNOWN: Gloo AllGather failed: Read error [127.0.0.1]:47325: Connection reset by peer")
    with pytest.raises(ValueError, match="^UNKNOWN: Gloo"), saving._writing(4):
        raise lost
    with pytest.raises(OSError, match=r"checkpoints/4 could not be written \(no room\): check free space"):
        with saving._writing(4):
            raise ValueError("no room")
    saving.close()

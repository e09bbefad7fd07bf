import dataclasses
import json
import math
import os
import shutil
import signal
import threading

import jax
import numpy as np
import pytest

from mednext_jax import modeldir, peft
from mednext_jax.nn import paths
from mednext_jax.train import loop, optimizer
from mednext_jax.train.checkpoints import describe_record
from mednext_jax.train.preemption import Interrupted, StopRequests

HASHES = dict.fromkeys(("base_hash", "described_hash", "validation_hash"), "x")


class Watched:
    """A stream that does something before it gives batch ``at`` (counted from 0, over resumes too)."""

    def __init__(self, stream, at, action):
        self.stream, self.at, self.action = stream, at, action

    def __next__(self):
        batch = next(self.stream)
        if self.stream.get_state()["next_index"] - 1 == self.at:
            batch = self.action(batch) or batch
        return batch

    def __getattr__(self, name):
        return getattr(self.stream, name)


def flat_model(folder):
    return paths.flatten(modeldir.load_model(folder)[1])


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, request):
    """A run of six steps with two validations; shared, not to be changed."""
    return tmp_path_factory.mktemp("finished") / "run"


@pytest.fixture
def straight(finished, config, open_data):
    if not (finished / "result.json").exists():
        loop.fit(config, open_data(config), finished)
    return finished


def test_run_leaves_everything_that_the_workdir_promises(straight, cohort):
    names = (
        "config.json",
        "environment.json",
        "metrics.jsonl",
        "tensorboard",
        "result.json",
        "checkpoints/6",
    )
    for name in (*names, "base/model.json", "best/model.json", "model/model.safetensors"):
        assert (straight / name).exists(), name
    assert json.loads((straight / "config.json").read_text())["optim"]["total_steps"] == 6
    environment = json.loads((straight / "environment.json").read_text())
    assert environment["versions"]["jax"] == jax.__version__
    assert environment["data"]["stores"] == [cohort.data_hash] and len(environment["data"]["cases"]) == 64
    assert not (straight / "adapter").exists()  # nothing was frozen


def test_last_step_is_logged_validated_and_saved(straight):
    steps = [(r["step"], "val/mean" in r) for r in records(straight)]
    assert steps == [(2, False), (3, True), (4, False), (6, False), (6, True)]
    result = json.loads((straight / "result.json").read_text())
    assert result["step"] == 6
    assert result["best_step"] in (3, 6)


def test_model_directory_is_the_best_validated_network(straight):
    result = json.loads((straight / "result.json").read_text())
    info, _ = modeldir.load_model(straight / "model")
    assert info.provenance["scores"]["mean"] == result["best_score"]
    assert info.params_hash == modeldir.load_info(straight / "best").params_hash
    assert info.channels == ("t1n", "t1c", "t2w", "t2f")


def test_running_again_gives_the_same_files(straight, config, open_data, tmp_path):
    loop.fit(config, open_data(config), tmp_path / "again")
    assert (tmp_path / "again/metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()
    for path, leaf in flat_model(straight / "model").items():
        np.testing.assert_array_equal(flat_model(tmp_path / "again/model")[path], leaf)


def test_finished_run_started_again_changes_nothing(straight, config, open_data, tmp_path):
    shutil.copytree(straight, tmp_path / "copy")
    loop.fit(config, open_data(config), tmp_path / "copy")
    assert (tmp_path / "copy/metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()


def test_run_killed_while_it_finished_does_not_log_its_last_steps_twice(config, open_data, tmp_path):
    config.log_every, config.eval.every = 4, 0  # steps 5 and 6 are logged after the last checkpoint
    loop.fit(config, open_data(config), tmp_path)
    first = (tmp_path / "metrics.jsonl").read_bytes()
    loop.fit(config, open_data(config), tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == first
    assert [r["step"] for r in records(tmp_path)] == [4, 6]


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 75), ("SIGUSR1", 75), ("SIGINT", 130)])
def test_signal_becomes_a_request_with_its_exit_code_and_the_second_one_acts(name, code):
    number, before = getattr(signal, name), signal.getsignal(getattr(signal, name))
    with StopRequests() as stop:
        assert stop.requested(1) == 0
        signal.raise_signal(number)
        assert stop.requested(2) == number
        assert signal.getsignal(number) == before
    assert Interrupted(number, 2, "runs/a").exit_code == code


def test_interrupted_run_goes_on_to_the_same_bits(straight, config, open_data, tmp_path):
    data = open_data(config, wrap=lambda s: Watched(s, 3, lambda batch: signal.raise_signal(signal.SIGTERM)))
    with pytest.raises(Interrupted, match="saved at step"):
        loop.fit(config, data, tmp_path / "run")
    assert not (tmp_path / "run/model").exists()
    loop.fit(config, open_data(config), tmp_path / "run")
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()
    for path, leaf in flat_model(straight / "model").items():
        np.testing.assert_array_equal(flat_model(tmp_path / "run/model")[path], leaf)


def test_run_stopped_during_validation_validates_that_step_when_it_goes_on(
    straight, config, open_data, tmp_path
):
    data = open_data(config)

    def load_and_stop(case):
        signal.raise_signal(signal.SIGTERM)
        return data.load(case)

    stopping = type(data)(data.stream, data.contract, data.validation, load_and_stop, data.name)
    with pytest.raises(Interrupted):
        loop.fit(config, stopping, tmp_path / "run")
    assert [r["step"] for r in records(tmp_path / "run")] == [2]
    loop.fit(config, open_data(config), tmp_path / "run")
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()


def test_signal_ends_the_wait_for_a_batch_that_does_not_come(straight, config, open_data, tmp_path):
    def hang(batch):
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        assert not threading.Event().wait(60), "the signal did not end the wait"
        raise AssertionError("the batch that did not come was waited for")

    with pytest.raises(Interrupted, match="saved at step 3"):
        loop.fit(config, open_data(config, wrap=lambda s: Watched(s, 3, hang)), tmp_path / "run")
    loop.fit(config, open_data(config), tmp_path / "run")
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("first", [False, True], ids=["then split", "split first"])
def test_a_run_goes_on_from_either_of_split_and_replicated_optimizer_state(
    straight, config, open_data, tmp_path, first
):
    config.optim.shard_state = first
    data = open_data(config, wrap=lambda s: Watched(s, 3, lambda batch: signal.raise_signal(signal.SIGTERM)))
    with pytest.raises(Interrupted):
        loop.fit(config, data, tmp_path)
    config.optim.shard_state = not first
    loop.fit(config, open_data(config), tmp_path)
    for here, there in zip(records(tmp_path), records(straight), strict=True):
        assert here.keys() == there.keys()
        for name, value in here.items():
            assert value == pytest.approx(there[name], abs=1e-5), name


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [("data", "batch_size", 8), ("optim", "peak_lr", 0.5), ("loss", "batch_dice", False)],
)
def test_resume_with_another_config_is_refused_naming_the_field(
    straight, config, open_data, section, field, value
):
    config[section][field] = value
    with pytest.raises(ValueError, match=f"config.{section}.{field}=.*choose another --workdir"):
        loop.fit(config, open_data(config), straight)


def test_resume_with_other_cases_is_refused(straight, config, open_data):
    with pytest.raises(ValueError, match="another stream: cases"):
        loop.fit(config, open_data(config, train="val"), straight)


def test_damaged_checkpoint_stops_the_run_until_it_is_told_to_go_back(straight, config, open_data, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(straight, folder)
    file = max((folder / "checkpoints/6/state").rglob("*"), key=lambda f: f.is_file() and f.stat().st_size)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])  # its end need not belong to any leaf
    with pytest.raises(ValueError, match="--config.resume_step=4"):
        loop.fit(config, open_data(config), folder)
    config.resume_step = 4
    at_step_5 = open_data(config, wrap=lambda s: Watched(s, 5, lambda batch: signal.raise_signal(signal.SIGTERM)))
    with pytest.raises(Interrupted, match="saved at step 5"):
        loop.fit(config, at_step_5, folder)
    drawn = []  # batches of the same command again: it goes on from there, not from step 4 once more
    loop.fit(config, open_data(config, wrap=lambda s: Watched(s, 4, lambda batch: drawn.append(4))), folder)
    assert not drawn
    assert (folder / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()
    loop.fit(config, open_data(config), folder)  # finished, whatever the flag says
    assert (folder / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()


def test_best_step_is_kept_after_an_interruption(config, open_data, tmp_path):
    config.optim.update(total_steps=12, peak_lr=0.0)  # nothing is learned: the first validation stays the best
    data = open_data(config, wrap=lambda s: Watched(s, 7, lambda batch: signal.raise_signal(signal.SIGTERM)))
    with pytest.raises(Interrupted):
        loop.fit(config, data, tmp_path)
    assert loop.fit(config, open_data(config), tmp_path)["best_step"] == 3
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [3, 10, 12]


def test_what_killed_runs_left_half_done_is_tidied(straight, config, open_data, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(straight, folder)
    (folder / "best").rename(folder / ".best.old-17")  # killed between the two renames of an exchange
    shutil.copytree(folder / "model", folder / ".best.new-17")
    shutil.copytree(folder / "model", folder / ".model.old-17")
    (folder / ".config.json.17").write_text("{")
    loop.fit(config, open_data(config), folder)
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == [".lock"]
    assert (folder / "best/model.safetensors").read_bytes() == (straight / "best/model.safetensors").read_bytes()


def test_versions_of_the_first_half_are_kept_and_the_change_is_said(straight, config, open_data, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(straight, folder)
    file = folder / "environment.json"
    before = json.loads(file.read_text())
    old = {**before, "versions": {**before["versions"], "jax": "0.0.1"}}
    file.write_text(json.dumps(old))
    loop.fit(config, open_data(config), folder)
    assert json.loads(file.read_text())["earlier"] == [old]
    assert f"jax 0.0.1 before, {jax.__version__} now" in capsys.readouterr().out
    loop.fit(config, open_data(config), folder)
    assert json.loads(file.read_text())["earlier"] == [old]


def test_base_described_otherwise_than_at_the_start_is_refused(straight, config, open_data, tmp_path):
    shutil.copytree(straight, tmp_path / "copy")
    file = tmp_path / "copy/base/model.json"
    content = json.loads(file.read_text())
    for change in ({"regions": {**content["regions"], "WT": [1, 2, 2]}}, {"provenance": {}}):
        file.write_text(json.dumps({**content, **change}))
        with pytest.raises(ValueError, match="copy/base is not the base .*put a copy of .*copy/base back"):
            loop.fit(config, open_data(config), tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy/base")
    with pytest.raises(ValueError, match="the base of the run in .* cannot be read .*put a copy of .*copy/base back"):
        loop.fit(config, open_data(config), tmp_path / "copy")


def test_resume_with_other_validation_cases_is_refused(straight, config, open_data):
    data = open_data(config)
    fewer = dataclasses.replace(data, validation=data.validation[:1])
    with pytest.raises(ValueError, match=r"the validation cases are not those that .* \(1 now\): restore the splits"):
        loop.fit(config, fewer, straight)


@pytest.mark.parametrize(
    ("name", "record", "message"),
    [
        ("config", 5, "its record config is none"),
        ("data", None, "lacks its item data"),
        ("progress", [], "its record progress is none"),
        ("progress", {"best_hash": "x"}, "its record progress does not fit: .*best_hash"),
        ("progress", {**HASHES, "window": 5}, "its record progress does not fit: window is 5"),
        ("progress", {**HASHES, "best_score": "high"}, "does not fit: best_score is 'high'"),
    ],
)
def test_record_of_another_kind_is_refused_naming_the_checkpoint(
    straight, config, open_data, tmp_path, name, record, message
):
    folder = tmp_path / "copy"
    shutil.copytree(straight, folder)
    step = folder / "checkpoints/6"
    (step / name / "metadata").write_text(json.dumps(record))
    sums = json.loads((step / "leaves/metadata").read_text())
    sums["records"][name] = describe_record(record)  # as a later version of the program, or a forger, would
    (step / "leaves/metadata").write_text(json.dumps(sums))
    with pytest.raises(ValueError, match=f"checkpoints/6 .*{message}.*--config.resume_step=4"):
        loop.fit(config, open_data(config), folder)


def poison(batch):
    batch["image"][1, 3, 3, 3, 0] = np.inf
    return batch


def test_bad_batch_stops_the_run_naming_step_and_cases(config, open_data, tmp_path):
    seen = []
    data = open_data(config, wrap=lambda s: Watched(s, 4, lambda b: seen.extend(b["batch_case_id"]) or poison(b)))
    with pytest.raises(loop.Diverged) as error:
        loop.fit(config, data, tmp_path)
    assert "step 5: loss nan" in str(error.value)
    assert ", ".join(seen) in str(error.value)
    assert (tmp_path / "checkpoints/4").is_dir()


def test_bad_batch_is_skipped_within_the_limit_and_recorded(config, open_data, tmp_path):
    config.max_bad_steps = 1
    loop.fit(config, open_data(config, wrap=lambda s: Watched(s, 4, poison)), tmp_path)
    skipped = [r for r in records(tmp_path) if "skipped" in r]
    assert [r["step"] for r in skipped] == [5]
    assert len(skipped[0]["cases"]) == 4


def test_plateau_and_patience_follow_the_validations(config, open_data, tmp_path):
    config.optim.update(schedule="plateau", peak_lr=0.0, total_steps=20)
    config.optim.update(plateau_factor=0.5, plateau_patience=0)
    config.eval.update(every=2, patience=3)
    result = loop.fit(config, open_data(config), tmp_path)  # nothing is learned: no validation is better
    assert (result["best_step"], result["step"]) == (2, 8)
    checkpoints = loop.Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.records(8)["progress"]["plateau"]["scale"] == 0.5**3
    checkpoints.close()


@pytest.fixture
def adapted(straight, config, open_data):
    """Workdir of an adapter run on the finished run's network; made once."""
    folder = straight.parent / "adapted"
    if (folder / "result.json").exists():
        return folder
    config.init_from = str(straight)
    config.model.update(variant="", kernel_size=0, n_channels=0, block_counts=(), exp_r=0)
    config.peft.update(method="conv_adapter+head", gamma=2)
    config.optim.update(total_steps=2, ema_decay=0.5, new_warmup_steps=2)
    config.eval.every = 0
    loop.fit(config, open_data(config), folder)
    return folder


def test_adapter_run_leaves_frozen_parameters_bit_identical(straight, adapted):
    before, after = flat_model(straight / "model"), flat_model(adapted / "model")
    frozen = {path for path in before if not path.startswith("out_")}
    for path in frozen:
        np.testing.assert_array_equal(after[path], before[path])
    assert any((after[path] != before[path]).any() for path in before if path.startswith("out_"))
    assert any("adapter/" in path for path in after)


def test_adapter_run_saves_the_adapter_alone_and_small_checkpoints(straight, adapted):
    _, base = modeldir.load_model(straight / "model")
    adapter = peft.load_adapter(adapted / "adapter", base)  # its hash binds it to the network it started from
    after = flat_model(adapted / "model")
    for path, leaf in adapter.tensors.items():
        np.testing.assert_array_equal(after[path], leaf)
    checkpoints = loop.Checkpoints(adapted / "checkpoints")
    assert checkpoints.records(2)["progress"]["base_hash"] == modeldir.params_hash(base)
    checkpoints.close()
    step = adapted / "checkpoints/2"
    leaves = json.loads((step / "leaves/metadata").read_text())["leaves"]
    listed_by_orbax = json.loads((step / "state/_METADATA").read_text())["tree_metadata"]
    assert len(listed_by_orbax) == len(leaves)
    stored = {path.removeprefix("trainable/") for path in leaves if path.startswith("trainable/")}
    assert stored == adapter.tensors.keys()
    frozen = paths.flatten(base).keys() - adapter.tensors.keys()
    assert frozen and not any(path.endswith(f"/{name}") for path in leaves for name in frozen)
    own = sum(leaf.nbytes for leaf in adapter.tensors.values())
    size = sum(math.prod(leaf["shape"]) * np.dtype(leaf["dtype"]).itemsize for leaf in leaves.values())
    vectors = [leaf for leaf in leaves.values() if leaf["shape"] and leaf["shape"][0] % optimizer.SHARES == 0]
    filled_up = 4 * len(vectors) * (optimizer.SHARES - 1)
    assert size < 4 * own + filled_up + 100  # two moments and an average of what is trained, and counters
    assert size < sum(leaf.nbytes for leaf in paths.flatten(base).values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"n_channels": 4}}, r"has n_channels 2, config.model asks for 4"),
        ({"model": {"output": "labels"}}, r"add --config.init_head=new"),
        ({"peft": {"method": "norm"}, "model": {"deep_supervision": True}}, r"\+head"),
        ({"peft": {"method": "no_such"}}, "unknown method 'no_such'"),
        ({"init_from": "nowhere"}, "nowhere does not exist"),
        ({"data": {"patch_voxels": (24, 32, 16)}}, r"patch_voxels is \(24, 32, 16\)"),
        ({"data": {"batch_size": 6}}, "batch_size is 6: it must be a multiple of the 4 devices"),
        ({"init_from": "", "model": {"variant": ""}}, "are both empty"),
        ({"init_from": "", "model": {"variant": "S"}, "peft": {"method": "head"}}, "freezes the base"),
        ({"augment": {"enabled": True, "noise_probability": 1.5}}, "augment.noise_probability is 1.5"),
    ],
)
def test_what_does_not_fit_is_one_line_before_anything_is_written(
    straight, config, open_data, tmp_path, change, message
):
    data = open_data(config)
    config.init_from = str(straight)
    config.model.update(variant="", kernel_size=0, n_channels=0, block_counts=(), exp_r=0)
    config.update(change)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        loop.fit(config, data, tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run/config.json").exists()


def test_permuted_channels_are_refused(straight, config, open_data, tmp_path):
    config.init_from = str(straight)
    with pytest.raises(ValueError, match="in another order"):
        loop.fit(config, open_data(config, channels=("t1c", "t1n", "t2w", "t2f")), tmp_path)


def test_refused_run_leaves_no_folder_behind(config, open_data, tmp_path):
    config.peft.method = "lora"  # on a base that is not named
    with pytest.raises(ValueError, match="config.init_from is empty"):
        loop.fit(config, open_data(config), tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_second_process_in_the_same_workdir_is_refused(config, open_data, tmp_path):
    lock = loop.workdir.Lock(tmp_path)
    with pytest.raises(OSError, match="another process is training"):
        loop.fit(config, open_data(config), tmp_path)
    lock.release()


def test_workdir_that_can_not_be_written_is_one_line(config, open_data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="choose another --workdir"):
        loop.fit(config, open_data(config), tmp_path / "file" / "run")

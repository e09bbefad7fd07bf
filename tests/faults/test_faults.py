"""The quick part of the fault test-bench (``make soak`` is the long one), and that the bench would notice."""

import json
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from data_pipeline import preprocess
from mednext_jax.train.checkpoints import RECORDS, Checkpoints
from tests.faults import bench, damage, endurance, fuzz, inputs, killed_study, kills, soak, topology


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return fuzz.make_good(tmp_path_factory.mktemp("good"))


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cohort")
    preprocess.preprocess(bench.write_cases(folder / "raw"), folder / "store", workers=1, progress=False)
    return f"--config.data.store={folder / 'store'}"


def test_killed_runs_end_bit_identical(good, cohort, tmp_path):
    short = ("--config.optim.total_steps=16", "--config.optim.warmup_steps=2")
    flags = (*kills.FLAGS, *short, cohort, f"--config.init_from={good / 'model'}")
    found = kills.kill_runs(flags, tmp_path / "runs", wanted=2, seed=1)
    assert found.faults == []
    assert found.tried >= 2 and found.restarts >= 2 and found.mismatches == 0


def test_run_of_two_processes_is_stopped_and_goes_on_in_one(cohort, tmp_path):
    flags = (*topology.FLAGS, cohort)
    found = topology.stop_and_go_on(flags, tmp_path / "runs", ((2, 2), (1, 1)), steps=32, seed=0)
    assert found.faults == [] and found.stopped == {"SIGTERM to one of several": 1}
    assert list(found.differences) == ["stopped and moved, 2 x 2 -> 1 x 1"]
    assert max(found.differences.values()) < soak.MOST_DIFFERENCE


def test_deterministic_run_says_what_it_costs(tmp_path):
    flags = (*bench.TINY, "--config.deterministic=True", f"--workdir={tmp_path / 'run'}")
    end = bench.run("train.py", *flags, log=tmp_path / "log")
    assert "config.deterministic: on a GPU" in end.output and "steps take longer" in end.output
    assert end.clean and "no data" in end.errors


def test_some_of_all_malformed_inputs_are_refused(good, tmp_path):
    everything = inputs.everything(good)
    assert len(everything) >= 500
    found = fuzz.try_all(random.Random(0).sample(everything, 25), good, tmp_path)
    assert found.faults == []
    assert found.refused.total() + found.accepted.total() == 25


@pytest.fixture
def checkpoint(tmp_path):
    """A folder of two steps with three leaves."""
    rng = np.random.default_rng(0)
    state = {f"trainable/layer_{i}/kernel": rng.normal(size=(3, 5, i + 1)).astype(np.float32) for i in range(3)}
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for step in (1, 2):
        checkpoints.save(step, state, {name: {"step": step, "rate": 0.125} for name in RECORDS})
    checkpoints.close()
    return tmp_path / "checkpoints"


def test_every_file_of_a_checkpoint_can_be_damaged_without_harm(checkpoint, tmp_path):
    found = damage.damage_checkpoints(checkpoint, tmp_path / "damaged", rounds=1, seed=0)
    assert found.faults == []
    assert all(found.detected[kind] for kind in damage.KINDS)
    assert found.tried == found.detected + found.harmless


def test_bench_notices_what_comes_back_changed(checkpoint):
    expected = damage.content(checkpoint, 2)
    changed = ({**expected[0], "data": {"step": 3}}, expected[1])
    for wrong in (changed, (expected[0], {path: leaf + 1 for path, leaf in expected[1].items()})):
        found = damage.Damage()
        damage._judge(found, "flip", "it", lambda wrong=wrong: wrong, expected)
        assert found.faults == ["it: restored, but different"]


def test_bench_notices_tracebacks_changed_files_and_partial_results(good, tmp_path):
    def crash(folder):
        (folder / "crash.py").write_text("def get_config():\n    raise SystemError('a')\n")

    (tmp_path / "touched").mkdir()
    flags = ("--input={good}/raw", "--output={out}/store", "--workers=1")
    wrong = [
        fuzz.Malformed("a", "sound input", "preprocess.py", flags),
        fuzz.Malformed("a", "writes outside", "preprocess.py", (flags[0], "--output={in}/store", flags[2])),
        fuzz.Malformed("a", "other reason", "train.py", ("--config=nothing.py",), crash, told=("get_config",)),
    ]  # fmt: skip
    found = fuzz.try_all(wrong, good, tmp_path / "tried")
    assert not found.refused and not found.accepted
    for name, words in (("sound input", "partial result"), ("writes outside", "changed outside the output"),
                        ("other reason", "refused for something else")):  # fmt: skip
        assert any(name in fault and words in fault for fault in found.faults), name


def test_bench_notices_growth_and_different_runs(tmp_path):
    early = {"step": 100, "memory_mib": 300.0, "shared_mib": 0.0, "open_files": 40, "segments": 0}
    assert endurance.growth({"early": early, "late": early | {"memory_mib": 310.0}}, "run") == []
    late = early | {"memory_mib": 400.0, "open_files": 41}
    compiling = early | {"memory_mib": 700.0}  # must not hide what grows later
    looks = {"early": compiling, "middle": early, "late": early | {"memory_mib": 340.0}}
    assert endurance.growth(looks, "run") == ["run: memory_mib grew from 300.0 to 340.0"]
    assert [fault.split()[1] for fault in endurance.growth({"early": early, "late": late}, "run")] == [
        "memory_mib", "open_files",
    ]  # fmt: skip
    assert kills.differing({"a": b"1", "b": b"2"}, {"a": b"1", "c": b"3"}) == ["b", "c"]
    for name, losses in (("one", [1.0, 0.5]), ("other", [1.0, 0.75]), ("short", [1.0])):
        (tmp_path / name).mkdir()
        lines = (json.dumps({"step": step, "loss": loss}) for step, loss in enumerate(losses))
        (tmp_path / name / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    assert topology.difference(tmp_path / "one", tmp_path / "other") == 0.25
    assert topology.difference(tmp_path / "one", tmp_path / "short") == float("inf")
    assert topology.difference(tmp_path / "one", tmp_path / "other", "val/") == 0  # none of them validated


def finished_study(folder, seconds: str, flops: str = "1.5", label: bytes = b"label", weights: bytes = b"weights"):
    """What two studies are compared by, as a study would leave it."""
    cost = {"header": ["arm", "GFLOP per step", "seconds per step"], "rows": [["full", flops, seconds]]}
    results = {"estimates": {"drop": 0.5}, "tables": {"Accuracy against compute": cost}}
    for file, content in (("results.json", json.dumps(results).encode()), ("evaluation/metrics.csv", b"0.5"),
                          ("predictions/target/full@0/a.nii.gz", label), ("done/result.json", seconds.encode()),
                          ("runs/full@0/model/model.safetensors", weights)):  # fmt: skip
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(content)
    return killed_study.outcome(folder)


def test_bench_notices_a_study_that_ends_with_another_result(tmp_path):
    alone = finished_study(tmp_path / "alone", "0.1")
    assert len(alone) == 4
    assert kills.differing(alone, finished_study(tmp_path / "slower", "0.2")) == []
    for change, named in (({"flops": "3"}, "results.json"), ({"label": b"other"}, "a.nii.gz"),
                          ({"weights": b"other"}, "model.safetensors")):  # fmt: skip
        (name,) = kills.differing(alone, finished_study(tmp_path / named, "0.1", **change))
        assert name.endswith(named)


FORKS_AND_WAITS = "import os, time; os.setsid(); os.fork(); time.sleep(60)"


def test_bench_kills_a_study_with_its_workers():
    parent = subprocess.Popen([sys.executable, "-c", FORKS_AND_WAITS])
    until = time.monotonic() + 30
    while len(killed_study.members(parent.pid)) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    assert killed_study.kill(parent) == 2 and killed_study.members(parent.pid) == []
    assert parent.wait() == -signal.SIGKILL


def test_part_of_the_soak_is_run_again_only_if_it_had_faults(tmp_path, monkeypatch):
    calls = []

    def part(good, scratch):
        calls.append(scratch.name)
        return {"rows": {"things": "2 tried"}, "faults": [] if len(calls) > 1 else ["one of them"]}

    monkeypatch.setattr(soak, "PARTS", {"part": part})
    monkeypatch.setattr(soak, "prepare", lambda folder: folder)
    for _ in range(3):
        soak.run_part("part", tmp_path)
    assert calls == ["part", "part"]
    assert "| things | 2 tried |" in soak.table(tmp_path / "results")

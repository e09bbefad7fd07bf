"""The benchmark command: what it counts, what it compares, and how it is typed."""

import json
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "launch"))
from benchmarks import apart, compiling, data, ours, timing, traffic  # noqa: E402

from configs import pretrain  # noqa: E402
from mednext_jax.nn.mednext import MedNeXt  # noqa: E402
from mednext_jax.train import workdir  # noqa: E402


def moved(function, *arguments):
    return traffic.moved_bytes(jax.jit(function).lower(*arguments).compile().as_text())


def test_a_fused_pass_reads_and_writes_its_array_once():
    x = jnp.ones((64, 1024))
    assert moved(lambda x: jnp.sin(x) * 2 + 1, x) == 2 * x.nbytes


def test_a_product_reads_both_factors_and_writes_the_result():
    a, b = jnp.ones((32, 64)), jnp.ones((64, 16))
    assert moved(lambda a, b: a @ b, a, b) == a.nbytes + b.nbytes + 4 * 32 * 16


def test_a_loop_counts_as_often_as_it_runs_and_reads_the_slices_it_cuts():
    x = jnp.ones((128, 1024))

    def by_rows(x):
        return jax.lax.map(lambda row: jnp.cumsum(jnp.sin(row)), x)

    whole = x.nbytes
    counted = moved(by_rows, x)
    assert 2 * whole <= counted < 60 * whole  # 128 times the whole array would be above 128
    longer = moved(by_rows, jnp.ones((256, 1024)))
    assert longer == pytest.approx(2 * counted, rel=0.02)


def test_the_dearest_branch_counts():
    x = jnp.ones((64, 64))

    def either(i, x, y):
        return jax.lax.cond(i > 0, lambda x, y: x @ y, lambda x, y: jnp.sin(x), x, y)

    assert 3 * x.nbytes <= moved(either, 1, x, x) < 3 * x.nbytes + 100


def test_the_scratch_space_of_a_library_is_not_moved():
    program = """ENTRY %main (a: f32[8,4], b: f32[4,16]) -> f32[8,16] {
  %a = f32[8,4]{1,0} parameter(0)
  %b = f32[4,16]{1,0} parameter(1)
  %product = (f32[8,16]{1,0}, s8[33554432]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm"
  ROOT %result = f32[8,16]{1,0} get-tuple-element(%product), index=0
}"""
    assert traffic.moved_bytes(program) == 4 * (8 * 4 + 4 * 16 + 8 * 16)


def test_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="no entry computation"):
        traffic.moved_bytes("HloModule empty")


def sleeping(seconds):
    return (lambda: jax.block_until_ready(seconds)), {"windows": 3}


def test_ratios_are_ours_over_each_peer_of_the_same_work():
    rows = [
        {"name": "step: ours", "seconds": 2.0, "peak_memory_gb": 1.0, "gflop": 3},
        {"name": "step: torch", "seconds": 8.0, "peak_memory_gb": 4.0},
        {"name": "step: torch compiled", "seconds": 4.0},
        {"name": "volume: torch", "seconds": 1.0},
        {"name": "copy", "seconds": 1.0},
    ]
    assert timing.ratios(rows) == {
        "step against torch": {"seconds": 0.25, "peak_memory_gb": 0.25},
        "step against torch compiled": {"seconds": 0.5},
    }


def test_rows_hold_medians_spread_and_facts():
    (row,) = timing.measure([timing.Work("step: ours", sleeping, (1.0,))], 3)
    assert row["fastest"] <= row["seconds"] <= row["slowest"] and row["windows"] == 3
    assert timing.medians("a", [{"seconds": s} for s in (5.0, 1.0, 2.0)]) == {
        "name": "a", "seconds": 2.0, "fastest": 1.0, "slowest": 5.0}  # fmt: skip


def allocating(megabytes):
    return (lambda: np.ones((megabytes, 2**20), np.uint8).sum()), {}


def noting(file):
    """Writes at each run which process it is; the first of a process is to warm up."""

    def run():
        with Path(file).open("a") as notes:
            notes.write(f"{os.getpid()}\n")

    return run, {"windows": 3}


def failing(when):
    runs = []

    def run():
        runs.append(when)
        if len(runs) == when:
            raise MemoryError("no room\nfor it")

    return run, {}


def test_works_that_are_timed_apart_take_turns_in_processes_of_their_own(tmp_path):
    notes = tmp_path / "notes"
    works = [timing.Work(f"step: {who}", noting, (str(notes),)) for who in ("ours", "torch")]
    rows = apart.measure(works, 3)
    first, second, *turns = notes.read_text().split()
    assert turns == [first, second] * 3 and len({first, second, str(os.getpid())}) == 3
    assert [row["name"] for row in rows] == ["step: ours", "step: torch"]
    assert all(row["fastest"] <= row["seconds"] <= row["slowest"] and row["windows"] == 3 for row in rows)


@pytest.mark.parametrize("when", [1, 2])  # to warm up, or in its turn
def test_a_peer_that_fails_is_named_and_the_others_are_timed(when, capsys):
    works = [timing.Work("step: ours", sleeping, (1.0,)), timing.Work("step: torch", failing, (when,))]
    mine, peers = apart.measure(works, 2)
    assert mine["seconds"] > 0 and peers == {"name": "step: torch", "failed": "MemoryError: no room for it"}
    found = timing.result([mine, peers])
    assert (found["rows"], found["failed"]) == ([mine], {"step: torch": "MemoryError: no room for it"})
    assert found["ratio_to_peer"] == {} and "step: torch" not in timing.table(found)
    assert ("MemoryError" in capsys.readouterr().err) == (when == 1)


def test_what_is_wrong_with_our_own_work_ends_the_measurement():
    with pytest.raises(MemoryError, match="no room"):
        apart.measure([timing.Work("step: ours", failing, (1,))], 1)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks of one run are known on Linux alone")
def test_peak_memory_is_that_of_one_run():
    works = [timing.Work(f"array: {size}", allocating, (size,)) for size in (1, 400)]
    small, large = (row["peak_memory_gb"] for row in apart.measure(works, 1, memory=True))
    assert 0.35 * 2**30 < 1e9 * (large - small) < 0.45 * 2**30


def test_compiling_is_timed_cold_and_from_the_cache():
    config = pretrain.get_config()
    config.model.update(n_channels=2, exp_r=1, kernel_size=1, block_counts=(0,) * 9, deep_supervision=False)
    config.data.update(patch_voxels=(16, 16, 16), batch_size=1)
    config.n_devices = 1
    cold, cached = compiling.rows(workdir.plain(config), 1)
    assert (cold["name"], cached["name"]) == ("train step cold", "train step from the cache")
    assert cached["seconds"] < cold["seconds"] and min(cold["weights_seconds"], cached["weights_seconds"]) > 0


def test_crops_per_second_are_counted_per_crop(monkeypatch):
    clock = SimpleNamespace(wall=0.0, processors=0.0)

    class Stream(nullcontext):
        def __enter__(self):
            return self

        def __next__(self):  # a batch of 4 takes 2 s, and 3 s of two cores
            clock.wall, clock.processors = clock.wall + 2, clock.processors + 3

    times = SimpleNamespace(perf_counter=lambda: clock.wall, process_time=lambda: clock.processors)
    monkeypatch.setattr(data, "time", times)
    monkeypatch.setattr(data, "make_stream", lambda *_, **__: Stream())
    store = SimpleNamespace(case_ids=["a"], cases={"a": {"labelled": True}}, channels="tuv")
    row = data.row(store, 16, batch=4, threads=0, workers=0, repeats=3)
    assert (row["name"], row["seconds"], row["cpu_seconds"]) == ("crop of 16^3 x 3", 0.5, 0.75)
    assert row["gbytes"] == 16**3 * 3 * 6 / 1e9
    assert row["crops_per_second"] == 2 and row["crops_per_second_and_core"] == pytest.approx(4 / 3)
    assert data.demand(4, 2.0)["crops_per_second"] == 2


def test_rows_of_methods_say_their_share_of_full_fine_tuning(monkeypatch):
    model = MedNeXt(n_channels=2, exp_r=1, kernel_size=1, block_counts=(0,) * 9)
    monkeypatch.setattr(ours, "model_of", lambda network: model)
    table, (full, adapter) = ours.peft_rows({}, 16, 1, 1, ["linear_adapter:ratio=1:targets=decoder"])
    assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == [
        "| `full`", "| `linear_adapter` ratio=1, targets=decoder"]  # fmt: skip
    assert set(full["ratio_to_full"].values()) == {1.0}
    assert (full["name"], adapter["name"]) == ("full", "linear_adapter ratio=1, targets=decoder")
    assert full["seconds"] == full["step_seconds"]
    assert adapter["trainable"] == sum(2 * (width**2 + width) for width in (2, 4, 8, 16)) < full["trainable"]
    for name, ratio in adapter["ratio_to_full"].items():
        assert ratio == adapter[name] / full[name] > 0


def test_options_of_methods_may_be_whole_or_broken_numbers_truths_or_words():
    method = ours.method_of("linear_adapter:ratio=0.5:targets=decoder")
    assert (method.options["linear_adapter"]["ratio"], method.options["linear_adapter"]["targets"]) == (0.5, "decoder")
    assert ours.method_of("conv_adapter:gamma=2:scale=false").options["conv_adapter"]["scale"] is False


@pytest.mark.parametrize(("text", "message"), [
    ("lora:rank", "no option=value"), ("lora:gamma=2", "no option 'gamma'"),
    ("conv_adapter:scale=maybe", "scale is 'maybe'; it must be true or false"),
])
def test_a_method_that_is_mistyped_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        ours.method_of(text)


def benchmark(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    return subprocess.run([sys.executable, str(ROOT / "launch" / "benchmark.py"), *map(str, arguments)],
                          capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300)  # fmt: skip


def test_depthwise_prints_a_table_and_writes_json(tmp_path):
    done = benchmark("depthwise", "--size=16", "--channels=2", "--repeats=1", f"--json={tmp_path / 'found.json'}")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["rows"][0]["name"] == "copy" and found["ceilings"]["copy_gb_per_s"] > 0
    assert len(found["rows"]) == 1 + 3 * 3
    for row in found["rows"]:
        assert row["name"] in done.stdout
        assert row["floor_share"] == pytest.approx(row["floor_seconds"] / row["seconds"])
    assert found["ratio_to_peer"] == {}


def test_prediction_of_a_volume_is_timed_beside_what_its_arithmetic_takes(tmp_path):
    found = tmp_path / "found.json"
    sizes = ("--size=16", "--volume=24,16,20")  # two windows along the axes that are longer
    done = benchmark("predict", *sizes, "--repeats=1", "--skip_memory", f"--json={found}")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(found.read_text())["rows"]
    assert row["name"] == "volume: ours" and row["windows"] == 4
    convolutions = 4 * 31.3 / 64  # GFLOP of four windows of 16^3, about; 31.3 at 64^3
    assert row["gflop"] == pytest.approx(convolutions, rel=0.1)
    largest = 4 * 16**3 * 32 * 4  # bytes of one array at full resolution, of all windows
    assert 10 * largest < 1e9 * row["gbytes"] < 1000 * largest


def test_help_tells_what_each_command_does():
    done = benchmark("--help")
    assert done.returncode == 0
    for name in ("step", "peft", "depthwise", "data", "predict", "compile", "deviceless"):
        assert re.search(rf"^    {name}\s", done.stdout, re.MULTILINE)
    assert "--volume" in benchmark("predict", "--help").stdout


NO_PEER = "--peer=nowhere is no checkout of MIC-DKFZ/MedNeXt" if find_spec("torch") else "--peer needs PyTorch"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((), "error: the following arguments are required: COMMAND; see benchmark.py --help"),
        (("speed",), "invalid choice: 'speed'"),
        (("step", "--volume=1,2,3"), "unknown option --volume=1,2,3; see benchmark.py step --help"),
        (("step", "--siez=16"), "unknown option --siez=16, did you mean --size?"),
        (("step", "--size=17"), "17 is no multiple of 16 from 16 to 1024"),
        (("depthwise", "--size=100000"), "100000 is no whole number from 2 to 1024"),
        (("depthwise", "--size=1024", "--channels=4096"), "too little memory for this; take smaller sizes"),
        (("step", "--repeats=0"), "0 is no whole number of at least 1"),
        (("predict", "--volume=240"), "give three sizes from 1 to 1024, like 240,240,155"),
        (("predict", "--volume=a,b,c"), "a,b,c: give three sizes"),
        (("peft", "--methods=,"), "names no method"),
        (("step", "--peer=nowhere"), NO_PEER),
        (("depthwise", "--peer=nowhere"), NO_PEER),
        (("predict", "--peer=nowhere"), NO_PEER),
        (("peft", "--peer=nowhere"), NO_PEER),
        (("data", "--store=nowhere"), "nowhere: the store is not there"),
        (("data", "--workers=-1"), "-1 is no whole number of at least 0"),
        (("depthwise", "--json=nowhere/it.json"), "--json=nowhere/it.json: there is no such folder"),
        (("depthwise", "--json=."), "--json=. is a folder"),
        (("step", "--profile=README.md"), "README.md"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(arguments, line):
    done = benchmark(*arguments)
    assert done.returncode == 1
    assert line in done.stderr and done.stderr.count("\n") == 1

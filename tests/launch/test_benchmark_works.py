"""The benchmark's commands step and data as they are typed, and in which ways the peer is run beside ours."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "launch"))
import benchmark  # noqa: E402
from benchmarks import data, upstream  # noqa: E402

WAYS = {  # of the peer, by --peer_layout: its name, whether channels come last
    "both": [("torch", False), ("torch channels-last", True)],
    "default": [("torch", False)],
    "channels-last": [("torch channels-last", True)],
}


def rows_of(tmp_path, *arguments):
    found = tmp_path / "found.json"
    command = [sys.executable, str(ROOT / "launch" / "benchmark.py"), *arguments, "--repeats=1", f"--json={found}"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
                          cwd=ROOT, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads(found.read_text())["rows"]
    assert all(row["name"] in done.stdout for row in rows)
    return rows


def test_step_counts_the_arithmetic_of_every_patch_forward_and_back(tmp_path):
    forward, both = rows_of(tmp_path, "step", "--size=16", "--batch=2", "--skip_memory")
    assert (forward["name"], both["name"]) == ("forward: ours", "forward+backward: ours")
    convolutions = 2 * 31.3 / 64  # GFLOP of two patches of 16^3; 31.3 at 64^3
    assert forward["gflop"] == pytest.approx(convolutions, rel=0.1)
    assert 3 < both["gflop"] / forward["gflop"] < 4  # two gradients of every product, and the expansions once more
    assert not any("peak_memory_gb" in row for row in (forward, both))


def test_data_reads_the_store_and_the_size_that_are_named(tmp_path):
    noise = data.noise_store(tmp_path / "store", n_cases=1)
    sizes = ("--size=16", "--batch=3", "--threads=1", "--skip_step")
    (row,) = rows_of(tmp_path, "data", f"--store={noise.path}", *sizes)
    assert row["name"] == "crop of 16^3 x 4" and row["crops_per_second"] > 0


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("layout", WAYS)
def test_the_peer_is_timed_in_the_layouts_asked_for_and_compiled_beside_eager(layout, compiled):
    arguments = ["benchmark.py", "step", f"--peer_layout={layout}", *["--peer_compile"] * compiled]
    options = benchmark.parse(arguments)
    ways = [(name, last, False) for name, last in WAYS[layout]]
    ways += [(f"{name} compiled", last, True) for name, last in WAYS[layout] if compiled]
    layouts = benchmark.layouts_of(options)
    assert upstream.variants(layouts, options.peer_compile) == ways
    network = benchmark.network_of(options)
    works = upstream.step_works(Path("there"), network, 2, 16, layouts, options.peer_compile)
    whats = ("forward", "forward+backward")
    assert [work.name for work in works] == [f"{what}: {name}" for name, *_ in ways for what in whats]
    assert [work.arguments for work in works] == [
        ("there", network, 2, 16, what, last, compiled) for _, last, compiled in ways for what in whats]  # fmt: skip


def test_without_layout_or_compilation_the_peer_is_timed_in_both_layouts_eager():
    options = benchmark.parse(["benchmark.py", "predict"])
    assert upstream.variants(benchmark.layouts_of(options), options.peer_compile) == [
        ("torch", False, False), ("torch channels-last", True, False)]  # fmt: skip


def test_step_times_the_peer_beside_ours_only_where_a_checkout_is_named(monkeypatch):
    timed = []
    monkeypatch.setattr(upstream, "check", lambda checkout: None)
    monkeypatch.setattr("benchmarks.timing.measure_apart", lambda works, *_, **__: timed.append(works) or [])
    monkeypatch.setattr("benchmarks.timing.result", lambda rows, *_: SimpleNamespace(rows=rows))
    for more in ([], ["--peer=there", "--peer_layout=default", "--peer_compile"]):
        benchmark.step(benchmark.parse(["benchmark.py", "step", "--size=32", "--batch=3", *more]))
    ours, beside = ([(work.name, work.arguments) for work in works] for works in timed)
    assert [(name, arguments[1:3]) for name, arguments in ours] == [
        ("forward: ours", (3, 32)), ("forward+backward: ours", (3, 32))]  # fmt: skip
    assert beside[:2] == ours
    whose = ("torch", "torch", "torch compiled", "torch compiled")
    for (name, arguments), who in zip(beside[2:], whose, strict=True):
        assert name.endswith(f": {who}") and arguments[0] == "there" and arguments[2:4] == (3, 32)

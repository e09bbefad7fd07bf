"""The benchmark's commands step and data as they are typed, and in which ways the peer is run beside ours."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "launch"))
import benchmark  # noqa: E402
from benchmarks import data, ours, predict, upstream  # noqa: E402

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


def test_ctrl_c_waits_for_no_compilation_and_is_told_in_one_line():
    heed = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    run = subprocess.Popen(
        [sys.executable, "-c", heed,  # a suite in the background ignores SIGINT, and its children inherit that
         sys.executable, str(ROOT / "launch" / "benchmark.py"), "step", "--size=16", "--skip_memory"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert run.stdout.readline().startswith("forward: ours: ready after ")
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does: to the process that compiles the other, as well
    assert run.communicate(timeout=60)[0] == "interrupted\n" and run.returncode == 130


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
    monkeypatch.setattr("benchmarks.apart.measure", lambda works, *_, **__: timed.append(works) or [])
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


UPSTREAM = """
import torch

class MedNeXt(torch.nn.Module):
    def __init__(self, in_channels, n_classes, **sizes):
        super().__init__()
        self.conv = torch.nn.Conv3d(in_channels, n_classes, 3, padding=1)
        MedNeXt.made = self, sizes

    def forward(self, x):
        return self.conv(x)
"""


@pytest.fixture
def checkout(tmp_path):
    """A checkout whose network is one convolution, and what it was made with after a run."""
    folder = tmp_path / "nnunet_mednext" / "network_architecture" / "mednextv1"
    folder.mkdir(parents=True)
    (folder / "MedNextV1.py").write_text(UPSTREAM)
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("nnunet_mednext")]:
        del sys.modules[name]


def made():
    return sys.modules["nnunet_mednext.network_architecture.mednextv1.MedNextV1"].MedNeXt.made


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("what", ["forward", "forward+backward", "full"])
def test_the_peers_pass_does_what_its_name_says(checkout, what, dtype):
    torch = pytest.importorskip("torch")
    network = ours.Network(variant="B", kernel_size=5, deep_supervision=False, dtype=dtype, remat="mlp")
    run, _ = upstream._step(str(checkout), network, 2, 8, what, True, False)
    model, sizes = made()
    assert (sizes["kernel_size"], sizes["deep_supervision"], sizes["exp_r"][0]) == (5, False, 2)
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last_3d)
    before = model.conv.weight.detach().clone()
    run()
    assert (model.conv.weight.grad is not None) == (what != "forward")
    assert torch.equal(model.conv.weight, before) == (what != "full")
    assert torch.backends.cudnn.benchmark


@pytest.mark.parametrize("operation", ours.OPERATIONS)
def test_the_peers_depthwise_operations_are_ours(operation, monkeypatch):
    torch = pytest.importorskip("torch")
    torch.backends.cudnn.benchmark = False
    seen = {}
    for name in ("conv3d", "conv_transpose3d"):
        original = getattr(torch.nn.functional, name)

        def noting(x, w, *, original=original, **options):
            seen["y"] = original(x, w, **options)
            seen["x"], seen["w"] = x, w
            return seen["y"]

        monkeypatch.setattr(torch.nn.functional, name, noting)
    run, _ = upstream._depthwise(2, 6, 3, "float32", operation, "forward", True)
    run()
    assert torch.backends.cudnn.benchmark
    assert seen["x"].is_contiguous(memory_format=torch.channels_last_3d)
    x = seen["x"].permute(0, 2, 3, 4, 1).numpy()
    w = seen["w"].permute(2, 3, 4, 1, 0).numpy()  # (C, 1, k...) -> (k..., 1, C)
    y = np.asarray(ours.OPERATIONS[operation](x, w))
    np.testing.assert_allclose(y, seen["y"].permute(0, 2, 3, 4, 1).numpy(), rtol=1e-4, atol=1e-5)


def test_monais_sliding_window_sees_all_of_the_volume(checkout):
    pytest.importorskip("torch")
    pytest.importorskip("monai")
    network = ours.Network(variant="S", kernel_size=3, deep_supervision=False, dtype="float32", remat="mlp")
    run, _ = predict._monai(str(checkout), network, (12, 10, 8), 8, 0.5, 2, False, False)
    made()[0].conv.weight.data.zero_()
    made()[0].conv.bias.data.fill_(2.5)
    logits = run()
    assert logits.shape == (1, ours.N_CLASSES, 12, 10, 8)
    np.testing.assert_allclose(logits, 2.5, rtol=1e-5)


def test_methods_are_compared_with_the_peers_full_training_step(monkeypatch):
    monkeypatch.setattr(upstream, "check", lambda checkout: None)

    def rows_of(network, size, batch, repeats, names, peers, memory):
        assert memory
        assert [(peer.name, peer.arguments[2:5]) for peer in peers] == [("full: torch", (3, 32, "full"))]
        rows = [{"name": name, "seconds": seconds} for name, seconds in (("full", 4.0), ("head", 1.0))]
        return "table", [*rows, {"name": "full: torch", "seconds": 8.0}]

    monkeypatch.setattr(ours, "peft_rows", rows_of)
    monkeypatch.setattr("benchmarks.timing.ceilings", lambda dtype: {
        "copy_gb_per_s": 1.0, "matmul_gflop_per_s": 1.0, "dtype": dtype})  # fmt: skip
    options = ["--size=32", "--batch=3", "--methods=head", "--peer=there", "--peer_layout=default"]
    found = benchmark.peft(benchmark.parse(["benchmark.py", "peft", *options]))
    assert found["ratio_to_peer"] == {
        "full against full: torch": {"seconds": 0.5}, "head against full: torch": {"seconds": 0.125}}  # fmt: skip

"""The train command as a user runs it: raw folder in, errors in one line, killed and started again."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from configs import default
from data_pipeline.store import Store
from mednext_jax import modeldir
from mednext_jax.nn import paths
from mednext_jax.nn.mednext import parameter_shapes

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "launch"))
import training_data  # noqa: E402

TINY = [
    "--config=configs/pretrain.py:demo", "--config.model.n_channels=2", "--config.model.exp_r=1",
    "--config.model.kernel_size=1", "--config.model.block_counts=(0,0,0,0,0,0,0,0,0)",
    "--config.data.patch_voxels=(16,16,16)", "--config.data.fold=0", "--config.augment.enabled=False",
    "--config.optim.total_steps=40", "--config.eval.every=20", "--config.checkpoint_every=1",
    "--config.log_every=7",
]  # fmt: skip


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    cache = tmp_path_factory.mktemp("xla")
    flags = {"JAX_COMPILATION_CACHE_DIR": str(cache), "XLA_FLAGS": "", "PYTHONUNBUFFERED": "1"}
    return {**os.environ, **flags, "JAX_PLATFORMS": "cpu"}


@pytest.fixture(scope="module")
def raw_folder(tmp_path_factory):
    """Ten cases in BraTS-SSA layout: a bright ball in a brain."""
    return write_cases(tmp_path_factory.mktemp("raw"), 10, (22, 19, 17))


def write_cases(root, count, shape):
    rng = np.random.default_rng(0)
    radius = np.linalg.norm(np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1) - 9, axis=-1)
    label = np.select([radius < 2, radius < 3, radius < 5], [1, 3, 2]).astype(np.uint8)
    affine = np.diag([-1.0, -1.0, 1.0, 1.0])
    for i in range(count):
        name = f"BraTS-SSA-{i:05d}-000"
        (root / name).mkdir(parents=True)
        for suffix in ("t1n", "t1c", "t2w", "t2f"):
            image = np.where(radius < 9, 100 + 40 * label + rng.normal(0, 5, shape), 0).astype(np.float32)
            nib.save(nib.Nifti1Image(image, affine), root / name / f"{name}-{suffix}.nii.gz")
        nib.save(nib.Nifti1Image(label, affine), root / name / f"{name}-seg.nii.gz")
    return root


def train(environment, *flags, start=False):
    command = [sys.executable, str(ROOT / "launch" / "train.py"), *flags]
    options = {
        "env": environment,
        "cwd": ROOT,
        "text": True,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
    }
    return subprocess.Popen(command, **options) if start else subprocess.run(command, timeout=500, **options)


@pytest.fixture(scope="module")
def straight(environment, raw_folder, tmp_path_factory):
    """A finished run on the raw folder, preprocessed on first use."""
    workdir = tmp_path_factory.mktemp("runs") / "straight"
    result = train(environment, *TINY, f"--config.data.root={raw_folder}", f"--workdir={workdir}")
    assert result.returncode == 0, result.stderr
    return workdir, result.stdout


def same_outcome(first, second):
    assert (first / "metrics.jsonl").read_bytes() == (second / "metrics.jsonl").read_bytes()
    one, two = (paths.flatten(modeldir.load_model(run / "model")[1]) for run in (first, second))
    assert one.keys() == two.keys()
    return all((one[path] == two[path]).all() for path in one)


def test_train_runs_on_a_raw_folder_and_says_what_it_trains(straight):
    workdir, output = straight
    assert "trainable params:" in output
    assert "s/step" in output
    assert "validation Dice  WT" in output
    assert len(list(workdir.parent.glob("store-*/dataset.json"))) == 1
    assert json.loads((workdir / "result.json").read_text())["step"] == 40


def kill_at_step(process, workdir, step, how):
    """Waits for a checkpoint of ``step`` and sends the signal at once: a save is nearly always under way."""
    deadline = time.monotonic() + 300
    while not any(int(f.name) >= step for f in (workdir / "checkpoints").glob("[0-9]*") if f.name.isdigit()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(how)
    return process.communicate(timeout=120)


def test_killed_run_started_again_ends_bit_identical(straight, environment, tmp_path):
    reference, _ = straight
    store = next(reference.parent.glob("store-*"))
    workdir = tmp_path / "killed"
    flags = [*TINY, f"--config.data.store={store}", f"--workdir={workdir}"]
    process = train(environment, *flags, start=True)
    kill_at_step(process, workdir, 3, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    process = train(environment, *flags, start=True)
    output, _ = kill_at_step(process, workdir, 19, signal.SIGTERM)
    if process.returncode:  # it may have finished first
        assert process.returncode == 75
        assert "SIGTERM: saved at step" in output
    result = train(environment, *flags)
    assert result.returncode == 0, result.stderr
    assert same_outcome(reference, workdir)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_run_stopped_while_it_preprocesses_keeps_the_finished_cases(environment, tmp_path, number, code):
    raw, workdir = write_cases(tmp_path / "raw", 1, (90, 90, 90)), tmp_path / "run"
    (first,) = raw.iterdir()
    for i in range(1, 60):  # links: sixty cases in the space and time of one
        name = f"BraTS-SSA-{i:05d}-000"
        (raw / name).mkdir()
        for file in first.iterdir():
            os.link(file, raw / name / file.name.replace(first.name, name))
    process = train(environment, *TINY, f"--config.data.root={raw}", f"--workdir={workdir}", start=True)
    deadline = time.monotonic() + 120
    while not (done := list(tmp_path.glob("store-*/cases/[!.]*/case.json"))):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert output.splitlines()[1:] == [
        f"{number.name}: stopped before training; the same command with --workdir={workdir} goes on from there"
    ]
    assert not errors and done[0].exists() and not list(tmp_path.glob("store-*/dataset.json"))


def test_two_processes_that_are_stopped_by_ctrl_c_say_so_once(straight, environment, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = f"--coordinator=127.0.0.1:{probe.getsockname()[1]}"
    store, workdir = next(straight[0].parent.glob("store-*")), tmp_path / "run"
    flags = [*TINY, f"--config.data.store={store}", f"--workdir={workdir}", "--config.optim.total_steps=4000",
             "--config.data.batch_size=2", "--config.n_devices=0", "--config.deterministic=True", place,
             "--process_count=2"]  # fmt: skip
    pair = [train(environment, *flags, f"--process_id={i}", start=True) for i in (0, 1)]
    try:
        second, _ = kill_at_step(pair[1], workdir, 2, signal.SIGINT)
        first, _ = pair[0].communicate(timeout=120)
    finally:
        for process in pair:
            process.kill()
    assert [process.returncode for process in pair] == [75, 75]
    assert all(line.startswith("[Gloo]") for line in second.splitlines())  # the first one alone speaks
    assert "--xla_gpu_deterministic_ops=true" in json.loads((workdir / "environment.json").read_text())["xla_flags"]
    assert first.count("config.deterministic: on a GPU") == first.count("SIGTERM: saved at step") == 1
    assert "config.deterministic" not in second and "SIGTERM" not in second


HANGING_THREAD = """
import concurrent.futures, sys, time
sys.path.insert(0, "launch")
import command, train

def run(config, workdir):
    concurrent.futures.ThreadPoolExecutor().submit(time.sleep, 300)
    raise TimeoutError("no training batch")

train.run = run
command.run(train.main)
"""


def test_thread_that_hangs_does_not_keep_the_command_from_ending(environment, tmp_path):
    command = [sys.executable, "-c", HANGING_THREAD, TINY[0], f"--workdir={tmp_path}"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (1, "error: no training batch\n")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "no data: give --config.data.root"),
        (["--config.no_such_field=1"], "no field 'no_such_field'"),
        (["--config.optim.peak_lr=fast"], "'fast'"),
        (["--config=configs/no_such.py"], "no_such.py"),
        (["--config=configs/pretrain.py:huge"], "'huge'"),
    ],
    ids=["no data", "unknown field", "wrong type", "no config", "no variant"],
)
def test_error_is_one_line_with_exit_code_1(environment, tmp_path, flags, message):
    config = [] if flags and flags[0].startswith("--config=") else TINY
    result = train(environment, *config, f"--workdir={tmp_path / 'run'}", *flags)
    assert result.returncode == 1, result.stderr
    assert message in result.stderr
    assert result.stderr.strip().count("\n") == 0


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"root": "nowhere"}, "root=nowhere does not exist; no data: give"),
        ({"store": "nowhere"}, "nowhere: the store is not there"),
        ({"root": "a,b", "store": "c"}, "root names 2 folders, config.data.store 1"),
        ({"store": "STORE", "fold": 9}, "no split 'fold9/train'"),
        ({"store": "STORE", "fold": 0, "max_train_cases": 99}, "max_train_cases is 99, but .* has 8"),
        ({"store": "STORE,STORE"}, "is in .* and in .*: leave one out"),
        ({"root": "UNLABELLED"}, "no case has a segmentation; to train"),
    ],
)
def test_data_that_can_not_be_opened_is_one_line(straight, raw_folder, tmp_path, section, message):
    store = str(next(straight[0].parent.glob("store-*")))
    if section.get("root") == "UNLABELLED":
        without = shutil.ignore_patterns("*-seg.nii.gz")
        section = {"root": str(shutil.copytree(raw_folder, tmp_path / "raw", ignore=without))}
    config = default.get_config("demo")
    config.data.update({**section, "store": section.get("store", "").replace("STORE", store)})
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        training_data.open_data(config, tmp_path / "run")


def test_dry_run_shows_the_method_beside_full_fine_tuning_without_data(environment, tmp_path):
    info = modeldir.ModelInfo(
        kwargs={"in_channels": 4, "n_channels": 2, "n_classes": 3, "exp_r": 1, "kernel_size": 1,
                "block_counts": [0] * 9},
        channels=("t1n", "t1c", "t2w", "t2f"), normalization="zscore_brain", output="regions",
        label_scheme="brats2023", regions={"WT": [1, 2, 3], "TC": [1, 3], "ET": [3]}, patch_voxels=(16, 16, 16),
    )  # fmt: skip
    zeros = {path: np.zeros(leaf.shape, np.float32) for path, leaf in parameter_shapes(info.network()).items()}
    modeldir.save_model(tmp_path / "base", info, zeros)
    result = train(
        environment, "--config=configs/peft.py", f"--config.init_from={tmp_path / 'base'}",
        "--config.peft.method=lora+head", "--config.peft.rank=1", "--config.data.patch_voxels=(16,16,16)", "--dry_run",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "trainable params: " in result.stdout
    assert result.stdout.index("| `full` |") < result.stdout.index("| `lora+head` rank=1 |")
    last = result.stdout.splitlines()[-1]
    assert last.startswith("FLOPs relative to full fine-tuning's: ") and "beside parameters and optimizer" in last
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_subset_of_training_cases_depends_on_its_seed_alone(straight):
    store = Store(next(straight[0].parent.glob("store-*")))
    config = default.get_config("demo")
    config.data.max_train_cases = 3
    subsets = []
    for seed in (0, 1, 0):
        config.data.subset_seed = seed
        train_cases, validation = training_data.case_lists(config, store)
        assert set(train_cases) < set(store.split("train"))
        assert validation == store.split("val")
        subsets.append(train_cases)
    assert subsets[0] == subsets[2] != subsets[1]

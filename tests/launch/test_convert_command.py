"""launch/convert.py: checkpoints become model directories and come back, in the file's own order of channels."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mednext_jax import modeldir
from mednext_jax.convert import files, upkern
from mednext_jax.nn import paths
from tests.golden import reading

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = "grad_net_2d_grn_ds"
THEIR_CHANNELS = ("t2f", "t1n", "t1c", "t2w")  # the order of the original's pre-training


def convert(*arguments):
    command = [sys.executable, "launch/convert.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def golden():
    return reading.Golden(GOLDEN)


@pytest.fixture(scope="module")
def converted(tmp_path_factory, golden):
    """A checkpoint as Lightning keeps it, converted; the model directory and what the command printed."""
    folder = tmp_path_factory.mktemp("convert")
    state_dict = {f"net.{name}": array for name, array in golden.state_dict.items()}
    state_dict["dice_loss_fn.class_weight"] = np.ones(1, np.float32)
    state_dict["net.dummy_tensor"] = np.asarray([0.75], np.float32)
    files.write_safetensors(folder / "best.safetensors", state_dict)
    done = convert(f"--input={folder}/best.safetensors", f"--output={folder}/model",
                   f"--channels={','.join(THEIR_CHANNELS)}", "--label_scheme=nnunet")
    assert done.returncode == 0, done.stderr
    return folder / "model", done.stdout


def test_convert_writes_a_model_that_computes_the_same_in_our_order_of_channels_and_classes(converted, golden):
    info, params = modeldir.load_model(converted[0])
    assert info.channels == ("t1n", "t1c", "t2w", "t2f") and info.output == "labels" and info.patch_voxels == (128, 128)
    ours_from_theirs = [THEIR_CHANNELS.index(name) for name in info.channels]
    network = info.network()
    found = reading.run(lambda p, x: network.apply({"params": p}, x), params, golden.input[..., ours_from_theirs])
    golden.assert_outputs([y[..., [0, 2, 1, 3]] for y in found])  # nnU-Net's class 1 is oedema, ours necrosis


def test_convert_says_what_it_assumed_and_left_out(converted):
    said = converted[1]
    assert "assumed: --patch_voxels=128,128,128" in said
    assert "assumed: --normalization=zscore_brain" in said and "assumed: --output_kind=labels" in said
    assert "assumed: --channels" not in said and "assumed: --label_scheme" not in said
    assert "dice_loss_fn.class_weight" in said and "dummy_tensor is 0.75" in said


def test_convert_exports_the_very_tensors_that_were_imported(converted, golden, tmp_path):
    done = convert(f"--input={converted[0]}", f"--output={tmp_path}/back.safetensors")
    assert done.returncode == 0, done.stderr
    back = files.read(tmp_path / "back.safetensors")[0]
    assert back.keys() == golden.state_dict.keys()
    for name, array in golden.state_dict.items():
        wanted = np.asarray([0.75], np.float32) if name == "dummy_tensor" else array
        assert np.asarray(back[name]).tobytes() == wanted.tobytes(), name
    assert [path.name for path in tmp_path.iterdir()] == ["back.safetensors"]


def test_convert_grows_kernels_and_drops_heads_with_a_report(golden, tmp_path):
    files.write_safetensors(tmp_path / "small.safetensors", golden.state_dict)
    done = convert(f"--input={tmp_path}/small.safetensors", f"--output={tmp_path}/large", "--kernel_size=5",
                   "--drop_deep_supervision")
    assert done.returncode == 0, done.stderr
    assert "dropped 8: out_1/conv_out/bias" in done.stdout and "grown 17: bottleneck/0/conv1/kernel" in done.stdout
    info, params = modeldir.load_model(tmp_path / "large")
    assert info.kwargs["kernel_size"] == 5 and not info.kwargs["deep_supervision"]
    theirs = golden.state_dict["up_1.conv1.weight"]
    wanted = upkern.grow(np.moveaxis(theirs, (0, 1), (-1, -2)), (5, 5))
    np.testing.assert_array_equal(paths.flatten(params)["up_1/conv1/kernel"], wanted)


@pytest.mark.parametrize("arguments, message", [
    (("--input={tmp}/cut.ckpt", "--output={tmp}/out"), "cut.ckpt is not a PyTorch file"),
    (("--input={tmp}/whole.safetensors", "--output={tmp}/out", "--channels=t1,t2,dwi"), "3 channels are named"),
    (("--input={tmp}/whole.safetensors", "--output={tmp}/out", "--kernel_size=4"), "must be odd, got (4, 4)"),
    (("--input={tmp}/whole.safetensors", "--output={tmp}/out", "--output_kind=regions"), "out_0/conv_out"),
    (("--output={tmp}/out",), "give --input=CHECKPOINT"),
])  # fmt: skip
def test_convert_refuses_bad_input_in_one_line_and_writes_nothing(golden, tmp_path, arguments, message):
    (tmp_path / "cut.ckpt").write_bytes(b"PK\x03\x04 and no more")
    files.write_safetensors(tmp_path / "whole.safetensors", golden.state_dict)
    done = convert(*(argument.format(tmp=tmp_path) for argument in arguments))
    assert done.returncode == 1 and message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.ckpt", "whole.safetensors"]

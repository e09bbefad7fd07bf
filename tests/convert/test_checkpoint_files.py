"""Checkpoint files: every container is read, none is executed, damaged ones are refused in one line."""

import io
import pickle
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from mednext_jax.convert import files, torch_file
from tests.golden import reading

torch = pytest.importorskip("torch", reason="writing PyTorch's files needs torch: pip install torch")


@pytest.fixture(scope="module")
def tensors():
    return {name: torch.from_numpy(array) for name, array in reading.Golden("net_k3_b1").state_dict.items()}


class Network(torch.nn.Module):
    """A stranger's class, as Lightning pickles it under hyper_parameters."""

    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Conv3d(4, 4, 1)


class Trap:
    """Unpickling it the usual way creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def saved(path, content, **options):
    torch.save(content, path, **options)
    return path


def assert_reads(path, tensors):
    found, notes = files.read(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(np.asarray(found[name]), tensor.float().numpy(), err_msg=name)
        assert found[name].shape == tuple(tensor.shape) and found[name].ndim == tensor.ndim
    return notes


@pytest.mark.parametrize("stream", [False, True], ids=["zip", "stream"])
@pytest.mark.parametrize("name, wrap", [
    ("weights.pt", lambda t: t),
    ("model_final_checkpoint.model", lambda t: {
        "epoch": 1000, "state_dict": t, "optimizer_state_dict": {"state": {0: {"momentum_buffer": t["stem.weight"]}}},
        "lr_scheduler_state_dict": None, "amp_grad_scaler": {"scale": 1.0},
        "plot_stuff": ([np.float64(0.5)], [np.mean([1.0, 2.0])], [], [])}),
    ("last.ckpt", lambda t: {"pytorch-lightning_version": "2.3", "epoch": 3, "state_dict": t, "callbacks": {},
                             "hyper_parameters": {"net": Network()}}),
    ("checkpoint_final.pth", lambda t: {"network_weights": t, "optimizer_state": {}, "init_args": {"fold": 0}}),
    ("bundle.pt", lambda t: {"model": t}),
])  # fmt: skip
def test_checkpoints_of_every_kind_are_read(tmp_path, tensors, name, wrap, stream):
    path = saved(tmp_path / name, wrap(dict(tensors)), _use_new_zipfile_serialization=not stream)
    notes = assert_reads(path, tensors)
    assert bool(notes) == ("hyper_parameters" in wrap(tensors))
    assert not notes or ("Network" in notes[0] and "no code of a file is ever executed" in notes[0])


def test_parameters_and_views_of_a_shared_storage_are_read(tmp_path):
    base = torch.arange(24.0)
    content = {
        "stem.weight": torch.nn.Parameter(base[4:12].reshape(2, 4).t()),
        "half": base.half()[::3],
        "brain": base.bfloat16().reshape(2, 3, 4).permute(2, 0, 1),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 3),
        "long": torch.arange(3),
    }
    found, _ = files.read(saved(tmp_path / "views.pt", content))
    for name, tensor in content.items():
        wanted = tensor.detach().float().numpy()
        np.testing.assert_array_equal(np.asarray(found[name], np.float32), wanted, err_msg=name)


@pytest.mark.parametrize("stream", [False, True], ids=["zip", "stream"])
def test_code_inside_a_checkpoint_is_never_executed(tmp_path, tensors, stream):
    victim = tmp_path / "victim"
    content = {"state_dict": dict(tensors), "hyper_parameters": {"net": Trap(victim)}, "also": [Trap(victim)]}
    path = saved(tmp_path / "bad.ckpt", content, _use_new_zipfile_serialization=not stream)
    notes = assert_reads(path, tensors)
    assert "pathlib" in notes[0] and not victim.exists()
    torch.load(path, weights_only=False)  # the trap is a trap
    assert victim.exists()


@pytest.mark.parametrize("place", ["alone", "as the state dict", "as a tensor"])
def test_malicious_pickle_is_refused_and_not_executed(tmp_path, tensors, place):
    victim, path = tmp_path / "victim", tmp_path / "bad.pt"
    if place == "alone":
        path.write_bytes(pickle.dumps(Trap(victim)))
    else:
        bad = Trap(victim) if place == "as the state dict" else {**tensors, "stem.bias": Trap(victim)}
        saved(path, {"state_dict": bad})
    with pytest.raises(ValueError, match="bad.pt"):
        files.read(path)
    assert not victim.exists()


def test_pickled_module_is_refused_with_the_remedy(tmp_path):
    with pytest.raises(ValueError, match=r"Network.*refused: save model.state_dict\(\)"):
        files.read(saved(tmp_path / "module.pt", Network()))


def test_unpickler_knows_no_function_of_python(tmp_path):
    stream = io.BytesIO(b"c__builtin__\neval\n(S'1+1'\ntR.")
    unpickler = torch_file.SafeUnpickler(stream, lambda pid: None)
    assert isinstance(unpickler.load(), torch_file.Inert) and unpickler.refused.keys() == {"__builtin__.eval"}


@pytest.mark.parametrize("keep", [0, 5, 0.1, 0.5, 0.999])
@pytest.mark.parametrize("kind", ["zip", "stream", "safetensors"])
def test_truncated_file_is_refused(tmp_path, tensors, kind, keep):
    path = tmp_path / "cut.bin"
    if kind == "safetensors":
        files.write_safetensors(path, {name: tensor.numpy() for name, tensor in tensors.items()})
    else:
        saved(path, tensors, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    path.write_bytes(whole[: keep if isinstance(keep, int) else int(keep * len(whole))])
    with pytest.raises(ValueError, match="cut.bin.*(damaged|truncated)"):
        files.read(path)


def test_changed_byte_is_found_and_the_tensor_named(tmp_path, tensors):
    path = saved(tmp_path / "changed.pt", tensors)
    whole = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        info = next(entry for entry in archive.infolist() if entry.filename.endswith("/data/3"))
    whole[info.header_offset + 30 + len(info.filename) + 80] ^= 0xFF
    path.write_bytes(whole)
    found, _ = files.read(path)
    with pytest.raises(ValueError, match="tensor .* cannot be read, the file is damaged"):
        for tensor in found.values():
            np.asarray(tensor)


def test_tensor_reaching_beyond_its_storage_is_refused(tmp_path):
    tensor = torch_file._rebuild_tensor((np.dtype("f4"), lambda: bytes(16)), 1, (2, 2), (2, 1))
    with pytest.raises(ValueError, match="beyond its storage"):
        np.asarray(tensor)


@pytest.mark.parametrize("content, message", [
    (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    (b"\x89HDF\r\n\x1a\n" + bytes(64), "not a PyTorch file"),
    (b"", "not a PyTorch file"),
])  # fmt: skip
def test_other_files_are_refused(tmp_path, content, message):
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        files.read(path)


@pytest.mark.parametrize("content, message", [
    ({"epoch": 3}, "holds no tensors of a network"),
    ({"init": {"stem.weight": torch.ones(1)}, "swa": {"stem.weight": torch.ones(1)}}, "several sets of tensors"),
    ([1, 2], "holds no tensors of a network"),
])  # fmt: skip
def test_file_without_one_network_is_refused(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        files.read(saved(tmp_path / "other.pt", content))


def test_torchscript_is_refused(tmp_path):
    path = tmp_path / "script.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("script/data.pkl", b"")
        archive.writestr("script/constants.pkl", b"")
    with pytest.raises(ValueError, match="TorchScript"):
        files.read(path)


def test_missing_file_and_folder_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        files.read(tmp_path / "none.pt")
    with pytest.raises(FileNotFoundError, match="is not a file"):
        files.read(tmp_path)


def test_safetensors_round_trip_is_bit_equal_and_read_by_the_official_library(tmp_path):
    official = pytest.importorskip("safetensors.torch")
    arrays = reading.Golden("net_k3_b1").state_dict
    path = tmp_path / "net.safetensors"
    files.write_safetensors(path, arrays)
    assert [entry.name for entry in tmp_path.iterdir()] == ["net.safetensors"]
    ours, theirs = files.read(path)[0], official.load_file(path)
    assert ours.keys() == theirs.keys() == arrays.keys()
    for name, array in arrays.items():
        assert np.asarray(ours[name]).tobytes() == theirs[name].numpy().tobytes() == array.tobytes()


def test_bfloat16_safetensors_are_read(tmp_path):
    official = pytest.importorskip("safetensors.torch")
    tensor = torch.randn(3, 4).bfloat16()
    official.save_file({"stem.weight": tensor}, tmp_path / "half.safetensors")
    found = np.asarray(files.read(tmp_path / "half.safetensors")[0]["stem.weight"])
    assert found.dtype.name == "bfloat16"
    np.testing.assert_array_equal(found.astype(np.float32), tensor.float().numpy())


def test_checkpoints_are_read_without_torch(tmp_path, tensors):
    path = saved(tmp_path / "weights.ckpt", {"state_dict": tensors})
    program = ("import sys; sys.modules['torch'] = None\n"
               f"from mednext_jax import convert; from mednext_jax.convert import files\n"
               f"kwargs, params = convert.from_torch(files.read({str(path)!r})[0]); print(kwargs['n_channels'])")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          cwd=Path(__file__).parents[2], check=False)
    assert done.stdout.strip() == "4", done.stderr


@pytest.mark.parametrize("stream", [False, True], ids=["zip", "stream"])
@pytest.mark.parametrize("claim", [
    pytest.param(b"\x80\x02}r\xff\xff\xff\x7f.", id="memo of 2**31 places"),
    pytest.param(b"\x80\x02X\xff\xff\xff\x7fabc.", id="string of 2**31 bytes"),
    pytest.param(b"\x80\x02\x8b\xff\xff\xff\x7f\x01.", id="integer of 2**31 bytes"),
    pytest.param(b"\x80\x04\x95" + (2**60).to_bytes(8, "little") + b"N.", id="frame of 2**60 bytes"),
])  # fmt: skip
def test_sizes_that_a_file_claims_take_no_memory(claim, stream, tmp_path):
    path = tmp_path / "forged.pt"
    if stream:
        path.write_bytes(claim)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", claim)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="forged.pt"):
            files.read(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()

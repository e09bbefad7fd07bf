"""An exported window program computes what the model computes, for any batch, and arrives undamaged."""

import json

import jax
import numpy as np
import pytest

from mednext_jax import modeldir
from mednext_jax.infer import export
from mednext_jax.infer.ensemble import load_member
from mednext_jax.infer.sliding_window import SlidingWindow

WINDOWS = np.random.default_rng(5).standard_normal((3, 16, 32, 16, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def exported(make_model, tmp_path_factory):
    """A model directory and its export."""
    directory = tmp_path_factory.mktemp("export")
    kwargs = {**make_model()[0].kwargs, "deep_supervision": True}
    modeldir.save_model(directory / "model", *make_model(kwargs=kwargs))
    export.export_model(directory / "model", directory / "export")
    return directory


@pytest.fixture(scope="module")
def expected(exported):
    """Probabilities of WINDOWS from the model itself."""
    member = load_member(exported / "model")
    return jax.nn.sigmoid(jax.jit(member.network.apply)({"params": member.params}, WINDOWS))


def test_loaded_export_gives_the_models_output(exported, expected):
    loaded = export.load_export(exported / "export")
    np.testing.assert_allclose(loaded.apply(loaded.params, WINDOWS), expected, atol=1e-4)


def test_export_works_in_the_sliding_window_with_another_batch_size(exported, expected):
    loaded = export.load_export(exported / "export")
    window = SlidingWindow(loaded.apply, loaded.patch_voxels, loaded.n_outputs, overlap=0)
    volume = np.concatenate(WINDOWS)  # three windows, end to end
    np.testing.assert_allclose(window.predict(loaded.params, volume), np.concatenate(expected), atol=1e-4)


def test_export_needs_neither_flax_nor_this_package(exported):
    content = bytearray((exported / "export" / export.PROGRAM_FILE).read_bytes())
    program = jax.export.deserialize(content)
    assert set(program.platforms) == {"cpu", "cuda"}
    description = json.loads((exported / "export" / export.DESCRIPTION_FILE).read_text())
    assert description["model"]["channels"] == ["t1n", "t1c", "t2w", "t2f"]
    assert description["activation"] == "sigmoid"


def test_window_that_does_not_fit_the_network_is_refused(exported, tmp_path):
    with pytest.raises(ValueError, match="divisible by 16"):
        export.export_model(exported / "model", tmp_path / "out", patch_voxels=(16, 20, 16))
    assert not (tmp_path / "out").exists()


def test_foreign_directory_is_not_overwritten(exported):
    with pytest.raises(FileExistsError, match="not an export"):
        export.export_model(exported / "model", exported / "model")


@pytest.mark.parametrize("name", [export.PROGRAM_FILE, export.PARAMETERS_FILE, export.DESCRIPTION_FILE])
def test_damaged_or_missing_file_is_reported(exported, tmp_path, name):
    for file in (exported / "export").iterdir():
        content = file.read_bytes()
        (tmp_path / file.name).write_bytes(content[:-9] if file.name == name else content)
    with pytest.raises(ValueError, match="export again"):
        export.load_export(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} does not exist"):
        export.load_export(tmp_path)

"""The model directory: what is written comes back, and nothing damaged, foreign or ill-fitting is loaded."""

import dataclasses
import json
import os

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mednext_jax import modeldir
from mednext_jax.modeldir import ModelInfo, check_channels, load_info, load_model, params_hash, save_model
from mednext_jax.nn import paths
from mednext_jax.nn.mednext import parameter_shapes

INFO = ModelInfo(
    kwargs={"in_channels": 4, "n_channels": 2, "n_classes": 3, "exp_r": [1] * 9, "block_counts": [1] * 9},
    channels=("t1n", "t1c", "t2w", "t2f"),
    normalization="zscore_brain",
    output="regions",
    label_scheme="brats2023",
    regions={"WT": [1, 2, 3], "TC": [1, 3], "ET": [3]},
    patch_voxels=(32, 16, 48),
    provenance={"config": {"seed": 3}},
)


def parameters(info=INFO, seed=0):
    """Random parameters of the network's shapes, without compiling its initialisation."""
    rng = np.random.default_rng(seed)
    shapes = parameter_shapes(info.network())
    flat = {path: rng.standard_normal(leaf.shape).astype(np.float32) for path, leaf in shapes.items()}
    return paths.unflatten(flat)


PARAMS = parameters()


@pytest.fixture
def saved(tmp_path):
    """A good model directory, to be damaged."""
    save_model(tmp_path / "model", INFO, PARAMS)
    return tmp_path / "model"


def edit(directory, **changes):
    file = directory / modeldir.DESCRIPTION_FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def replace_parameters(directory, flat):
    save_file(flat, directory / modeldir.PARAMETERS_FILE)
    edit(directory, params_hash=params_hash(flat))


def test_model_comes_back_as_it_was_saved(tmp_path):
    written = save_model(tmp_path / "a" / "b", INFO, PARAMS)
    info, params = load_model(tmp_path / "a" / "b")
    assert info == written == dataclasses.replace(INFO, params_hash=params_hash(PARAMS))
    assert list(info.regions) == ["WT", "TC", "ET"]
    jax.tree.map(np.testing.assert_array_equal, params, PARAMS)


def test_files_get_the_permissions_that_the_umask_gives(tmp_path):
    before = os.umask(0o027)
    try:
        save_model(tmp_path / "model", INFO, PARAMS)
    finally:
        os.umask(before)
    modes = {file.name: oct(file.stat().st_mode & 0o777) for file in (tmp_path / "model").iterdir()}
    assert modes == {modeldir.DESCRIPTION_FILE: "0o640", modeldir.PARAMETERS_FILE: "0o640"}


def test_network_takes_changes_and_hashable_arguments():
    network = INFO.network(deep_supervision=True)
    assert network.deep_supervision and network.n_channels == 2 and network.exp_r == (1,) * 9
    with pytest.raises(ValueError, match="do not fit MedNeXt.*colour"):
        INFO.network(colour="red")


def test_files_are_the_same_bytes_however_the_parameters_come(tmp_path):
    flat = paths.flatten(PARAMS)
    reordered = {path: jax.numpy.asarray(flat[path]) for path in reversed(flat)}
    save_model(tmp_path / "a", INFO, PARAMS)
    save_model(tmp_path / "b", INFO, reordered)
    for name in (modeldir.DESCRIPTION_FILE, modeldir.PARAMETERS_FILE):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_hash_sees_every_value_path_and_shape_but_not_the_container():
    flat = {"a/x": np.zeros((2, 3), np.float32), "b": np.ones(4, np.float32)}
    assert params_hash(flat) == params_hash(paths.unflatten(flat))
    assert params_hash(flat) == params_hash(dict(reversed(flat.items())))
    others = [
        {**flat, "a/x": np.zeros((3, 2), np.float32)},
        {**flat, "b": np.array([1, 1, 1, np.nextafter(np.float32(1), 2)], np.float32)},
        {"a/y": flat["a/x"], "b": flat["b"]},
    ]
    assert len({params_hash(params) for params in [flat, *others]}) == 4


def test_saving_again_replaces_the_model_and_leaves_nothing_behind(saved):
    save_model(saved, dataclasses.replace(INFO, normalization="other"), parameters(seed=1))
    assert load_info(saved).normalization == "other"
    assert [entry.name for entry in saved.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("foreign", ["directory", "file", "link"])
def test_what_is_not_a_model_is_never_overwritten(tmp_path, saved, foreign):
    target = tmp_path / "mine"
    if foreign == "directory":
        target.mkdir()
        (target / "thesis.txt").write_text("years of work")
    elif foreign == "file":
        target.write_text("years of work")
    else:
        target.symlink_to(saved)
    with pytest.raises(FileExistsError, match="mine is not a model"):
        save_model(target, INFO, PARAMS)
    assert target.exists() and load_info(saved)


def test_failed_write_keeps_the_old_model(saved, monkeypatch):
    def full_disk(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(modeldir.tensor_file, "write", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_model(saved, INFO, parameters(seed=1))
    monkeypatch.undo()
    assert load_model(saved)[0].params_hash == params_hash(PARAMS)
    assert [entry.name for entry in saved.parent.iterdir()] == ["model"]


def test_workdir_means_its_model(saved):
    assert modeldir.find_model(saved.parent) == saved
    assert load_model(saved.parent)[0].channels == INFO.channels


def test_workdir_of_an_unfinished_training_points_to_its_best(saved):
    saved.rename(saved.with_name("best"))
    with pytest.raises(FileNotFoundError, match="best so far: .*best"):
        load_model(saved.parent)


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_directory_without_a_model_is_named(tmp_path, name):
    with pytest.raises(FileNotFoundError, match="give a model directory"):
        load_model(tmp_path / name)


def test_missing_parameter_file_is_named(saved):
    (saved / modeldir.PARAMETERS_FILE).unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors is missing"):
        load_model(saved)


@pytest.mark.parametrize("length", [0, 5, 200, -1])
def test_truncated_parameter_file_is_named(saved, length):
    file = saved / modeldir.PARAMETERS_FILE
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ValueError, match="model.safetensors is damaged or truncated"):
        load_model(saved)


def test_one_changed_bit_is_found(saved):
    file = saved / modeldir.PARAMETERS_FILE
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="does not have the hash"):
        load_model(saved)


@pytest.mark.parametrize(
    ("text", "line"),
    [("{", "not valid JSON"), ("[" * 100_000, "not valid JSON"), ("[]", "not the description"),
     ('{"format": "other"}', "not the description"),
     ('{"format": "mednext_jax.model", "format_version": 1}', "does not describe a model"),
     ('{"format": "mednext_jax.model", "format_version": 2}', "has format version 2, this program reads 1")],
)  # fmt: skip
def test_damaged_or_foreign_description_is_refused(saved, text, line):
    (saved / modeldir.DESCRIPTION_FILE).write_text(text)
    with pytest.raises(ValueError, match=line):
        load_model(saved)


@pytest.mark.parametrize(
    ("change", "line"),
    [({"output": "logits"}, "output is 'logits'"), ({"regions": {"WT": []}}, "at least one label value"),
     ({"regions": [1]}, r"model.json does not describe a model: regions is \[1\]; it must be names with values"),
     ({"kwargs": None}, "model.json does not describe a model: kwargs is None; it must be names with values"),
     ({"normalization": 3}, "model.json does not describe a model: normalization is 3; it must be a text"),
     ({"channels": None}, "model.json does not describe a model: channels is None"),
     ({"patch_voxels": [-16, 16, 16]}, r"model.json .* patch_voxels is \[-16, 16, 16\]; give 2 or 3 sizes from 1 to"),
     ({"patch_voxels": [4096] * 3}, "patch_voxels is"), ({"patch_voxels": [1.5, 16, 16]}, "patch_voxels is"),
     ({"channels": [1, None, 2, 3]}, r"channels is \[1, None, 2, 3\]; give their names"),
     ({"provenance": "x"}, "provenance is 'x'"), ({"channels": ["t1n"]}, "takes 4 channels, but 1 are named"),
     ({"output": "labels"}, "has 3 outputs"), ({"kwargs": {"pickle": 1}}, "do not fit MedNeXt"),
     ({"kwargs": {**INFO.kwargs, "n_channels": None}}, r"model.json does not describe a model: "),
     ({"kwargs": {**INFO.kwargs, "exp_r": [None] * 9}}, r"model.json does not describe a model: "),
     ({"kwargs": {"n_channels": 2**40}}, "n_channels is 1099511627776: from 1 to 4096 is possible"),
     ({"kwargs": {"block_counts": [10**9] * 9}}, "from 0 to 1024 is possible"),
     ({"kwargs": {"kernel_size": 10**6 + 1}}, "from 1 to 99 is possible")],
)  # fmt: skip
def test_description_that_does_not_fit_is_refused(saved, change, line):
    edit(saved, **change)
    with pytest.raises(ValueError, match=line):
        load_model(saved)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda flat: flat.pop("stem/kernel"), "lacks parameter stem/kernel"),
        (lambda flat: flat.update({"../../x": np.zeros(1, np.float32)}), "unexpected parameter ../../x"),
        (lambda flat: flat.update({"stem/bias": np.zeros(3, np.float32)}), "stem/bias has shape"),
        (lambda flat: flat.update({"stem/bias": flat["stem/bias"].astype(np.float16)}), "is float16"),
    ],
)
def test_parameters_of_another_network_are_refused(saved, change, line):
    flat = load_file(saved / modeldir.PARAMETERS_FILE)
    change(flat)
    replace_parameters(saved, flat)
    with pytest.raises(ValueError, match=line):
        load_model(saved)


def test_model_that_does_not_fit_is_not_written(tmp_path):
    flat = paths.flatten(PARAMS)
    del flat["stem/kernel"]
    with pytest.raises(ValueError, match="lacks parameter stem/kernel"):
        save_model(tmp_path / "model", INFO, flat)
    with pytest.raises(ValueError, match="not plain JSON"):
        save_model(tmp_path / "model", dataclasses.replace(INFO, provenance={"when": object()}), PARAMS)
    assert not list(tmp_path.iterdir())


def test_permuted_channels_are_refused_with_both_orders():
    check_channels(INFO, ["t1n", "t1c", "t2w", "t2f"], "zscore_brain")
    with pytest.raises(ValueError) as error:
        check_channels(INFO, ("t2f", "t1n", "t1c", "t2w"))
    assert "(t1n, t1c, t2w, t2f)" in str(error.value) and "(t2f, t1n, t1c, t2w)" in str(error.value)
    assert "another order" in str(error.value)


def test_other_normalisation_is_refused():
    with pytest.raises(ValueError, match="'zscore_brain'.*'minmax'"):
        check_channels(INFO, INFO.channels, "minmax")

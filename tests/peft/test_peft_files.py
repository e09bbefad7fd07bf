"""Adapter files and several adapters on one base: bound by hash, switched by name, refused when damaged."""

import dataclasses
import json

import numpy as np
import pytest

from mednext_jax import modeldir, peft
from mednext_jax.nn.mednext import create_mednext, parameter_shapes
from mednext_jax.nn.paths import flatten, unflatten
from mednext_jax.peft import attach

INFO = modeldir.ModelInfo(
    kwargs={}, channels=("t1n", "t1c", "t2w", "t2f"), normalization="zscore_brain", output="regions",
    label_scheme="brats2023", regions={"WT": [1, 2, 3], "TC": [1, 3], "ET": [3]}, patch_voxels=(32, 16, 16),
)  # fmt: skip


def trained(network, base, seed, name="conv_adapter+norm", **options):
    """A method and its parameters, flat, with random values where it trains."""
    method = peft.create(name, **{"gamma": 2, **options} if "conv" in name else options)
    shapes = parameter_shapes(network.clone(adapters=method.adapters))
    trainable, _ = peft.split(shapes, method.rule)
    random = np.random.default_rng(seed)
    new = {path: (0.3 * random.standard_normal(leaf.shape)).astype(np.float32) for path, leaf in trainable.items()}
    return method, {**base, **new}


@pytest.fixture
def saved(tmp_path, network, base):
    method, params = trained(network, base, seed=1)
    return peft.save_adapter(tmp_path / "site", method, params, base, INFO, "BraTS-Africa",
                             {"dice_WT": 0.87654}, {"steps": 3})  # fmt: skip


def test_adapter_file_holds_the_trained_leaves_and_returns_them(saved, network, base):
    method, params = trained(network, base, seed=1)
    adapter = peft.load_adapter(saved, base)
    assert adapter.method == method
    assert adapter.tensors.keys() == peft.split(params, method.rule)[0].keys()
    model, loaded = adapter.apply_to(network, base)
    assert model == network.clone(adapters=method.adapters)
    assert all(np.array_equal(leaf, params[path]) for path, leaf in flatten(loaded).items())
    assert sorted(file.name for file in saved.iterdir()) == ["README.md", "adapter_config.json",
                                                             "adapter_model.safetensors"]  # fmt: skip


def test_card_and_configuration_name_what_a_user_must_know(saved, base):
    card = (saved / "README.md").read_text()
    for fact in ("conv_adapter+norm", modeldir.params_hash(base), "t1n, t1c, t2w, t2f", "zscore_brain", "BraTS-Africa",
                 "| dice_WT | 0.8765 |"):  # fmt: skip
        assert fact in card
    config = peft.load_config(saved)
    assert config["channels"] == ["t1n", "t1c", "t2w", "t2f"] and config["provenance"] == {"steps": 3}


def test_every_method_survives_its_file(tmp_path, network, base):
    for name in peft.METHODS:
        method, params = trained(network, base, 3, name)
        directory = peft.save_adapter(tmp_path / name, method, params, base, INFO)
        assert peft.load_adapter(directory, base).method == method


def test_adapter_of_another_base_is_refused_unless_forced(saved, network, base):
    other = base | {"stem/bias": base["stem/bias"] + 1}
    with pytest.raises(ValueError, match="was trained on the base sha256:.* give the base it was trained on"):
        peft.load_adapter(saved, other)
    _, params = peft.load_adapter(saved, other, force=True).apply_to(network, other)
    assert np.array_equal(flatten(params)["stem/bias"], other["stem/bias"])


def test_base_that_differs_where_the_adapter_brings_its_own_is_the_same_base(saved, network, base):
    other = base | {"bottleneck/0/norm/bias": base["bottleneck/0/norm/bias"] + 1}
    _, expected = peft.load_adapter(saved, base).apply_to(network, base)
    _, params = peft.load_adapter(saved, other).apply_to(network, other)
    assert modeldir.params_hash(params) == modeldir.params_hash(expected)


@pytest.mark.parametrize("deep", [True, False])
def test_heads_of_deep_supervision_may_be_on_one_side_only(tmp_path, network, deep):
    trained_on, used_on = network.clone(deep_supervision=deep), network.clone(deep_supervision=not deep)
    random = np.random.default_rng(8)
    every = {path: random.standard_normal(leaf.shape, np.float32)
             for path, leaf in parameter_shapes(network.clone(deep_supervision=True)).items()}  # fmt: skip
    starts = {net: {path: every[path] for path in parameter_shapes(net)} for net in (trained_on, used_on)}
    method, params = trained(trained_on, starts[trained_on], 4, "lora+head", rank=2)
    peft.save_adapter(tmp_path / "site", method, params, starts[trained_on], INFO)
    model, found = peft.load_adapter(tmp_path / "site", starts[used_on]).apply_to(used_on, starts[used_on])
    assert model.deep_supervision is not deep
    found = flatten(found)
    assert found.keys() == parameter_shapes(model).keys()
    assert all(np.array_equal(found[path], leaf) for path, leaf in params.items() if not path.startswith("out_")
               or path.startswith("out_0/"))  # fmt: skip


def test_adapter_is_refused_by_a_network_it_does_not_fit(saved, network, base):
    adapter = peft.load_adapter(saved, base)
    with pytest.raises(ValueError, match=r"has shape .*, but the adapter .* on this network needs"):
        adapter.apply_to(network.clone(n_channels=8), base)


def truncate(file):
    file.write_bytes(file.read_bytes()[:-9])


def edit(**fields):
    def change(file):
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return change


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("adapter_model.safetensors", truncate, "is damaged or truncated"),
        ("adapter_model.safetensors", lambda file: file.write_bytes(b"\x80\x04pickle"), "is damaged or truncated"),
        ("adapter_config.json", truncate, "is not valid JSON"),
        ("adapter_config.json", lambda file: file.write_bytes(b"\xff\xfe\x00"), "is not valid JSON"),
        ("adapter_config.json", lambda file: file.write_text("[" * 100_000), "is not valid JSON"),
        ("adapter_config.json", edit(options={"lora": {"targets": "(" * 5000}}), "does not describe a method"),
        ("adapter_config.json", lambda file: file.write_text("[1]"), "is not the configuration of a"),
        ("adapter_config.json", edit(format_version=2), "has format version 2, this program reads 1"),
        ("adapter_config.json", edit(tensors_hash=""), "does not have the hash"),
        ("adapter_config.json", edit(base_hash=None), "lacks a proper 'base_hash'"),
        ("adapter_config.json", edit(frozen_hash=1), "lacks a proper 'frozen_hash'"),
        ("adapter_config.json", edit(options={"prefix": {}}), "unknown method 'prefix'"),
        ("adapter_config.json", edit(options={"norm": {"rank": 1}}), "no option 'rank'"),
        ("adapter_config.json", edit(options={}), "does not describe a method"),
    ],
)
def test_damaged_or_foreign_adapter_gives_one_line(saved, base, name, damage, message):
    damage(saved / name)
    with pytest.raises(ValueError, match=message) as raised:
        peft.load_adapter(saved, base)
    assert name in str(raised.value) and "\n" not in str(raised.value)


def test_training_workdir_stands_for_the_adapter_in_it(saved, base):
    saved.rename(saved.parent / "adapter")
    assert peft.load_adapter(saved.parent, base).config["cohort"] == "BraTS-Africa"


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_missing_adapter_file_is_named(saved, base, name):
    (saved / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        peft.load_adapter(saved, base)


def test_failed_save_leaves_the_old_adapter_whole(saved, network, base):
    before = {file.name: file.read_bytes() for file in saved.iterdir()}
    method, params = trained(network, base, seed=2)
    with pytest.raises(ValueError, match="is not plain JSON"):
        peft.save_adapter(saved, method, params, base, INFO, provenance={"object": object()})
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before


def test_adapter_of_the_small_network_is_a_few_hundred_kilobytes(tmp_path):
    network = create_mednext("S", n_classes=3)
    base = {path: np.zeros(leaf.shape, np.float32) for path, leaf in parameter_shapes(network).items()}
    method, params = trained(network, base, 0, "conv_adapter", gamma=4)
    directory = peft.save_adapter(tmp_path / "site", method, params, base, INFO)
    assert sum(file.stat().st_size for file in directory.iterdir()) < 700_000


def test_two_sites_switch_on_one_base_and_give_their_own_logits(tmp_path, network, base, image):
    sites = peft.AdapterSet(network, base)
    expected = {None: attach.compiled(network)({"params": unflatten(base)}, image)}
    for seed, site in enumerate(("lagos", "kano")):
        method, params = trained(network, base, seed)
        model = network.clone(adapters=method.adapters)
        expected[site] = attach.compiled(model)({"params": unflatten(params)}, image)
        sites.add(site, peft.save_adapter(tmp_path / site, method, params, base, INFO))
    assert sites.names == ("lagos", "kano") and sites.active is None
    for site in ("lagos", None, "kano", "lagos"):
        sites.set_active(site)
        assert np.array_equal(sites.apply(image), expected[site])
    with sites.disable_adapters():
        assert np.array_equal(sites.apply(image), expected[None])
    assert np.array_equal(sites.apply(image), expected["lagos"])
    assert not np.allclose(expected["lagos"], expected["kano"], atol=0.1)


def test_merged_directory_is_a_plain_model_with_the_adapted_logits(tmp_path, network, base, image):
    kwargs = {field: getattr(network, field) for field in ("n_channels", "block_counts", "dim", "do_res_up_down")}
    info = dataclasses.replace(INFO, kwargs=kwargs)
    modeldir.save_model(tmp_path / "base", info, base)
    method, params = trained(network, base, 5, "lora+head", rank=2)
    peft.save_adapter(tmp_path / "site", method, params, base, info, "BraTS-Africa")
    peft.merge_directories(tmp_path / "base", tmp_path / "site", tmp_path / "merged")
    merged_info, merged = modeldir.load_model(tmp_path / "merged")
    assert merged_info.provenance["merged"]["cohort"] == "BraTS-Africa"
    assert flatten(merged).keys() == base.keys()
    expected = attach.compiled(network.clone(adapters=method.adapters))({"params": unflatten(params)}, image)
    logits = attach.compiled(network)({"params": merged}, image)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_merging_onto_another_base_or_what_is_not_linear_writes_nothing(tmp_path, network, base):
    kwargs = {field: getattr(network, field) for field in ("n_channels", "block_counts", "dim", "do_res_up_down")}
    info = dataclasses.replace(INFO, kwargs=kwargs)
    modeldir.save_model(tmp_path / "base", info, base)
    method, params = trained(network, base, 5, "conv_adapter")
    peft.save_adapter(tmp_path / "site", method, params, base, info)
    with pytest.raises(ValueError, match="cannot be merged: there is a GELU"):
        peft.merge_directories(tmp_path / "base", tmp_path / "site", tmp_path / "merged")
    peft.save_adapter(tmp_path / "site", method, params, base | {"stem/bias": base["stem/bias"] + 1}, info)
    with pytest.raises(ValueError, match="was trained on the base"):
        peft.merge_directories(tmp_path / "base", tmp_path / "site", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_adapter_set_names_what_is_missing_or_taken(saved, network, base):
    sites = peft.AdapterSet(network, base)
    with pytest.raises(ValueError, match="no adapter is called 'kano'; there are none"):
        sites.set_active("kano")
    sites.add("lagos", saved)
    with pytest.raises(ValueError, match="called 'lagos' is here already"):
        sites.add("lagos", saved)
    sites.set_active("lagos")
    sites.remove("lagos")
    assert sites.active is None and sites.names == ()

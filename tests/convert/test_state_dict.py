"""State dicts of upstream and the original study to our parameters and back."""

import jax.numpy as jnp
import numpy as np
import pytest

from mednext_jax import convert
from mednext_jax.convert.state_dict import convert as convert_with_notes
from mednext_jax.convert.state_dict import expected_shapes
from mednext_jax.nn import paths
from mednext_jax.nn.adapters import Adapter
from tests.golden import reading

NETWORKS = reading.names("net_", "grad_", "adapter_lin", "adapter_par", "adapter_seq")


@pytest.fixture
def state_dict():
    return reading.Golden("net_k3_b1_ds").state_dict


@pytest.mark.parametrize("name", NETWORKS)
def test_round_trip_is_bit_equal_and_infers_the_constructor_arguments(name):
    golden = reading.Golden(name)
    ctor = dict(golden.meta["ctor"])
    known = {key: ctor[key] for key in ("norm_type",) if key in ctor}
    kwargs, params = convert.from_torch(golden.state_dict, **known)
    back = convert.to_torch(kwargs, params)
    assert back.keys() == golden.state_dict.keys()
    for key, array in golden.state_dict.items():
        assert back[key].dtype == array.dtype and back[key].shape == array.shape
        assert back[key].tobytes() == array.tobytes(), key

    adapter = kwargs["adapters"][0] if kwargs["adapters"] else {}
    assert adapter.get("kernel_size") == ctor.pop("adapter_kernel_size", adapter.get("kernel_size"))
    assert adapter.get("ratio") == ctor.pop("adapter_dim_ratio", adapter.get("ratio"))
    assert bool(adapter) == (golden.meta["cls"] != "MedNeXt") and adapter.get("legacy", True)
    for key, value in ctor.items():
        found = list(kwargs[key]) if isinstance(kwargs[key], tuple) else kwargs[key]
        assert found == value, key


def test_parameters_are_float32_under_the_paths_of_the_network(state_dict):
    kwargs, params = convert.from_torch(state_dict)
    flat = paths.flatten(params)
    assert {path: array.shape for path, array in flat.items()} == expected_shapes(kwargs)
    assert {array.dtype for array in flat.values()} == {np.dtype(np.float32)}
    up, down = (state_dict[f"{name}.res_conv.weight"][..., 0, 0, 0] for name in ("up_3", "down_0"))
    np.testing.assert_array_equal(flat["up_3/res_conv/kernel"][0, 0, 0], up)
    np.testing.assert_array_equal(flat["down_0/res_conv/kernel"][0, 0, 0], down.T)
    depthwise = state_dict["up_3.conv1.weight"]
    np.testing.assert_array_equal(flat["up_3/conv1/kernel"][2, 1, 0, 0], depthwise[:, 0, 2, 1, 0])


@pytest.mark.parametrize("name", [
    "stem.weight", "stem.bias", "enc_block_0.0.conv1.weight", "enc_block_0.0.conv2.weight", "enc_block_2.0.norm.weight",
    "bottleneck.0.conv3.bias", "up_1.res_conv.weight", "down_0.conv2.weight", "out_0.conv_out.weight",
    "out_3.conv_out.bias", "dummy_tensor",
])  # fmt: skip
@pytest.mark.parametrize("fault", ["missing", "misshapen", "nan"])
def test_damaged_tensor_is_named(state_dict, name, fault):
    if fault == "missing":
        del state_dict[name]
    elif fault == "misshapen":
        state_dict[name] = np.concatenate([state_dict[name]] * 2)
    else:
        state_dict[name] = np.full_like(state_dict[name], np.nan)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        convert.from_torch(state_dict)


@pytest.mark.parametrize("name", [
    "enc_block_0.0.conv4.weight", "extra", "down_4.conv1.weight", "enc_block_0.1.fc1.weight", "out_5.conv_out.weight",
    "down_0.grn_gamma",
])  # fmt: skip
def test_unexpected_tensor_is_named(state_dict, name):
    state_dict[name] = np.ones((4, 4), np.float32)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        convert.from_torch(state_dict)


def test_integer_tensor_is_named(state_dict):
    state_dict["stem.bias"] = state_dict["stem.bias"].astype(np.int64)
    with pytest.raises(ValueError, match="stem.bias holds int64"):
        convert.from_torch(state_dict)


def test_foreign_state_dict_is_refused():
    with pytest.raises(ValueError, match="missing stem.weight: not the state dict of a MedNeXt"):
        convert.from_torch({"layer1.0.conv1.weight": np.ones((4, 4, 3, 3), np.float32)})


@pytest.mark.parametrize("prefix", ["net.", "module.", "_orig_mod.", "net._orig_mod.", "module._orig_mod."])
def test_wrapper_prefixes_come_off(state_dict, prefix):
    plain = convert.from_torch(state_dict)
    wrapped = convert.from_torch({prefix + name: array for name, array in state_dict.items()})
    assert wrapped[0] == plain[0]
    assert paths.flatten(wrapped[1]).keys() == paths.flatten(plain[1]).keys()


def test_tensors_of_losses_are_left_out_with_a_note(state_dict):
    lightning = {f"net.{name}": array for name, array in state_dict.items()}
    lightning["dice_loss_fn.class_weight"] = np.ones(1, np.float32)
    done = convert_with_notes(lightning)
    assert any("dice_loss_fn.class_weight" in note for note in done.notes)
    state_dict["criterion.weight"] = np.ones(1, np.float32)
    assert any("criterion.weight" in note for note in convert_with_notes(state_dict).notes)


def test_two_networks_in_one_state_dict_are_refused(state_dict):
    both = {f"{prefix}.{name}": array for prefix in ("net", "ema") for name, array in state_dict.items()}
    with pytest.raises(ValueError, match="several networks"):
        convert.from_torch(both)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_precisions_become_float32_with_a_note(state_dict, dtype):
    cast = {name: array.astype(jnp.dtype(dtype)) for name, array in state_dict.items()}
    done = convert_with_notes(cast)
    assert any(dtype in note for note in done.notes)
    back = convert.to_torch(done.kwargs, done.params)
    for name, array in cast.items():  # what a narrow type held, float32 holds
        assert back[name].dtype == np.float32
        np.testing.assert_array_equal(back[name].astype(array.dtype), array)


def test_value_of_the_dummy_tensor_survives_the_round_trip(state_dict):
    state_dict["dummy_tensor"] = np.asarray([0.875], np.float32)
    done = convert_with_notes(state_dict)
    assert done.dummy_tensor == 0.875 and any("dummy_tensor" in note for note in done.notes)
    back = convert.to_torch(done.kwargs, done.params, dummy_tensor=done.dummy_tensor)
    np.testing.assert_array_equal(back["dummy_tensor"], state_dict["dummy_tensor"])


def test_residual_of_the_blocks_is_assumed_aloud_where_nothing_shows_it(state_dict):
    bare = {name: array for name, array in state_dict.items() if "res_conv" not in name}
    done = convert_with_notes(bare)
    assert (done.kwargs["do_res"], done.kwargs["do_res_up_down"]) == (False, False)
    assert any(note.startswith("do_res=False is assumed") for note in done.notes)
    told = convert_with_notes(bare, do_res=True)
    assert told.kwargs["do_res"] and not told.notes
    assert convert.from_torch(state_dict)[0]["do_res"]


def test_unknown_argument_is_refused(state_dict):
    with pytest.raises(ValueError, match="dropout is not an argument"):
        convert.from_torch(state_dict, dropout=0.1)


@pytest.mark.parametrize("file, name", [
    ("adapter_seq_k3_ak3", "enc_block_0.1.fc1.weight"), ("adapter_seq_k3_ak3", "enc_block_0.1.grn_gamma"),
    ("adapter_par_k3", "bottleneck.1.med_adp_conv1.bias"),
    ("adapter_lin", "enc_block_0.adapter_block.med_adp_norm.bias"),
])  # fmt: skip
def test_tensor_of_another_kind_of_adapter_is_named(file, name):
    state_dict = reading.Golden(file).state_dict
    state_dict[name] = np.ones((2, 4), np.float32)
    with pytest.raises(ValueError, match=f"unexpected {name}"):
        convert.from_torch(state_dict)


@pytest.mark.parametrize("file, name", [
    ("adapter_seq_k3_ak3", "bottleneck.1.med_adp_conv1.weight"),
    ("adapter_par_k3", "dec_block_3.mednext_block.1.norm.bias"),
    ("adapter_par_k3", "enc_block_2.adapter_block.med_adp_conv3.weight"),
    ("adapter_lin", "dec_block_0.1.fc2.weight"),
    ("adapter_lin", "enc_block_1.1.fc1.weight"),
])  # fmt: skip
@pytest.mark.parametrize("fault", ["missing", "misshapen"])
def test_damaged_tensor_of_an_adapter_network_is_named(file, name, fault):
    state_dict = reading.Golden(file).state_dict
    array = state_dict.pop(name)
    if fault == "misshapen":
        state_dict[name] = np.concatenate([array] * 2)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        convert.from_torch(state_dict)


def test_linear_adapters_of_no_common_ratio_are_refused():
    state_dict = reading.Golden("adapter_lin").state_dict
    state_dict["bottleneck.1.fc1.weight"] = np.ones((3, 64), np.float32)
    state_dict["bottleneck.1.fc1.bias"] = np.ones(3, np.float32)
    state_dict["bottleneck.1.fc2.weight"] = np.ones((64, 3), np.float32)
    with pytest.raises(ValueError, match=r"bottleneck\.1\.fc1\.weight"):
        convert.from_torch(state_dict)


@pytest.mark.parametrize("adapter", [
    {"kind": "conv", "target": ".*_block_[0-3]|bottleneck"},
    {"kind": "block", "target": ".*_block_[0-3]|bottleneck"},
    Adapter("block", "bottleneck", legacy=True),
])  # fmt: skip
def test_adapters_that_only_exist_here_cannot_be_exported(state_dict, adapter):
    kwargs, _ = convert.from_torch(state_dict)
    kwargs["adapters"] = (adapter,)
    params = {path: np.zeros(shape, np.float32) for path, shape in expected_shapes(kwargs).items()}
    with pytest.raises(ValueError, match="merge it, or export the base"):
        convert.to_torch(kwargs, params)


def test_adapters_may_be_given_with_their_defaults_left_out():
    golden = reading.Golden("adapter_seq_2d_ak5")
    kwargs, params = convert.from_torch(golden.state_dict)
    short = {"kind": "block", "target": kwargs["adapters"][0]["target"], "kernel_size": 5, "legacy": True}
    for adapters in (short, Adapter(**short)):
        back = convert.to_torch({**kwargs, "adapters": (adapters,)}, params)
        assert back.keys() == golden.state_dict.keys()


def test_export_names_a_parameter_that_does_not_fit(state_dict):
    kwargs, params = convert.from_torch(state_dict)
    del params["stem"]["bias"]
    with pytest.raises(ValueError, match="missing stem/bias"):
        convert.to_torch(kwargs, params)


def test_single_block_refuses_a_foreign_tensor():
    with pytest.raises(ValueError, match="unexpected conv9.weight"):
        convert.module_from_torch({"conv9.weight": np.ones((2, 2, 1, 1, 1))}, "block")

"""MONAI's MedNeXt converts to the same function, narrow down blocks and missing response norms included."""

import numpy as np
import pytest

from mednext_jax import convert
from mednext_jax.convert.state_dict import convert as convert_with_notes
from mednext_jax.nn import paths
from mednext_jax.nn.mednext import MedNeXt
from tests.golden import reading

# Upstream's names where MONAI has others.
RENAMED = {
    **{f"enc_block_{i}.": f"enc_stages.{i}." for i in range(4)},
    **{f"down_{i}.": f"down_blocks.{i}." for i in range(4)},
    **{f"dec_block_{i}.": f"dec_stages.{3 - i}." for i in range(4)},
    **{f"up_{i}.": f"up_blocks.{3 - i}." for i in range(4)},
    **{f"out_{i}.": f"out_blocks.{4 - i}." for i in range(1, 5)},
}


def as_monai(state_dict):
    """Upstream's tensors under MONAI's names."""
    found = {}
    for name, array in state_dict.items():
        prefix = next((prefix for prefix in RENAMED if name.startswith(prefix)), "")
        found[RENAMED.get(prefix, "") + name[len(prefix):].replace("grn_", "global_resp_")] = array
    del found["dummy_tensor"]
    return found


@pytest.mark.parametrize("name", ["monai_b_2d_ds", "monai_b_2d_grn"])
def test_golden_monai_network_with_wider_stages_converts_to_the_same_function(name):
    golden = reading.Golden(name)
    done = convert_with_notes(golden.state_dict)
    assert done.kwargs["exp_r"] == (2, 3, 4, 4, 4, 4, 4, 3, 2) and done.kwargs["do_res"]
    assert any("widened with zeros" in note and "down_0" in note for note in done.notes)
    model = MedNeXt(**done.kwargs)
    golden.assert_outputs(reading.run(lambda p, x: model.apply({"params": p}, x), done.params, golden.input))


def test_monai_names_of_a_network_with_one_ratio_give_the_same_parameters_as_upstreams():
    upstream = reading.Golden("net_k3_b1_ds").state_dict
    kwargs, params = convert.from_torch(upstream)
    monai_kwargs, monai_params = convert.from_torch({f"net.{k}": v for k, v in as_monai(upstream).items()})
    assert monai_kwargs == kwargs
    flat = paths.flatten(params)
    for path, array in paths.flatten(monai_params).items():
        np.testing.assert_array_equal(array, flat[path], err_msg=path)


@pytest.mark.parametrize("name, theirs", [
    ("down_2.conv2.weight", "down_2.conv2.weight"), ("dec_block_0.0.norm.bias", "dec_block_0.0.norm.bias"),
    ("bottleneck.0.conv2.weight", "bottleneck.0.conv2.weight"), ("stem.weight", "stem.weight"),
])  # fmt: skip
def test_missing_monai_tensor_is_named(name, theirs):
    state_dict = reading.Golden("net_k3_b1_ds").state_dict
    del state_dict[name]
    with pytest.raises(ValueError, match=theirs.replace(".", r"\.")):
        convert.from_torch(as_monai(state_dict))


def test_monai_network_of_another_depth_is_refused():
    state_dict = as_monai(reading.Golden("net_k3_b1").state_dict)
    state_dict["enc_stages.4.0.conv1.weight"] = np.ones((64, 1, 3, 3, 3), np.float32)
    with pytest.raises(ValueError, match="more than four down-samplings"):
        convert.from_torch(state_dict)


def test_monai_down_block_wider_than_its_stage_is_refused():
    state_dict = as_monai(reading.Golden("net_k3_b1").state_dict)
    state_dict["down_blocks.0.conv2.weight"] = np.ones((32, 4, 1, 1, 1), np.float32)
    with pytest.raises(ValueError, match="down_0.conv2.weight expands by more"):
        convert.from_torch(state_dict)

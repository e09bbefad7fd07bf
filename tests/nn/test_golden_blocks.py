"""Single blocks, down and up blocks and heads equal upstream's, in 2-D and 3-D."""

import numpy as np
import pytest

from mednext_jax.convert import module_from_torch
from mednext_jax.nn import blocks
from tests.golden import reading

KINDS = {
    "MedNeXtBlock": ("block", blocks.MedNeXtBlock),
    "PrefixedMedNeXtBlock": ("block", blocks.MedNeXtBlock),
    "MedNeXtDownBlock": ("down", blocks.MedNeXtDownBlock),
    "MedNeXtUpBlock": ("up", blocks.MedNeXtUpBlock),
    "OutBlock": ("out", blocks.OutBlock),
}
FILES = reading.names("block_", "down_", "up_", "outblock", "adapter_block")


def build(golden: reading.Golden):
    """The module of a golden file and its parameters."""
    kind, module = KINDS[golden.meta["cls"]]
    arguments = {key: value for key, value in golden.meta["ctor"].items() if key != "in_channels"}
    if kind == "out":
        del arguments["dim"]
    return module(**arguments), module_from_torch(golden.state_dict, kind)


@pytest.mark.parametrize("name", FILES)
def test_golden_block_output_matches_upstream(name):
    golden = reading.Golden(name)
    module, params = build(golden)
    golden.assert_outputs(reading.run(lambda p, x: module.apply({"params": p}, x), params, golden.input))


@pytest.mark.parametrize("name", ["up_k3_res_odd", "up_k5_nores_even"])
def test_golden_up_block_begins_with_a_plane_of_zeros_along_every_axis(name):
    golden = reading.Golden(name)
    module, params = build(golden)
    ours = reading.channels_first(reading.run(lambda p, x: module.apply({"params": p}, x), params, golden.input))
    for array in (golden.outputs[0], ours):
        for axis in range(2, array.ndim):
            assert not np.take(array, 0, axis).any()

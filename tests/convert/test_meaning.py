"""Channels and classes in another order are the same network permuted."""

import numpy as np
import pytest

from mednext_jax.convert import meaning

FLAT = {
    "stem/kernel": np.arange(8.0).reshape(1, 1, 1, 4, 2),
    "stem/bias": np.arange(2.0),
    "out_0/conv_out/kernel": np.arange(6.0).reshape(1, 1, 1, 2, 3),
    "out_2/conv_out/bias": np.arange(3.0),
    "enc_block_0/0/conv2/kernel": np.arange(8.0).reshape(1, 1, 1, 2, 4),
}


def test_reordered_inputs_see_each_scan_with_its_own_weights():
    found = meaning.reorder_inputs(FLAT, ["flair", "t1", "t1ce", "t2"], ["t1", "t1ce", "t2", "flair"])
    x = np.asarray([1.0, 10.0, 100.0, 1000.0])  # flair, t1, t1ce, t2
    before = x @ FLAT["stem/kernel"][0, 0, 0]
    np.testing.assert_array_equal(x[[1, 2, 3, 0]] @ found["stem/kernel"][0, 0, 0], before)
    for path in FLAT.keys() - {"stem/kernel"}:
        np.testing.assert_array_equal(found[path], FLAT[path])


def test_reordered_outputs_move_kernel_and_bias_of_every_head():
    found = meaning.reorder_outputs(FLAT, ["TC", "WT", "ET"], ["WT", "TC", "ET"])
    np.testing.assert_array_equal(found["out_2/conv_out/bias"], [1, 0, 2])
    np.testing.assert_array_equal(found["out_0/conv_out/kernel"][0, 0, 0], [[1, 0, 2], [4, 3, 5]])
    back = meaning.reorder_outputs(found, ["WT", "TC", "ET"], ["TC", "WT", "ET"])
    for path, array in FLAT.items():
        np.testing.assert_array_equal(back[path], array)


@pytest.mark.parametrize("have", [["t1", "t2"], ["t1", "t1", "t2", "flair"], ["t1", "t2", "flair", "dwi"]])
def test_channels_that_are_no_permutation_are_refused(have):
    with pytest.raises(ValueError, match="in any order"):
        meaning.reorder_inputs(FLAT, have, ["t1", "t1ce", "t2", "flair"])


def test_wrong_number_of_names_is_refused_with_the_tensor():
    with pytest.raises(ValueError, match="2 channels are named, but stem/kernel has 4"):
        meaning.reorder_inputs(FLAT, ["t1", "t2"], ["t2", "t1"])

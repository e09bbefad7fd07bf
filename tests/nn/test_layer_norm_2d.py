"""Layer norm works in two dimensions, where upstream's cannot serve as reference."""

import jax
import numpy as np

from mednext_jax.nn.blocks import MedNeXtBlock


def test_layer_norm_in_two_dimensions_is_that_of_a_volume_one_voxel_deep():
    fields = {"out_channels": 3, "exp_r": 2, "kernel_size": 3, "norm_type": "layer"}
    flat, deep = MedNeXtBlock(**fields, dim="2d"), MedNeXtBlock(**fields)
    x = jax.random.normal(jax.random.key(0), (2, 5, 7, 3))
    params = flat.init(jax.random.key(1), x)["params"]
    volume = {**params}
    for name in ("conv2", "conv3"):
        volume[name] = {**params[name], "kernel": params[name]["kernel"][None]}
    # Of a kernel of depth three, only the middle sees a volume that is one voxel deep.
    kernel = np.zeros((3, *params["conv1"]["kernel"].shape), np.float32)
    kernel[1] = params["conv1"]["kernel"]
    volume["conv1"] = {**params["conv1"], "kernel": kernel}
    expected = deep.apply({"params": volume}, x[:, None])[:, 0]
    np.testing.assert_allclose(flat.apply({"params": params}, x), expected, rtol=0, atol=1e-6)

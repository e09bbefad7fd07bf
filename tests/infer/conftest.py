"""Tiny models for the tests of inference."""

import numpy as np
import pytest

from mednext_jax.modeldir import ModelInfo
from mednext_jax.nn import paths
from mednext_jax.nn.mednext import parameter_shapes

TINY = {"in_channels": 4, "n_channels": 2, "n_classes": 3, "exp_r": 1, "block_counts": (1,) * 9}


@pytest.fixture(scope="session")
def make_model():
    """``make_model(seed, **changes of ModelInfo) -> (info, params)`` with random parameters."""

    def make(seed=0, **changes):
        info = ModelInfo(**{
            "kwargs": TINY, "channels": ("t1n", "t1c", "t2w", "t2f"), "normalization": "zscore_brain",
            "output": "regions", "label_scheme": "brats2023", "patch_voxels": (16, 32, 16),
            "regions": {"WT": [1, 2, 3], "TC": [1, 3], "ET": [3]}, **changes,
        })  # fmt: skip
        rng = np.random.default_rng(seed)
        shapes = parameter_shapes(info.network())
        flat = {path: rng.normal(0, 0.5, leaf.shape).astype(np.float32) for path, leaf in shapes.items()}
        return info, paths.unflatten(flat)

    return make

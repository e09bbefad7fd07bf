"""Exact parameter counts of every variant, with and without deep supervision and the original study's adapters.

The numbers are those of the PyTorch networks less one: ``dummy_tensor``, which we do not have. A variant without a
row fails. Nothing is computed: ``jax.eval_shape``.
"""

import jax.numpy as jnp
import pytest

from mednext_jax.convert.infer_kwargs import ALL_STAGES
from mednext_jax.nn import layers
from mednext_jax.nn.mednext import VARIANTS, count_parameters, create_mednext, parameter_shapes

DUMMY = 1  # upstream counts its dummy_tensor
KERNELS = (3, 5)
# (variant, kernel size): 4 channels in and 4 classes, the same with deep supervision, 1 channel in and 14 classes
COUNTS = {
    ("S", 3): (5_551_077, 5_554_933, 5_551_311),
    ("S", 5): (5_980_709, 5_984_565, 5_980_943),
    ("B", 3): (10_526_469, 10_530_325, 10_526_703),
    ("B", 5): (10_956_101, 10_959_957, 10_956_335),
    ("M", 3): (17_549_125, 17_552_981, 17_549_359),
    ("M", 5): (18_260_997, 18_264_853, 18_261_231),
    ("L", 3): (61_779_429, 61_783_285, 61_779_663),
    ("L", 5): (62_993_061, 62_996_917, 62_993_295),
}
# The study's adapters, without the network: a block of kernel 3 or 5 per stage, or the linear one of ratio 0.25.
BLOCKS = {"S": (1_793_472, 1_937_728), "B": (3_516_480, 3_660_736), "M": (3_516_480, 3_660_736),
          "L": (6_950_144, 7_094_400)}  # fmt: skip
LINEAR = 219_952
ADAPTERS = {
    "seq_ak3": ({"kind": "block", "kernel_size": 3}, lambda variant, kernel: BLOCKS[variant][0]),
    "seq_ak5": ({"kind": "block", "kernel_size": 5}, lambda variant, kernel: BLOCKS[variant][1]),
    "par": ({"kind": "block", "placement": "parallel"}, lambda variant, kernel: BLOCKS[variant][kernel == 5]),
    "linear_r0.25": ({"kind": "linear", "ratio": 0.25}, lambda variant, kernel: LINEAR),
}


@pytest.fixture(autouse=True)
def shapes_alone(monkeypatch):
    """Counting needs shapes: tracing every initialiser takes a while."""

    def zeros(fan_in):
        return lambda key, shape, dtype=jnp.float32: jnp.zeros(shape, dtype)

    monkeypatch.setattr(layers, "torch_uniform", zeros)


def count(variant, kernel_size, n_classes=4, **changes):
    return count_parameters(parameter_shapes(create_mednext(variant, n_classes, kernel_size, **changes)))


def test_every_variant_has_a_row():
    assert {(variant, kernel) for variant in VARIANTS for kernel in KERNELS} == COUNTS.keys()
    assert VARIANTS.keys() == BLOCKS.keys()


@pytest.mark.parametrize("variant, kernel", COUNTS)
def test_parameter_count_matches_the_table(variant, kernel):
    plain, supervised, abdominal = COUNTS[variant, kernel]
    assert count(variant, kernel) == plain - DUMMY
    assert count(variant, kernel, deep_supervision=True) == supervised - DUMMY
    assert count(variant, kernel, n_classes=14, in_channels=1) == abdominal - DUMMY


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("variant, kernel", COUNTS)
def test_parameter_count_with_adapters_matches_the_table(variant, kernel, adapter):
    fields, added = ADAPTERS[adapter]
    total = count(variant, kernel, adapters=({**fields, "target": ALL_STAGES, "legacy": True},))
    assert total == COUNTS[variant, kernel][0] - DUMMY + added(variant, kernel)

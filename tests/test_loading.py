"""Parameters move into another network with a report of every tensor, and nothing is left out silently."""

import jax
import numpy as np
import pytest

from mednext_jax import convert, loading
from mednext_jax.nn import paths
from mednext_jax.nn.mednext import MedNeXt, parameter_shapes
from tests.golden import reading


@pytest.fixture(scope="module")
def base():
    """Arguments and flat parameters of a network with deep supervision."""
    kwargs, params = convert.from_torch(reading.Golden("net_k3_b1_ds").state_dict)
    return kwargs, paths.flatten(params)


def shapes(kwargs, **changes):
    return parameter_shapes(MedNeXt(**{**kwargs, **changes}))


def test_base_checkpoint_loads_into_an_adapter_network(base):
    kwargs, source = base
    target = shapes(kwargs, adapters=({"kind": "block", "target": "enc_block_[0-3]|bottleneck"},))
    loaded, report = loading.merge(target, source, allow_new=[r".*/adapter/.*"])
    assert set(loaded) == set(source) == set(report.matched)
    assert set(report.new) == {path for path in target if "/adapter/" in path} and len(report.new) == 5 * 8
    assert report.lines()[0] == f"matched {len(source)} tensors"
    assert report.lines()[1].startswith("new 40: bottleneck/adapter/conv1/bias, ")
    assert report.lines()[1].endswith(", and 34 more")


def test_checkpoint_with_deep_supervision_loads_into_a_network_without(base):
    kwargs, source = base
    loaded, report = loading.merge(shapes(kwargs, deep_supervision=False), source, allow_dropped=[r"out_[1-4]/.*"])
    assert len(report.dropped) == 8 and not report.new
    assert str(report).splitlines()[1].startswith("dropped 8: out_1/conv_out/bias, out_1/conv_out/kernel, ")
    for path, array in loaded.items():
        np.testing.assert_array_equal(array, source[path])


def test_head_with_other_classes_is_replaced_when_allowed(base):
    kwargs, source = base
    target = shapes(kwargs, n_classes=3)
    with pytest.raises(ValueError, match=r"out_0/conv_out/bias has shape \(4,\) in the file, the network needs \(3,\)"):
        loading.merge(target, source)
    loaded, report = loading.merge(target, source, allow_replaced=[r"out_\d/.*"])
    assert len(report.replaced) == 10 and not any(path.startswith("out_") for path in loaded)


def test_kernels_grow_only_when_asked(base):
    kwargs, source = base
    target = shapes(kwargs, kernel_size=5)
    with pytest.raises(ValueError, match="conv1/kernel has shape"):
        loading.merge(target, source)
    loaded, report = loading.merge(target, source, grow_kernels=True)
    assert set(report.grown) == {path for path in target if path.endswith("conv1/kernel")}
    assert {path: array.shape for path, array in loaded.items()} == {path: leaf.shape for path, leaf in target.items()}


@pytest.mark.parametrize("change, message", [
    ({"enc_block_0/0/conv9/kernel": np.zeros(1)}, "the file holds enc_block_0/0/conv9/kernel"),
    ({"stem/bias": None}, "the file lacks stem/bias"),
])  # fmt: skip
def test_left_over_and_missing_tensors_are_named(base, change, message):
    kwargs, source = base
    source = {path: array for path, array in {**source, **change}.items() if array is not None}
    with pytest.raises(ValueError, match=message):
        loading.merge(shapes(kwargs), source)


def test_tensors_come_in_the_dtype_of_the_network(base):
    kwargs, source = base
    half = {path: array.astype(np.float16) for path, array in source.items()}
    loaded, report = loading.merge(shapes(kwargs), half)
    assert {array.dtype for array in loaded.values()} == {np.dtype(np.float32)}
    assert set(report.cast) == set(source)


def test_nothing_in_common_is_an_error():
    with pytest.raises(ValueError, match="another architecture"):
        loading.merge({"a": jax.ShapeDtypeStruct((1,), np.float32)}, {"b": np.zeros(1)}, [".*"], [".*"])

"""Merging: a plain network with the adapted one's logits, or a reason why there is none."""

import jax
import numpy as np
import pytest

from mednext_jax import peft
from mednext_jax.nn import depthwise
from mednext_jax.nn.adapters import Adapter
from mednext_jax.nn.mednext import parameter_shapes
from mednext_jax.nn.paths import flatten
from mednext_jax.peft import merging


def perturbed(params, rule, seed=1):
    """Parameters whose trained leaves are random, as after training."""
    random = np.random.default_rng(seed)
    trainable, frozen = peft.split(params, rule)
    moved = {path: np.asarray(leaf) + 0.2 * random.standard_normal(leaf.shape).astype(np.float32)
             for path, leaf in sorted(trainable.items())}  # fmt: skip
    return {**frozen, **moved}


@pytest.fixture(scope="module")
def linear(network, base):
    """Every linear addition at once, trained."""
    method = peft.compose(
        peft.create("lora", rank=2, layers="conv1,conv2,conv3,stem,conv_out"),
        peft.create("ssf"),
        peft.create("depthwise_adapter"),
    )
    model, params = method.apply_to(network, base, jax.random.key(2))
    return method, model, perturbed(params, method.rule)


def test_linear_adapters_merge_into_a_plain_network_and_come_out_again(linear, network, base):
    method, model, params = linear
    plain, merged = peft.merge(model, params)  # proves itself
    assert plain == network
    merged = flatten(merged)
    assert merged.keys() == base.keys()
    assert not np.allclose(merged["bottleneck/0/conv1/kernel"], base["bottleneck/0/conv1/kernel"], atol=0.1)
    trained, _ = peft.split(params, method.rule)
    again = flatten(peft.unmerge(merged, trained, method.adapters))
    assert again.keys() == base.keys()
    for path, leaf in base.items():
        np.testing.assert_allclose(again[path], leaf, rtol=1e-4, atol=1e-4, err_msg=path)


def test_linear_adapters_merge_in_space_and_at_shortcuts(network_in_space, base_in_space):
    method = peft.compose(
        peft.create("lora", rank=1, layers="conv1,conv3,res_conv"),
        peft.create("ssf"),
        peft.create("depthwise_adapter"),
    )
    model, params = method.apply_to(network_in_space, base_in_space, jax.random.key(2))
    plain, merged = peft.merge(model, perturbed(params, method.rule))  # proves itself
    assert plain == network_in_space and flatten(merged).keys() == base_in_space.keys()
    moved = np.abs(merged["down_0"]["res_conv"]["kernel"] - base_in_space["down_0/res_conv/kernel"])
    assert moved.max() > 0.1


def test_merge_refuses_a_result_that_computes_something_else(linear, monkeypatch):
    _, model, params = linear
    monkeypatch.setitem(merging._FOLDS, "ssf", lambda flat, spec, inverse: {
        path: leaf for path, leaf in flat.items() if "ssf" not in path})  # fmt: skip
    with pytest.raises(ValueError, match="logits differ from the adapted one's by .* keep the adapter"):
        peft.merge(model, params)


def test_lora_changes_a_kernel_by_its_scaled_product():
    flat = {"up_0/conv2/kernel": np.ones((1, 1, 2, 3)), "up_0/conv2/lora_a": np.array([[1.0], [2.0]]),
            "up_0/conv2/lora_b": np.array([[1.0, 0.0, -1.0]])}  # fmt: skip
    merged = merging.fold(flat, (Adapter("lora", ".*conv2", rank=1, alpha=3.0),))
    assert merged.keys() == {"up_0/conv2/kernel"}
    assert merged["up_0/conv2/kernel"][0, 0].tolist() == [[1 + 3 * 1, 1, 1 - 3 * 1], [1 + 3 * 2, 1, 1 - 3 * 2]]


def test_smaller_depthwise_branch_merges_by_padding():
    random = np.random.default_rng(0)
    x, large, small = (random.standard_normal(shape).astype(np.float32)
                       for shape in [(1, 5, 6, 7, 3), (5, 5, 5, 1, 3), (3, 3, 3, 1, 3)])  # fmt: skip
    merged = merging.fold({"down_0/conv1/kernel": large, "down_0/conv1/branch": small},
                          (Adapter("depthwise", "down_0/conv1"),))  # fmt: skip
    apart = depthwise.depthwise_conv(x, large, 2) + depthwise.depthwise_conv(x, small, 2)
    together = depthwise.depthwise_conv(x, merged["down_0/conv1/kernel"], 2)
    np.testing.assert_allclose(together, apart, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("conv_adapter", {"gamma": 2}, "there is a GELU between its layers"),
        ("linear_adapter", {}, "there is a ReLU between its layers"),
        ("paper_parallel", {}, "there is a norm and a GELU between its layers"),
        ("lora+conv_adapter", {"gamma": 2}, "there is a GELU between its layers"),
        ("ssf", {"scope": "block"}, "it also scales the block's residual"),
        ("depthwise_adapter", {"kernel_size": 5}, "has kernel size 5, larger than the 3"),
    ],
)
def test_merge_says_why_when_an_adapter_is_not_linear_or_does_not_fit(network, name, options, reason):
    model = network.clone(adapters=peft.create(name, **options).adapters)
    params = {path: np.ones(leaf.shape, np.float32) for path, leaf in parameter_shapes(model).items()}
    with pytest.raises(ValueError, match=reason) as raised:
        peft.merge(model, params)
    assert "\n" not in str(raised.value)


def test_a_network_without_adapters_merges_into_itself(network, base):
    plain, params = peft.merge(network, base)
    assert plain is network and flatten(params).keys() == base.keys()

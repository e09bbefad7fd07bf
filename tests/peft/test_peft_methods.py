"""The registry of methods: parameter counts, options, composition. Nothing is computed here, only shapes."""

import functools
import re

import numpy as np
import pytest

from mednext_jax import peft
from mednext_jax.nn.mednext import count_parameters, create_mednext, parameter_shapes
from mednext_jax.peft import rules

RESAMPLERS = [f"{way}_{level}" for way in ("down", "up") for level in range(4)]

# Counted on the original's MedNeXt-S (kernel 3, four channels in, four classes).
COUNTS = [
    ("full", {}, 5_551_076),
    ("head", {}, 132),
    ("norm", {}, 8_768),
    ("bias", {}, 23_396),
    ("norm_bias_head", {}, 27_908),
    ("depthwise", {}, 122_752),
    ("decoder", {}, 728_132),
    ("decoder", {"up": True}, 1_978_372),
    ("last_stages", {"n_stages": 4}, 1_978_372),
    ("last_stages", {"n_stages": 1}, 16_448 + 10_304 + 132),
    ("ssf", {}, 46_792),
    ("ssf", {"scope": "block"}, 5_888),
    ("lora", {"rank": 2}, 52_608),
    ("lora", {"rank": 4}, 105_216),
    ("lora", {}, 210_432),
    ("lora", {"rank": 16}, 420_864),
    ("depthwise_adapter", {}, 27 * 4_384),
    ("conv_adapter", {"gamma": 16}, 70_044),
    ("conv_adapter", {"gamma": 8}, 97_400),
    ("conv_adapter", {}, 152_112),
    ("conv_adapter", {"scale": False}, 152_112 - 1_472),
    ("conv_adapter", {"gamma": 2}, 261_536),
    ("conv_adapter", {"gamma": 16, "scope": "block"}, 140_088),
    ("conv_adapter", {"gamma": 8, "scope": "block"}, 194_800),
    ("conv_adapter", {"scope": "block", "position": "convolution"}, 304_224),
    ("conv_adapter", {"gamma": 2, "scope": "block"}, 523_072),
    ("conv_adapter", {"kernel_size": 5}, 152_112 + (5**3 - 3**3) * 1_472),
    ("linear_adapter", {}, 219_952),
    ("paper_sequential", {}, 1_793_472),
    ("paper_parallel", {"legacy": True}, 1_793_472),
    ("full+head", {"targets": "stem"}, 292),
    ("lora+norm", {}, 210_432 + 8_768),
    ("conv_adapter+linear_adapter+head", {}, 152_112 + 219_952 + 132),
]


@functools.cache
def adapted_shapes(adapters=()):
    return parameter_shapes(create_mednext("S", n_classes=4).clone(adapters=adapters))


@pytest.mark.parametrize(("name", "options", "expected"), COUNTS)
def test_method_trains_the_counted_parameters(name, options, expected):
    method = peft.create(name, **options)
    shapes = adapted_shapes(method.adapters)
    trainable, _ = peft.split(shapes, method.rule)
    assert count_parameters(trainable) == expected
    assert trainable.keys() >= shapes.keys() - adapted_shapes().keys()


def test_every_method_is_counted():
    assert {name for name, _, _ in COUNTS} >= peft.METHODS.keys()


def test_summary_prints_the_familiar_line_and_every_stage():
    method = peft.create("conv_adapter")
    first, header, *rows = peft.summary(adapted_shapes(method.adapters), method.rule).splitlines()
    assert first == "trainable params: 152,112 || all params: 5,703,188 || trainable%: 2.6671"
    assert header.split() == ["stage", "parameters", "trained", "%", "kinds"]
    assert len(rows) == 1 + 9 + 8 + 1
    assert rows[1].split() == ["enc_block_0", "11,496", "1,192", "10.37", "adapter"]


@pytest.mark.parametrize("name", ["conv_adapter", "linear_adapter", "ssf", "lora", "bias", "full"])
def test_methods_reach_stem_resampling_blocks_and_head_by_targets(name):
    method = peft.create(name, targets="stem,down,up,head")
    trainable, _ = peft.split(adapted_shapes(method.adapters), method.rule)
    assert {rules.stage_of(path) for path in trainable} == {"stem", "out_0", *RESAMPLERS}


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("norm", {"norm/scale", "norm/bias"}),
        ("depthwise", {"conv1/kernel", "conv1/bias"}),
        ("depthwise_adapter", {"conv1/branch"}),
        ("paper_sequential", {f"adapter/{layer}/{leaf}" for layer, leaves in [
            ("conv1", ("kernel", "bias")), ("norm", ("scale", "bias")), ("conv2", ("kernel", "bias")),
            ("conv3", ("kernel", "bias"))] for leaf in leaves}),
    ],
)  # fmt: skip
def test_methods_without_a_place_at_stem_and_head_reach_resampling_blocks(name, places):
    method = peft.create(name, targets="down,up")
    trainable, _ = peft.split(adapted_shapes(method.adapters), method.rule)
    assert trainable.keys() == {f"{block}/{place}" for block in RESAMPLERS for place in places}


def test_lora_reaches_depthwise_kernels_as_taps_times_channels():
    method = peft.create("lora", rank=2, layers="conv1", targets="enc_block_1/0")
    trainable, _ = peft.split(adapted_shapes(method.adapters), method.rule)
    assert {path: leaf.shape for path, leaf in trainable.items()} == {
        "enc_block_1/0/conv1/lora_a": (27, 2), "enc_block_1/0/conv1/lora_b": (2, 64)}  # fmt: skip


def test_selecting_methods_are_confined_by_targets():
    trainable, _ = peft.split(adapted_shapes(), peft.create("norm", targets="encoder").rule)
    assert len(trainable) == 2 * 8 and all(path.startswith("enc_block_") for path in trainable)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lora", {"gamma": 4}, "method 'lora' has no option 'gamma'; it takes rank, alpha, layers, targets"),
        ("head", {"rank": 4}, "method 'head' has no option 'rank'; it takes no options"),
        ("prefix", {}, "unknown method 'prefix'; the methods are full, head"),
        ("lora", {"rank": 0}, "rank must be a whole number of at least 1, got 0"),
        ("lora", {"alpha": -1.0}, "alpha must be a number above 0"),
        ("lora", {"alpha": float("nan")}, "alpha must be a number above 0"),
        ("lora", {"layers": "conv4"}, "layers must be one of conv1, conv2"),
        ("conv_adapter", {"kernel_size": 4}, "kernel_size must be odd"),
        ("conv_adapter", {"placement": "beside"}, "placement must be one of parallel, sequential, got 'beside'"),
        ("conv_adapter", {"position": "convolution"}, "it needs scope='block'"),
        ("last_stages", {"n_stages": 5}, "n_stages must be one of 1, 2, 3, 4"),
        ("ssf", {"scope": "stage"}, "scope must be one of layer, block"),
        ("linear_adapter", {"ratio": 0.0}, "ratio must be above 0"),
        ("norm", {"targets": "enc_block_(0"}, "is not a regular expression"),
        ("norm", {"targets": ""}, "targets is empty"),
        ("norm", {"targets": "stages,,up"}, "targets is empty, or has an empty place"),
        ("norm+norm", {}, "a method can appear once"),
    ],
)
def test_create_refuses_what_does_not_exist_or_fit(name, options, message):
    with pytest.raises(ValueError, match=message) as raised:
        peft.create(name, **options)
    assert "\n" not in str(raised.value)


def test_options_that_are_none_keep_their_defaults():
    assert peft.create("lora", rank=None, alpha=2.0).options["lora"]["rank"] == peft.options_of("lora")["rank"]
    method = peft.from_config({"method": "conv_adapter", "gamma": 8, "rank": None, "targets": None})
    assert method == peft.create("conv_adapter", gamma=8)


def test_three_adapters_around_one_module_have_names_of_their_own():
    method = peft.create("conv_adapter+paper_sequential+paper_parallel")
    assert len({spec.name for spec in method.adapters}) == 3
    trainable, _ = peft.split(method.shapes_on(create_mednext("S", n_classes=4)), method.rule)
    assert count_parameters(trainable) == 152_112 + 2 * 1_793_472


def test_composition_gives_each_part_its_options():
    method = peft.compose(peft.create("lora", rank=2, targets="decoder"), peft.create("norm", targets="encoder"))
    assert method.name == "lora+norm"
    trainable, _ = peft.split(adapted_shapes(method.adapters), method.rule)
    assert {path.split("_")[0] for path in trainable} == {"dec", "enc"}
    assert peft.create("lora+norm", rank=2).options["lora"]["rank"] == 2


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("conv_adapter", {"gamma": 3}, "gamma 3 does not divide"),
        ("conv_adapter", {"targets": "enc_block_7"}, "targets 'enc_block_7' matches nothing in this network; name"),
        ("norm", {"targets": "decoder,nowhere"}, "targets 'nowhere' matches nothing"),
        ("lora", {"targets": "down", "layers": "stem"}, "matches no layer"),
        ("lora", {"layers": "res_conv"}, "lora with layers='res_conv' matches no layer of the network"),
        ("norm", {"targets": "stem"}, "norm with targets='stem' matches none of the network's"),
        ("depthwise_adapter", {"targets": "stem"}, "depthwise_adapter with targets='stem' matches no layer"),
        ("norm+depthwise", {"targets": "stem,head"}, "norm with targets='stem,head' matches none of the network's"),
        ("linear_adapter", {"targets": "down", "placement": "parallel"}, "cannot change the shape"),
    ],
)
def test_apply_to_refuses_a_method_that_does_not_fit_the_network(network, base, name, options, message):
    with pytest.raises(ValueError, match=f"method '{re.escape(name)}': .*{message}") as raised:
        peft.create(name, **options).apply_to(network, base, None)
    assert "(?" not in str(raised.value) and "\n" not in str(raised.value)


def test_apply_to_refuses_foreign_parameters_and_adapted_networks(network, base):
    method = peft.create("norm")
    with pytest.raises(ValueError, match="the parameters lack bottleneck/0/conv1/bias"):
        method.apply_to(network, {k: v for k, v in base.items() if k != "bottleneck/0/conv1/bias"}, None)
    with pytest.raises(ValueError, match=r"stem/bias has shape \(5,\), but the network needs \(4,\)"):
        method.apply_to(network, base | {"stem/bias": np.zeros(5)}, None)
    with pytest.raises(ValueError, match="the network has adapters already"):
        method.apply_to(network.clone(adapters=peft.create("ssf").adapters), base, None)

"""Rules over paths: what they train, and that they fail loudly."""

import numpy as np
import pytest

from mednext_jax import peft
from mednext_jax.nn.mednext import create_mednext, parameter_shapes
from mednext_jax.nn.paths import unflatten
from mednext_jax.peft import rules, targets


@pytest.fixture(scope="module")
def paths():
    return parameter_shapes(create_mednext("S", n_classes=4, deep_supervision=True, grn=True))


def test_every_path_of_the_network_has_a_kind_and_a_place(paths):
    kinds = {rules.kind_of(path) for path in paths}
    assert kinds == {"stem", "depthwise", "norm", "pointwise", "shortcut", "grn", "head"}
    assert rules.stages(paths)[:3] == ["stem", "enc_block_0", "down_0"]
    assert rules.stages(paths)[-3:] == ["up_0", "dec_block_0", "out_0"]


@pytest.mark.parametrize("path", ["enc_block_0/adapter/norm/scale", "up_0/conv1/branch", "stem/lora_a",
                                  "enc_block_0/0/ssf_scale", "bottleneck/adapter_linear/fc1/bias"])  # fmt: skip
def test_added_parameters_are_of_the_adapter_kind(path):
    assert rules.kind_of(path) == "adapter"


def test_split_puts_every_path_on_exactly_one_side(paths):
    trainable, frozen = peft.split(paths, peft.rule(kinds="norm"))
    assert trainable.keys() | frozen.keys() == paths.keys()
    assert not trainable.keys() & frozen.keys()
    assert len(trainable) == 2 * 26


def test_merge_trees_undoes_split():
    nested = {"stem": {"kernel": np.ones(2), "bias": np.zeros(2)}, "out_0": {"conv_out": {"bias": np.ones(1)}}}
    assert peft.merge_trees(*peft.split(nested, peft.rule(".*bias"))) == nested


def test_merge_trees_refuses_a_path_on_both_sides():
    with pytest.raises(ValueError, match="a/b is among the trainable and among the frozen"):
        peft.merge_trees({"a/b": 1}, {"a/b": 2, "c": 3})


def test_rule_matching_nothing_raises(paths):
    with pytest.raises(ValueError, match="'.*lora' matches none of the network's"):
        peft.split(paths, peft.rule(".*") + peft.rule(".*lora"))


def test_rules_refuse_an_unknown_kind_and_a_broken_expression():
    with pytest.raises(ValueError, match="unknown module kind 'norms'"):
        peft.rule(kinds=("norms",))
    with pytest.raises(ValueError, match="is not a regular expression"):
        peft.rule("(")


def test_labels_follow_the_groups():
    params = unflatten({"stem/kernel": 0, "enc_block_0/0/norm/scale": 0, "enc_block_0/adapter/scale": 0,
                        "out_0/conv_out/bias": 0})  # fmt: skip
    rule = peft.rule(".*(scale|bias)")
    assert peft.labels(params, rule) == {
        "stem/kernel": "frozen", "enc_block_0/0/norm/scale": "trainable", "enc_block_0/adapter/scale": "trainable",
        "out_0/conv_out/bias": "trainable"}  # fmt: skip
    assert list(peft.labels(params, rule, ("adapter", "head")).values()) == ["frozen", "trainable", "adapter", "head"]
    assert list(peft.labels(params, rule, rules.stage_of).values()) == ["frozen", *["enc_block_0"] * 2, "out_0"]


@pytest.mark.parametrize(
    ("area", "sites", "inside", "outside"),
    [
        ("decoder", targets.BLOCK, "dec_block_0/1", "enc_block_0/1"),
        ("stages,down", targets.STAGE, "down_3", "up_3"),
        ("stages", targets.BLOCK, "bottleneck/0", "bottleneck"),
        ("enc_block_[01]", targets.STAGE, "enc_block_1", "enc_block_2"),
        ("dec_block_0/1", targets.layer("conv2"), "dec_block_0/1/conv2", "dec_block_0/0/conv2"),
        ("decoder,enc_block_0", targets.STAGE, "enc_block_0", "enc_block_1"),
        ("up_\\d{1,2},stem", targets.BLOCK, "up_3", "down_3"),
        (("stem", "out_0"), ".*", "out_0/conv_out/kernel", "out_1/conv_out/kernel"),
        ("all", targets.layer("conv1"), "up_2/conv1", "enc_block_0/adapter/conv1"),
    ],
)
def test_targets_choose_sites_by_part_or_expression(area, sites, inside, outside):
    pattern = rules.compiled(targets.within(area, sites), "targets")
    assert pattern.fullmatch(inside)
    assert not pattern.fullmatch(outside)

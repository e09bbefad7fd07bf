import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mednext_jax.train import devices, losses

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "losses.npz")
CASES = [case["name"] for case in json.loads(str(GOLDEN["meta"]))["cases"]]
REGIONS = {"WT": (1, 2, 3), "TC": (1, 3), "ET": (3,)}
VARIANTS = {
    "dice": {"ce_weight": 0.0},
    "dicece": {},
    "dice_with_bg": {"ce_weight": 0.0, "include_background": True},
    "dicece_l05": {"dice_weight": 0.5, "ce_weight": 2.0},
    "dice_batch": {"ce_weight": 0.0, "batch_dice": True},
}


def golden(case):
    logits = np.moveaxis(GOLDEN[f"{case}/logits"], 1, -1)
    return jnp.asarray(logits), jnp.asarray(GOLDEN[f"{case}/labels"][:, 0].astype(np.int32))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_dice_ce_equals_monai_in_value_and_gradient(case, variant):
    logits, labels = golden(case)
    value, grad = jax.value_and_grad(losses.dice_ce)(logits, labels, **VARIANTS[variant])
    np.testing.assert_allclose(value, GOLDEN[f"{case}/{variant}_f64"], rtol=2e-6)
    expected = np.moveaxis(GOLDEN[f"{case}/{variant}_grad"], 1, -1)
    np.testing.assert_allclose(grad, expected, atol=2e-6 * max(np.abs(expected).max(), 1e-3))


@pytest.mark.parametrize("case", CASES)
def test_soft_dice_loss_equals_monai_per_sample_and_class(case):
    logits, labels = golden(case)
    targets = jax.nn.one_hot(labels, logits.shape[-1])
    result = losses.soft_dice_loss(jax.nn.softmax(logits)[..., 1:], targets[..., 1:])
    np.testing.assert_allclose(result, GOLDEN[f"{case}/dice_none_f64"][..., 0, 0, 0], rtol=3e-6)


def test_dice_bce_equals_the_sum_by_hand():
    labels = jnp.asarray([0, 1, 2, 3], jnp.int32).reshape(1, 2, 2, 1)
    logits = jnp.zeros((1, 2, 2, 1, 3))  # every probability is 1/2
    # WT: 3 voxels, 2 * 1.5 / (2 + 3); TC: 2 voxels, 2 * 1 / (2 + 2); ET: 1 voxel, 2 * 0.5 / (2 + 1)
    dice = np.mean([1 - 2 * 1.5 / 5, 1 - 2 / 4, 1 - 1 / 3])
    np.testing.assert_allclose(losses.dice_bce(logits, labels, REGIONS), dice + np.log(2), rtol=1e-5)


def test_region_targets_are_nested_masks_in_the_order_of_the_map():
    labels = jnp.asarray([[0, 1, 2, 3]], jnp.int32)
    expected = [[[0, 0, 0], [1, 1, 0], [1, 0, 0], [1, 1, 1]]]
    np.testing.assert_array_equal(losses.region_targets(labels, REGIONS), expected)


def test_perfect_logits_have_almost_no_loss_and_an_absent_region_none_either():
    labels = jnp.zeros((2, 3, 4, 5), jnp.int32).at[0, 1].set(2)  # no TC, no ET; sample 1 empty
    logits = (losses.region_targets(labels, REGIONS) - 0.5) * 100
    assert losses.dice_bce(logits, labels, REGIONS) < 1e-6


def test_losses_are_float32_for_bfloat16_logits():
    logits, labels = golden("a")
    low = logits.astype(jnp.bfloat16)
    assert losses.dice_ce(low, labels).dtype == jnp.float32
    np.testing.assert_array_equal(
        losses.dice_ce(low, labels), losses.dice_ce(low.astype(jnp.float32), labels)
    )


def test_deep_supervision_weights_halve_and_sum_to_one():
    np.testing.assert_allclose(losses.deep_supervision_weights(3), [4 / 7, 2 / 7, 1 / 7])


def test_deep_supervision_shows_each_head_every_second_label():
    labels = jnp.arange(2 * 4 * 6 * 8).reshape(2, 4, 6, 8)
    seen = []

    def loss(logits, targets):
        seen.append(targets)
        return jnp.float32(len(seen))

    heads = [jnp.zeros((2, 4 // s, 6 // s, 8 // s, 3)) for s in (1, 2)]
    total = losses.deep_supervision(loss, heads, labels)
    np.testing.assert_allclose(total, 2 / 3 * 1 + 1 / 3 * 2)
    np.testing.assert_array_equal(seen[1], np.asarray(labels)[:, ::2, ::2, ::2])


def test_batch_dice_of_a_sharded_batch_is_that_of_the_global_batch():
    rng = np.random.default_rng(3)
    batch = {
        "logits": rng.normal(size=(4, 3, 5, 2, 3)).astype(np.float32),
        "labels": rng.integers(0, 4, (4, 3, 5, 2)).astype(np.int32),
    }
    loss = jax.jit(lambda b: losses.dice_bce(b["logits"], b["labels"], REGIONS, batch_dice=True))
    sharded = devices.shard_batch(devices.make_mesh(4), batch)
    np.testing.assert_allclose(loss(sharded), loss(batch), rtol=1e-6)


def test_outputs_that_do_not_fit_the_regions_are_refused():
    with pytest.raises(ValueError, match="2 outputs for 3 regions"):
        losses.dice_bce(jnp.zeros((1, 2, 2, 2, 2)), jnp.zeros((1, 2, 2, 2), jnp.int32), REGIONS)

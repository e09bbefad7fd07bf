import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mednext_jax.train import devices, losses, optimizer, step

OPTIM = {
    "name": "sgd", "b1": 0.9, "b2": 0.99, "eps": 1e-8, "momentum": 0.9, "nesterov": False,
    "weight_decay": 0.0, "clip_norm": 1.0, "groups": (), "layer_decay": 1.0, "new_warmup_steps": 0,
    "learning_rate": 0.1,
}  # fmt: skip
REGIONS = {"WT": (1, 2, 3), "TC": (1, 3), "ET": (3,)}


def parameters():
    rng = np.random.default_rng(0)
    shapes = {"stem/kernel": (4, 6), "stem/bias": (6,), "out_0/kernel": (6, 3)}
    return {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}


def forward(flat, image):
    return jnp.tanh(image @ flat["stem/kernel"] + flat["stem/bias"]) @ flat["out_0/kernel"]


def batches(n, size=8, bad=None):
    rng = np.random.default_rng(1)
    result = []
    for i in range(n):
        image = rng.normal(size=(size, 3, 2, 5, 4)).astype(np.float32)
        if i == bad:
            image[2, 1, 1, 1, 1] = np.nan
        result.append({"image": image, "label": rng.integers(0, 4, (size, 3, 2, 5)).astype(np.int32)})
    return result


def train(data, n_devices=1, trainable=("stem/kernel", "out_0/kernel"), augment=None, batch_dice=True,
          ema_decay=0.0, accumulate=1, shard=False, **optim):  # fmt: skip
    """Runs the compiled step over ``data``; returns the last state on the host and each step's metrics."""
    config = {**OPTIM, **optim}
    params = parameters()
    frozen = {path: params.pop(path) for path in list(params) if path not in trainable}
    tx = optimizer.make_optimizer(config, params)
    loss = losses.make_loss(
        {"batch_dice": batch_dice, "include_background": False, "dice_weight": 1.0, "ce_weight": 1.0},
        "regions", REGIONS,
    )  # fmt: skip
    pure = step.make_train_step(forward, loss, tx, augment, accumulate, ema_decay)
    mesh = devices.make_mesh(n_devices)
    state = step.init_state(params, tx, seed=5, use_ema=ema_decay > 0)
    compiled = step.compile_step(pure, mesh, state, frozen, data[0], shard)
    state = devices.place(state, step.state_shardings(mesh, state, shard))
    frozen = devices.replicate(mesh, frozen)
    metrics = []
    with jax.transfer_guard("disallow"):
        for batch in data:
            rate = devices.replicate(mesh, np.float32(config["learning_rate"]))
            state, values = compiled(state, frozen, devices.shard_batch(mesh, batch), rate)
            metrics.append({name: float(value) for name, value in jax.device_get(values).items()})
    return devices.to_host(state), metrics


def test_state_holds_only_trainable_leaves():
    state, _ = train(batches(1), name="adamw", ema_decay=0.9)
    assert set(state.trainable) == set(state.ema) == {"stem/kernel", "out_0/kernel"}
    arrays = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim]
    assert [leaf.shape for leaf in arrays] == [(optimizer.SHARES,)] * 2
    assert [np.count_nonzero(leaf) for leaf in arrays] == [4 * 6 + 6 * 3] * 2  # the rest is what fills them up


def test_one_and_four_devices_give_the_same_losses_and_parameters():
    data = batches(5)
    one, one_metrics = train(data, n_devices=1)
    four, four_metrics = train(data, n_devices=4)
    for a, b in zip(one_metrics, four_metrics, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-6)
    for path in one.trainable:
        np.testing.assert_allclose(one.trainable[path], four.trainable[path], atol=1e-6)


def test_split_optimizer_state_trains_like_a_replicated_one():
    data = batches(5)
    whole, whole_metrics = train(data, n_devices=2, name="adamw", weight_decay=0.1)
    split, split_metrics = train(data, n_devices=2, name="adamw", weight_decay=0.1, shard=True)
    for a, b in zip(whole_metrics, split_metrics, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-6)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(split), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_split_optimizer_state_lies_in_slices_on_the_devices_and_stays_there():
    tx = optimizer.make_optimizer({**OPTIM, "name": "adamw"}, parameters())
    state = step.init_state(parameters(), tx, seed=5, use_ema=False)
    mesh = devices.make_mesh(2)
    placed = devices.place(state, step.state_shardings(mesh, state, shard_optimizer=True))
    sizes = {leaf.shape: leaf.addressable_shards[0].data.shape for leaf in jax.tree.leaves(placed.optimizer)}
    assert sizes == {(): (), (optimizer.SHARES,): (optimizer.SHARES // 2,)}
    assert all(leaf.sharding.is_fully_replicated for leaf in placed.trainable.values())
    for a, b in zip(jax.tree.leaves(devices.to_host(placed)), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)

    def plain(state, frozen, batch, rate):
        return state, {"loss": rate}

    bytes_held = [
        step.compile_step(plain, mesh, state, {}, batches(1)[0], shard).memory_analysis().argument_size_in_bytes
        for shard in (False, True)
    ]
    moments = 2 * 4 * optimizer.SHARES  # two float32 per parameter, half of them on each device
    assert bytes_held[0] - bytes_held[1] == moments // 2


def test_repeating_a_run_gives_the_same_bits():
    first, second = (train(batches(3), n_devices=4, name="adamw")[0] for _ in range(2))
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)


def test_accumulation_equals_the_whole_batch_for_a_loss_that_averages_over_samples():
    data = batches(3)
    whole, _ = train(data, n_devices=2, batch_dice=False)
    parts, _ = train(data, n_devices=2, batch_dice=False, accumulate=4)
    for path in whole.trainable:
        np.testing.assert_allclose(whole.trainable[path], parts.trainable[path], atol=2e-6)


def test_micro_batches_take_samples_of_every_device():
    split = step._split_batch(jnp.arange(8), 2)
    np.testing.assert_array_equal(split, [[0, 2, 4, 6], [1, 3, 5, 7]])


def test_bad_step_changes_counters_alone():
    before, _ = train(batches(2), name="adamw", ema_decay=0.9)
    after, metrics = train(batches(3, bad=2), name="adamw", ema_decay=0.9)
    assert [m["bad"] for m in metrics] == [0, 0, 1]
    assert (int(after.step), int(after.bad_steps)) == (3, 1)
    kept = ("trainable", "optimizer", "ema", "key")
    for name in kept:
        for a, b in zip(*(jax.tree.leaves(getattr(s, name)) for s in (before, after)), strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_step_as_a_gpu_takes_it_is_the_same_bad_or_not(monkeypatch):
    data = batches(4, bad=2)
    ours, metrics = train(data, name="adamw", ema_decay=0.9)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")  # selects instead of branching
    theirs, others = train(data, name="adamw", ema_decay=0.9)
    assert [m["bad"] for m in others] == [m["bad"] for m in metrics] == [0, 0, 1, 0]
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def test_finite_loss_with_a_gradient_that_is_not_finite_is_a_bad_step():
    params = {"w": np.zeros(3, np.float32)}
    tx = optimizer.make_optimizer(OPTIM, params)
    # The slope of a root at 0 is infinite.
    pure = step.make_train_step(
        lambda flat, image: jnp.sqrt(flat["w"]).sum() + 0 * image.sum(), lambda value, label: value, tx
    )
    state = step.init_state(params, tx, seed=5, use_ema=False)
    new, metrics = jax.jit(pure)(state, {}, batches(1)[0], np.float32(0.1))
    assert metrics["loss"] == 0 and metrics["grad_norm"] == np.inf and metrics["bad"] == 1
    assert (int(new.step), int(new.bad_steps)) == (1, 1)
    for a, b in zip(jax.tree.leaves(new[1:4]), jax.tree.leaves(state[1:4]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_training_goes_on_after_a_bad_step():
    state, metrics = train(batches(4, bad=1))
    assert int(state.bad_steps) == 1
    assert np.isfinite(metrics[-1]["loss"])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_average_follows_the_parameters_with_a_rising_decay():
    state, _ = train(batches(1), ema_decay=0.9)
    start = parameters()
    for path, value in state.trainable.items():
        expected = 0.1 * start[path] + 0.9 * value  # the first step's decay is (1 + 0) / (10 + 0)
        np.testing.assert_allclose(state.ema[path], expected, rtol=1e-5)
    assert step.evaluated(state) is state.ema


def test_augmentation_gets_a_key_that_depends_on_the_step_alone():
    def augment(key, image, label):
        return image + jax.random.normal(key, image.shape), label

    same = [batches(1)[0]] * 2
    _, metrics = train(same, augment=augment, learning_rate=0.0)
    assert metrics[0]["loss"] != metrics[1]["loss"]
    _, again = train(same, n_devices=4, augment=augment, learning_rate=0.0)
    assert [m["loss"] for m in again] == pytest.approx([m["loss"] for m in metrics], abs=1e-6)


@pytest.mark.parametrize(
    ("batch_size", "accumulate", "numbers"), [(6, 1, ("6", "4")), (8, 3, ("3", "4", "8")), (0, 1, ("0", "4"))]
)
def test_batch_that_does_not_divide_is_refused_with_both_numbers(batch_size, accumulate, numbers):
    with pytest.raises(ValueError) as error:
        devices.check_batch_size(batch_size, accumulate, devices.make_mesh(4))
    assert all(number in str(error.value) for number in numbers)


def test_more_devices_than_there_are_is_refused():
    with pytest.raises(ValueError, match="config.n_devices is 64: there are 4 devices"):
        devices.make_mesh(64)


def test_deterministic_asks_xla_and_a_gpu_that_was_not_asked_is_refused(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--some_flag=1")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(ValueError, match="config.deterministic needs XLA_FLAGS=--xla_gpu_deterministic_ops=true"):
        devices.check_deterministic()
    devices.make_deterministic()
    devices.check_deterministic()
    assert devices.os.environ["XLA_FLAGS"] == "--some_flag=1 --xla_gpu_deterministic_ops=true"

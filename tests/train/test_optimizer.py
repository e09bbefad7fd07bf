import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mednext_jax.train import optimizer

CONFIG = {
    "name": "adamw",
    "b1": 0.9,
    "b2": 0.99,
    "eps": 1e-8,
    "momentum": 0.0,
    "nesterov": False,
    "weight_decay": 0.1,
    "clip_norm": 0.0,
    "groups": (),
    "layer_decay": 1.0,
    "new_warmup_steps": 0,
}


def tree():
    return {
        "stem/kernel": jnp.ones((1, 1, 1, 2, 3)),
        "enc_block_0/0/norm/scale": jnp.ones(3),
        "dec_block_0/adapter/up/kernel": jnp.ones((1, 1, 1, 2, 3)),
        "dec_block_0/0/grn_gamma": jnp.ones((1, 3)),
        "dec_block_0/0/conv2/ssf_scale": jnp.ones((1, 3)),
        "out_0/conv_out/bias": jnp.ones(3),
    }


@pytest.mark.parametrize("name", optimizer.NAMES)
def test_every_state_starts_at_zero_as_the_first_training_state_takes_it_to_be(name):
    groups = (("adapter/", 3.0, 0.5),)
    config = {**CONFIG, "name": name, "momentum": 0.9, "clip_norm": 1.0, "groups": groups, "new_warmup_steps": 5}
    state = optimizer.make_optimizer(config, tree(), new=["dec_block_0/adapter/up/kernel"]).init(tree())
    assert jax.tree.leaves(state) and not any(np.any(leaf) for leaf in jax.tree.leaves(state))


def one_update(config, params=None, grads=None, new=()):
    params = params or tree()
    tx = optimizer.make_optimizer({**CONFIG, **config}, params, new=new)
    grads = grads or jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(grads, tx.init(params), params, learning_rate=0.5)
    return {path: float(u.ravel()[0]) for path, u in updates.items()}


def test_weight_decay_moves_kernels_and_neither_biases_nor_norms_nor_scales():
    moved = {path for path, update in one_update({}).items() if update != 0}
    assert moved == {"stem/kernel", "dec_block_0/adapter/up/kernel"}


def test_sgd_step_is_minus_rate_times_gradient():
    grads = jax.tree.map(lambda p: 2 * jnp.ones_like(p), tree())
    updates = one_update({"name": "sgd", "weight_decay": 0.0}, grads=grads)
    assert set(updates.values()) == {-0.5 * 2}


def test_clip_is_by_the_global_norm_over_all_groups():
    grads = jax.tree.map(jnp.ones_like, tree())
    norm = np.sqrt(sum(leaf.size for leaf in tree().values()))
    config = {"name": "sgd", "weight_decay": 0.0, "clip_norm": 0.1, "groups": (("out", 1.0, 0.0),)}
    for update in one_update(config, grads=grads).values():
        assert update == pytest.approx(-0.5 * 0.1 / norm)


def test_first_matching_group_sets_rate_and_decay():
    grads = jax.tree.map(jnp.ones_like, tree())
    groups = (("adapter/", 3.0, 0.0), ("dec_block_0", 0.0, 1.0))
    updates = one_update({"name": "sgd", "groups": groups}, grads=grads)
    assert updates["dec_block_0/adapter/up/kernel"] == pytest.approx(-0.5 * 3.0)
    assert updates["dec_block_0/0/conv2/ssf_scale"] == 0.0
    assert updates["stem/kernel"] == pytest.approx(-0.5 * (1 + 0.1))


@pytest.mark.parametrize("entry", [("head", 1.0), "head", ("head", "fast", 1.0), ("head", -1.0, 1.0), (1, 1.0, 1.0)])
def test_malformed_group_is_shown_with_an_example(entry):
    with pytest.raises(ValueError, match=r"config.optim.groups: .* is not \(regex, .* such as \('adapter/', 3"):
        one_update({"groups": (entry,)})


def test_group_of_a_broken_expression_and_negative_amounts_are_refused():
    with pytest.raises(ValueError, match=r"config.optim.groups: '\(' is not a regular expression"):
        one_update({"groups": (("(", 1.0, 1.0),)})
    for name in ("weight_decay", "clip_norm", "new_warmup_steps"):
        with pytest.raises(ValueError, match=f"config.optim.{name} is -1: 0 or more"):
            one_update({name: -1})


def test_group_that_matches_nothing_raises():
    with pytest.raises(ValueError, match="'bottleneck' matches no trainable"):
        one_update({"groups": (("bottleneck", 1.0, 1.0),)})


def test_layer_decay_shrinks_the_rate_with_the_distance_from_the_head():
    groups = optimizer.assign_groups(tree(), {**CONFIG, "layer_decay": 0.5})
    rates = [groups[path].lr_multiplier for path in ("out_0/conv_out/bias", "dec_block_0/0/conv2/ssf_scale")]
    assert rates[0] == 1.0
    assert rates[1] == pytest.approx(0.5)
    assert groups["stem/kernel"].lr_multiplier < groups["enc_block_0/0/norm/scale"].lr_multiplier < 0.01


def test_new_parameters_warm_up_on_their_own():
    params = tree()
    new = {"dec_block_0/adapter/up/kernel"}
    config = {**CONFIG, "name": "sgd", "weight_decay": 0.0, "new_warmup_steps": 4}
    tx = optimizer.make_optimizer(config, params, new=new)
    grads, state, rates = jax.tree.map(jnp.ones_like, params), tx.init(params), []
    for _ in range(5):
        updates, state = tx.update(grads, state, params, learning_rate=1.0)
        rates.append(float(-updates["dec_block_0/adapter/up/kernel"].ravel()[0]))
        assert float(updates["stem/kernel"].ravel()[0]) == -1.0
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


def test_optimizer_state_holds_two_moments_of_each_trainable_leaf_and_counters():
    params = tree()
    tx = optimizer.make_optimizer({**CONFIG, "layer_decay": 0.9}, params)
    _, state = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params, learning_rate=0.1)
    vectors = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert sum(np.count_nonzero(vector) for vector in vectors) == 2 * sum(leaf.size for leaf in params.values())
    assert all(vector.shape == (optimizer.SHARES,) for vector in vectors)


def test_a_packed_tree_is_one_vector_per_group_and_comes_back_as_it_was():
    random = np.random.default_rng(0)
    params = {path: random.standard_normal(leaf.shape, np.float32) for path, leaf in tree().items()}
    params["enc_block_0/0/conv2/kernel"] = random.standard_normal((1, 1, 1, 7, 35), np.float32)
    tx = optimizer.make_optimizer({**CONFIG, "groups": (("out", 2.0, 1.0),)}, params)
    vectors = tx.pack(params)
    assert sorted(vector.shape for vector in vectors.values()) == [(48,), (48,), (288,)]  # decayed: 7 * 35 + 12
    back = tx.unpack(vectors)
    assert back.keys() == params.keys()
    for path, leaf in params.items():
        np.testing.assert_array_equal(back[path], leaf)
    assert tx.unpack(tx.pack({})) == {}


@pytest.mark.parametrize("name", optimizer.NAMES)
def test_vectors_move_as_a_plain_optax_chain_moves_the_leaves(name):
    random = np.random.default_rng(0)
    config = {**CONFIG, "name": name, "momentum": 0.9, "clip_norm": 1.0, "groups": (("dec", 0.5, 3.0),)}
    params = jax.tree.map(lambda leaf: random.standard_normal(leaf.shape, np.float32), tree())
    tx = optimizer.make_optimizer(config, params)
    ours, state = params, tx.init(params)
    moments = optax.scale_by_adam(0.9, 0.99, 1e-8) if name == "adamw" else optax.trace(0.9)
    plain = optax.chain(optax.clip_by_global_norm(1.0), moments)
    theirs, plain_state = params, plain.init(params)
    for _ in range(3):
        grads = jax.tree.map(lambda leaf: random.standard_normal(leaf.shape, np.float32), params)
        updates, state = tx.update(grads, state, ours, learning_rate=0.1)
        ours = optax.apply_updates(ours, updates)
        updates, plain_state = plain.update(grads, plain_state, theirs)
        factors = {path: 0.5 if path.startswith("dec") else 1.0 for path in params}
        decay = {"stem/kernel": 0.1, "dec_block_0/adapter/up/kernel": 0.3}
        theirs = {path: leaf - 0.1 * factors[path] * (updates[path] + decay.get(path, 0.0) * leaf)
                  for path, leaf in theirs.items()}  # fmt: skip
    for path, leaf in theirs.items():
        np.testing.assert_allclose(ours[path], leaf, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "params", "message"),
    [({"name": "lion"}, None, "must be one of adamw, sgd"), ({}, {}, "no parameter is trainable")],
)
def test_an_impossible_optimizer_is_refused(config, params, message):
    with pytest.raises(ValueError, match=message):
        optimizer.make_optimizer({**CONFIG, **config}, tree() if params is None else params)

"""What every method promises: it starts as the base, moves what it trains, leaves the rest bit for bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mednext_jax import peft
from mednext_jax.nn import paths
from mednext_jax.nn.mednext import parameter_shapes
from mednext_jax.peft import attach

# Methods that add nothing share one compiled program, the base's; each of the others costs a compilation.
METHODS = [
    ("full", {}),
    ("head", {}),
    ("decoder", {"up": True}),
    ("last_stages", {}),
    ("norm", {}),
    ("bias", {}),
    ("norm_bias_head", {}),
    ("depthwise", {}),
    ("ssf", {}),
    ("ssf", {"scope": "block"}),
    ("lora", {"rank": 2}),
    ("lora", {"rank": 2, "layers": "conv1"}),
    ("depthwise_adapter", {}),
    ("conv_adapter", {"gamma": 2}),
    ("conv_adapter", {"gamma": 4, "placement": "sequential", "scale": False}),
    ("conv_adapter", {"gamma": 2, "scope": "block"}),
    ("conv_adapter", {"gamma": 2, "placement": "sequential", "position": "convolution", "scope": "block"}),
    ("conv_adapter", {"gamma": 2, "placement": "parallel", "position": "convolution", "scope": "block"}),
    ("linear_adapter", {}),
    ("linear_adapter", {"placement": "parallel"}),
    ("paper_sequential", {}),
    ("paper_parallel", {}),
    ("lora+norm", {"rank": 2, "targets": "stem,down,up,head,decoder"}),
    ("conv_adapter+linear_adapter+head", {"gamma": 2, "targets": "stem,down,up,bottleneck"}),
]


KEY = jax.random.key(3, impl="unsafe_rbg")  # compiles fast


@pytest.fixture(scope="module")
def pointwise(network):
    """The network with kernels of one voxel, which compile fastest."""
    return network.clone(kernel_size=1)


@pytest.fixture(scope="module")
def weights(pointwise):
    random = np.random.default_rng(5)
    return {path: (0.3 * random.standard_normal(leaf.shape)).astype(np.float32)
            for path, leaf in sorted(parameter_shapes(pointwise).items())}  # fmt: skip


@functools.cache
def gradient(model):
    """Program ``(trained leaves, frozen leaves, image) -> gradients of the first``."""

    def objective(trainable, frozen, x):
        logits = model.apply({"params": peft.merge_trees(trainable, frozen)}, x)
        return jnp.mean(jnp.square(logits - 1.0))

    # Not optimised: half the time to compile, and its last bits matter to nobody here.
    return jax.jit(jax.grad(objective), compiler_options={"xla_backend_optimization_level": 0})


@pytest.mark.parametrize(("name", "options"), METHODS)
def test_method_starts_as_the_base(pointwise, weights, image, name, options):
    model, params = peft.create(name, **options).apply_to(pointwise, weights, KEY)
    logits = attach.compiled(model)({"params": params}, image)
    expected = attach.compiled(pointwise)({"params": paths.unflatten(weights)}, image)
    assert np.array_equal(logits, expected)


def test_network_in_space_with_shortcuts_starts_as_the_base(network_in_space, base_in_space):
    x = np.random.default_rng(7).standard_normal((1, 32, 16, 16, 4)).astype(np.float32)
    method = peft.compose(
        peft.create("lora", rank=2, layers="conv1,conv2,conv3,res_conv"),
        peft.create("conv_adapter", gamma=2, targets="enc_block_0,bottleneck,down_0,up_0"),
    )
    model, params = method.apply_to(network_in_space, base_in_space, KEY)
    assert "down_0/res_conv/lora_b" in paths.flatten(params)
    logits = attach.compiled(model)({"params": params}, x)
    expected = attach.compiled(network_in_space)({"params": paths.unflatten(base_in_space)}, x)
    assert np.array_equal(logits, expected)


@pytest.mark.parametrize(
    ("name", "options"), [("ssf", {"scope": "block", "targets": "down"}), ("depthwise_adapter", {"kernel_size": 3})]
)
def test_what_starts_as_the_base_but_for_rounding_stays_within_it(pointwise, weights, image, name, options):
    model, params = peft.create(name, **options).apply_to(pointwise, weights, KEY)
    logits = attach.compiled(model)({"params": params}, image)
    expected = attach.compiled(pointwise)({"params": paths.unflatten(weights)}, image)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize(("name", "options"), METHODS)
def test_training_moves_what_the_method_trains_and_not_a_bit_of_the_rest(pointwise, weights, image, name, options):
    if peft.create(name, **options).adapters:
        options = options | {"targets": "dec_block_[01]"}  # the way back to these alone is short to compile
    method = peft.create(name, **options)
    model, params = method.apply_to(pointwise, weights, KEY)
    trainable, frozen = peft.split(params, method.rule)
    if not method.adapters:  # one program for all of them; the labels freeze what is not theirs
        trainable, frozen = {**trainable, **frozen}, {}
    labels = {path: label for path, label in peft.labels(params, method.rule).items() if path in trainable}
    transform = optax.partition({"trainable": optax.sign_sgd(1e-2), "frozen": optax.set_to_zero()}, labels)
    state, start = transform.init(trainable), dict(trainable)
    for _ in range(2):
        updates, state = transform.update(gradient(model)(trainable, frozen, image), state)
        trainable = optax.apply_updates(trainable, updates)
    moved = {path for path, leaf in trainable.items() if not np.array_equal(leaf, start[path])}
    expected = {path for path, label in labels.items() if label == "trainable"}
    assert moved <= expected
    # A norm per channel follows conv1, so that a shift there has no gradient but rounding.
    assert all(path.endswith(("conv1/bias", "conv1/ssf_shift")) for path in expected - moved)


def test_every_method_is_under_guarantee():
    assert {part for name, _ in METHODS for part in name.split("+")} == peft.METHODS.keys()


def test_legacy_and_reinitialised_methods_say_that_they_do_not_start_as_the_base(network, base):
    for name, options in [
        ("paper_parallel", {"legacy": True}),
        ("paper_sequential", {"legacy": True}),
        ("linear_adapter", {"legacy": True}),
        ("last_stages", {"reinit": True}),
        ("lora+last_stages", {"reinit": True}),
    ]:
        assert not peft.create(name, **options).identity
    assert all(peft.create(name, **options).identity for name, options in METHODS)


def test_reinit_draws_the_last_stages_anew_and_nothing_else(network, base):
    method = peft.create("last_stages", n_stages=1, reinit=True)
    model, params = method.apply_to(network, base, jax.random.key(0))
    assert model == network
    drawn, kept = peft.split(params, method.rule)
    assert all(np.array_equal(leaf, base[path]) for path, leaf in kept.items())
    assert not any(np.array_equal(leaf, base[path]) for path, leaf in drawn.items())

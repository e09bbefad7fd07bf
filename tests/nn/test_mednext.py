"""MedNeXt as a module: names, shapes, options, adapters at their sites. Its numbers are in the golden tests."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mednext_jax.nn import slabs
from mednext_jax.nn.adapters import Adapter
from mednext_jax.nn.mednext import MedNeXt, count_parameters, create_mednext, parameter_shapes
from mednext_jax.nn.paths import flatten, unflatten

STAGES = r"(enc|dec)_block_\d|bottleneck"
TINY = dict(in_channels=2, n_channels=4, n_classes=3, block_counts=(1,) * 9, dim="2d")


def started(model, size=(16, 32), seed=0):
    x = np.random.default_rng(seed).standard_normal((2, *size, model.in_channels)).astype(np.float32)
    return jax.jit(model.init)(jax.random.key(seed), x)["params"], x


def adapted(adapters, base, x):
    """Parameters and logits of the adapted network: the base's leaves, adapters as they start."""
    model = MedNeXt(**TINY, adapters=adapters)
    own = flatten(jax.jit(model.init)(jax.random.key(5), x)["params"])
    params = unflatten(own | flatten(base))
    return params, jax.jit(model.apply)({"params": params}, x)


def test_flatten_and_unflatten_are_inverse():
    nested = {"stem": {"kernel": 1, "bias": 2}, "enc_block_0": {"0": {"conv1": {"kernel": 3}}}}
    flat = flatten(nested)
    assert flat == {"stem/kernel": 1, "stem/bias": 2, "enc_block_0/0/conv1/kernel": 3}
    assert unflatten(flat) == nested


def test_shapes_are_the_same_for_every_dtype_and_memory_option_and_wrong_ones_are_refused():
    first, *others = (parameter_shapes(MedNeXt(**TINY, **option))
                      for option in ({}, {"dtype": "bfloat16"}, {"remat": "none"}, {"remat": "block"}))  # fmt: skip
    assert first and all(shapes == first for shapes in others)
    for option, error in (({"dtype": "os.system"}, TypeError), ({"remat": "much"}, ValueError)):
        with pytest.raises(error):
            parameter_shapes(MedNeXt(**TINY, **option))


def test_logits_have_the_inputs_size_and_deep_supervision_halves_it_four_times():
    model = MedNeXt(**TINY | {"deep_supervision": True})
    params, x = started(model)
    outputs = jax.eval_shape(model.apply, {"params": params}, x)
    assert [o.shape for o in outputs] == [(2, 16 // f, 32 // f, 3) for f in (1, 2, 4, 8, 16)]
    assert {o.dtype for o in outputs} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("remat", ["none", "block"])
def test_remat_changes_neither_names_nor_numbers(remat):
    params, x = started(MedNeXt(**TINY))
    other = MedNeXt(**TINY, remat=remat)
    assert list(parameter_shapes(other)) == list(parameter_shapes(MedNeXt(**TINY)))

    def gradient(model):
        return jax.jit(jax.grad(lambda p: jnp.mean(model.apply({"params": p}, x) ** 2)))(params)

    for a, b in zip(jax.tree.leaves(gradient(other)), jax.tree.leaves(gradient(MedNeXt(**TINY))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def loss_of(model, size):
    """A loss, and shapes to trace it with."""
    x = jax.ShapeDtypeStruct((1, *size, model.in_channels), jnp.float32)
    params = unflatten(parameter_shapes(model))
    return lambda params, x: jnp.mean(model.apply({"params": params}, x) ** 2), params, x


def test_remat_wraps_second_halves_or_also_whole_blocks_but_only_those_that_do_not_recompute_by_themselves():
    def wrapped(grn, remat):
        model = MedNeXt(**TINY | {"block_counts": (2, 1, 0, 0, 0, 0, 0, 0, 3)}, grn=grn, remat=remat)
        loss, *shapes = loss_of(model, (16, 32))
        return len(re.findall(r" = (?:remat|checkpoint)\w*\[", str(jax.make_jaxpr(loss)(*shapes))))

    assert [wrapped(False, remat) for remat in ("none", "mlp", "block")] == [0, 0, 0]
    halves = 6 + 7  # of blocks and resamplers with response norm, which down_0 never has
    assert [wrapped(True, remat) for remat in ("none", "mlp", "block")] == [0, halves, halves + 6 + 8]


def test_recomputing_the_expanded_half_saves_most_of_the_memory_and_the_convolutions_a_part_of_the_rest():
    def temporaries(remat):
        changes = {"dim": "3d", "exp_r": 4, "kernel_size": 1, "block_counts": (3, *(0,) * 8)}
        loss, *shapes = loss_of(MedNeXt(**TINY | changes, remat=remat), (32, 32, 48))
        return jax.jit(jax.grad(loss)).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    assert temporaries("none") > 4 * temporaries("mlp") > 4 * 1.3 * temporaries("block")


def test_equal_blocks_are_written_once_in_a_program_and_so_are_their_gradients():
    def products(count):
        loss, *shapes = loss_of(MedNeXt(**TINY | {"block_counts": (count, *(0,) * 8)}), (16, 32))
        return jax.jit(jax.value_and_grad(loss)).lower(*shapes).as_text().count("stablehlo.multiply")

    assert products(5) == products(2) > 0


def test_slabs_do_not_change_the_numbers(monkeypatch):
    model = MedNeXt(**TINY)
    params, x = started(model)

    def program():
        jax.clear_caches()  # functions of blocks are traced once per shape
        return jax.jit(lambda p, x: model.apply({"params": p}, x)).lower(params, x)

    whole = program()
    monkeypatch.setattr(slabs, "SLAB_BYTES", 1)
    by_slabs = program()
    monkeypatch.undo()
    jax.clear_caches()
    assert by_slabs.as_text().count("stablehlo.while") > whole.as_text().count("stablehlo.while")
    found, wanted = (each.compile()(params, x) for each in (by_slabs, whole))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_bfloat16_compute_stays_close_and_gives_float32_logits():
    model = MedNeXt(**TINY)
    params, x = started(model)
    exact = jax.jit(model.apply)({"params": params}, x)
    low = jax.jit(MedNeXt(**TINY, dtype=jnp.bfloat16).apply)({"params": params}, x)
    assert low.dtype == jnp.float32
    assert np.linalg.norm(low - exact) / np.linalg.norm(exact) < 3e-2


def test_all_kinds_of_adapters_at_once_are_the_identity_at_initialisation():
    adapters = (
        Adapter("conv", STAGES, "parallel", gamma=4, name="beside"),
        Adapter("conv", r"(enc|dec)_block_\d/\d|down_\d|up_\d", "parallel", "convolution", gamma=2, name="before_norm"),
        Adapter("conv", r"stem|down_\d|up_\d|out_0", "parallel", gamma=1, kernel_size=5, name="around"),
        Adapter("block", STAGES, "parallel", name="block"),
        Adapter("linear", STAGES, name="linear"),
        Adapter("lora", r".*/(conv1|conv2|conv3|res_conv|conv_out)", rank=2),
        Adapter("ssf", r".*/(conv\d|norm|res_conv|conv_out)|stem|(enc|dec)_block_\d/\d"),
        Adapter("depthwise", r".*/conv1", kernel_size=5),
    )
    base = MedNeXt(**TINY)
    params, x = started(base)
    full, logits = adapted(adapters, params, x)
    # Each adds exactly zero; XLA may still fuse, and so round, the larger program in another way.
    np.testing.assert_allclose(logits, jax.jit(base.apply)({"params": params}, x), rtol=0, atol=2e-6)
    added = set(flatten(full)) - set(flatten(params))
    places = ("stem/around/", "down_2/around/", "up_1/before_norm/", "out_0/around/", "bottleneck/block/conv3/",
              "dec_block_0/linear/fc2/", "up_3/res_conv/lora_b", "enc_block_1/0/norm/ssf_scale",
              "enc_block_1/0/ssf_shift", "down_0/conv1/branch", "dec_block_3/beside/up/")  # fmt: skip
    assert all(any(path.startswith(place) for path in added) for place in places)


def test_legacy_adapters_change_the_function_at_initialisation():
    base = MedNeXt(**TINY)
    params, x = started(base)
    _, logits = adapted((Adapter("block", STAGES, "parallel", legacy=True),), params, x)
    assert float(jnp.abs(logits - jax.jit(base.apply)({"params": params}, x)).max()) > 0.1


@pytest.mark.parametrize(
    ("changes", "size", "words"),
    [
        ({}, (16, 24), "divisible by 16"),
        ({"adapters": (Adapter("conv", "enc_block_9"),)}, (16, 16), "matches no"),
        ({"adapters": (Adapter("conv", STAGES, gamma=3),)}, (16, 16), "gamma 3 does not divide"),
        ({"adapters": (Adapter("block", "down_0", "parallel"),)}, (16, 16), "cannot change the shape"),
        ({"adapters": (Adapter("block", "stem"),)}, (16, 16), "stem"),
        ({"norm_type": "batch"}, (16, 16), "norm_type"),
        ({"remat": "all"}, (16, 16), "remat"),
        ({"kernel_size": None, "enc_kernel_size": 3}, (16, 16), "dec_kernel_size"),
        ({"block_counts": (1, 1)}, (16, 16), "one per stage"),
        ({"dim": "3d"}, (16, 16), "3d network takes"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(changes, size, words):
    model = MedNeXt(**TINY | changes)
    with pytest.raises(ValueError, match=words) as error:
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *size, 2)))
    assert "\n" not in str(error.value)


def test_unknown_variants_fields_and_kinds_are_refused():
    with pytest.raises(ValueError, match="unknown MedNeXt variant 'XL'"):
        create_mednext("XL", 3)
    with pytest.raises(ValueError, match="no field width"):
        create_mednext("S", 3, width=2)
    with pytest.raises(ValueError, match="adapter kind"):
        Adapter("lola", "stem")
    with pytest.raises(ValueError, match="no regular expression"):
        Adapter("lora", "(")


def test_adapters_may_be_given_as_mappings():
    described = {"kind": "lora", "target": "stem", "rank": 2}
    model = MedNeXt(**TINY, adapters=(described,))
    assert model.adapters == (Adapter("lora", "stem", rank=2),)
    assert "stem/lora_a" in parameter_shapes(model)


def test_initial_weights_are_uniform_within_torchs_bound_and_differ_by_key_and_layer():
    model = MedNeXt(**TINY)
    draw = jax.jit(lambda key: flatten(model.init(key, jnp.zeros((1, 16, 16, 2)))["params"]))
    a, b = draw(jax.random.key(0)), draw(jax.random.key(1))
    kernel = np.asarray(a["bottleneck/0/conv2/kernel"]).ravel() * 64**0.5  # 64 inputs: uniform in (-1, 1)
    assert kernel.size == 64 * 128 and np.abs(kernel).max() <= 1
    counts, _ = np.histogram(kernel, bins=16, range=(-1, 1))
    expected = kernel.size / 16
    assert np.sum((counts - expected) ** 2 / expected) < 37.7  # chi-square, 15 degrees of freedom, p = 0.001
    assert abs(np.corrcoef(kernel[:-1], kernel[1:])[0, 1]) < 4 / kernel.size**0.5
    other = np.asarray(b["bottleneck/0/conv2/kernel"]).ravel() * 8
    assert abs(np.corrcoef(kernel, other)[0, 1]) < 4 / kernel.size**0.5
    twin = np.asarray(a["up_3/conv2/kernel"]).ravel() * 8
    assert abs(np.corrcoef(kernel, twin)[0, 1]) < 4 / kernel.size**0.5


def test_mednext_s_has_the_published_number_of_parameters():
    assert count_parameters(parameter_shapes(create_mednext("S", 4))) == 5_551_077 - 1  # no dummy_tensor

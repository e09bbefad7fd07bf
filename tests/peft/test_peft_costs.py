"""What methods cost: arithmetic counted on the trace, memory and file size of the step."""

import functools
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mednext_jax import peft
from mednext_jax.nn.branches import ConvAdapter
from mednext_jax.nn.mednext import create_mednext, parameter_shapes
from mednext_jax.nn.paths import unflatten
from mednext_jax.peft import cost
from mednext_jax.peft.flops import flops

sys.path.insert(0, str(Path(__file__).parents[2] / "launch"))
from benchmarks.traffic import moved_bytes  # noqa: E402

GOLDEN = Path(__file__).parents[1] / "golden"

# The most that a training step of each method may cost, as a fraction of the full one's (MedNeXt-S's widths).
PROMISES = {
    "full": 1.0,
    "head": 0.35,
    "decoder": 0.75,
    "last_stages": 0.75,
    "norm": 0.8,
    "bias": 0.8,
    "norm_bias_head": 0.8,
    "depthwise": 0.8,
    "depthwise_adapter": 0.8,
    "conv_adapter": 0.8,
    "linear_adapter": 0.8,
    "ssf": 0.9,
    "lora": 0.95,
    "paper_sequential": 1.1,  # a whole block more per stage: no saving is promised
    "paper_parallel": 1.1,
}


def test_flops_of_products_loops_and_dead_code_are_counted():
    a, b, x = jnp.ones((3, 5)), jnp.ones((5, 7)), jnp.ones((1, 6, 6, 4))

    def product(a, b):
        _unused = jnp.exp(b.T @ b)
        return jnp.sum(a @ b)

    assert flops(product, a, b) == 2 * 3 * 5 * 7 + 3 * 7
    assert flops(lambda a, b: jax.lax.map(lambda row: row @ b, a), a, b) == 3 * (2 * 5 * 7)
    grouped = jax.jit(lambda x, w: jax.lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2))  # fmt: skip
    assert flops(grouped, x, jnp.ones((3, 3, 2, 8))) == 2 * (6 * 6 * 8) * (3 * 3 * 2)


@pytest.mark.parametrize("variant", ["S", "B"])
def test_forward_flops_match_the_original_network(variant):
    model = create_mednext(variant, n_classes=4)
    x = jax.ShapeDtypeStruct((1, 64, 64, 64, 4), jnp.float32)
    counted = flops(lambda params, x: model.apply({"params": unflatten(params)}, x), parameter_shapes(model), x)
    convolutions = 1e9 * json.loads((GOLDEN / "param_counts.json").read_text())[f"{variant}_k3"]["gflop_64"]
    assert 1.0 < counted / convolutions < 1.06  # the rest is norms, GELUs and sums


def test_steps_cost_no_more_than_methods_promise():
    model = create_mednext("S", n_classes=3, block_counts=(2, 2, 0, 0, 0, 0, 0, 2, 2), dim="2d")
    full, *others = peft.costs([peft.create(name) for name in PROMISES], model, (64, 64))
    for row, promise in zip(others, list(PROMISES.values())[1:], strict=True):
        assert row.step_flops < promise * full.step_flops, row.method
        assert row.predict_flops < 1.45 * full.predict_flops, row.method
        assert row.file_bytes == pytest.approx(4 * row.trainable, abs=30_000), row.method
    table = peft.markdown([full, *others]).splitlines()
    assert len(table) == 2 + len(PROMISES) and "| `head` | The output layers, those of deep supervision" in table[3]


# Bytes that the compiled step moves, and its temporary memory, as fractions of the full one's on the network below.
COMPILED = {
    "head": (0.25, 0.3),
    "decoder": (0.4, 0.55),
    "last_stages": (0.8, 0.65),  # on JAX 0.12; less before
    "norm": (0.65, 0.65),
    "bias": (0.7, 0.75),
    "norm_bias_head": (0.7, 0.75),
    "depthwise": (0.9, 0.9),
    "depthwise_adapter": (0.95, 0.95),
    "conv_adapter": (0.95, 1.05),
    "linear_adapter": (0.7, 0.9),
    "ssf": (0.9, 1.7),  # keeps what it scales
    "lora": (0.95, 0.95),
    "paper_sequential": (1.15, 1.8),  # a whole block more per stage
    "paper_parallel": (1.15, 1.8),
}


def moved_and_held(method, model, sizes) -> tuple[int, int]:
    """Bytes that the compiled step moves, and its temporary memory."""
    step, arguments = cost.step_of(method, model, jax.ShapeDtypeStruct((1, *sizes, 4), jnp.float32))
    program = cost.compile_step(step, arguments)
    return moved_bytes(program.as_text()), program.memory_analysis().temp_size_in_bytes


@functools.cache
def compiled(name: str) -> tuple[int, int]:
    """Of a method on a flat network with a block at its two ends."""
    model = create_mednext("S", 3, 5, n_channels=16, block_counts=(1, 0, 0, 0, 0, 0, 0, 0, 1), dim="2d")
    return moved_and_held(peft.create(name), model, (128, 96))


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_step_moves_and_holds_no_more_than_its_share_of_the_full_ones_bytes(name):
    for mine, full, share in zip(compiled(name), compiled("full"), COMPILED[name], strict=True):
        assert mine < share * full


def test_every_method_has_its_shares():
    assert COMPILED.keys() | {"full"} == PROMISES.keys() == peft.METHODS.keys()


def test_conv_adapters_step_costs_less_than_the_full_one_and_still_less_in_the_decoder_alone():
    """On the whole way down and up, in space; it once kept padded inputs, and results beside them, and held 0.8."""
    model = create_mednext("S", n_classes=3, n_channels=8, block_counts=(1, 1, 0, 0, 0, 0, 0, 1, 1))
    sizes, array = (48, 32, 32), 4 * 8 * 48 * 32 * 32  # bytes of one at the first stage
    methods = [peft.create("full"), peft.create("conv_adapter"), peft.create("conv_adapter", targets="decoder")]
    full, *others = [
        (row.step_flops, *moved_and_held(method, model, sizes))
        for row, method in zip(peft.costs(methods, model, sizes), methods, strict=True)
    ]
    assert full[2] < 22 * array
    for found, most in zip(others, ((0.95, 0.92, 0.66), (0.78, 0.71, 0.55)), strict=True):  # FLOPs, bytes, memory
        shares = [mine / whole for mine, whole in zip(found, full, strict=True)]
        assert all(share < limit for share, limit in zip(shares, most, strict=True)), shares


def test_conv_adapter_step_keeps_no_array_per_kernel_tap():
    adapter = ConvAdapter(features=8, gamma=4, sizes=(3, 3, 3))
    x = jnp.ones((1, 16, 16, 16, 8))
    params = jax.eval_shape(adapter.init, jax.random.key(0), x)
    step = jax.jit(jax.grad(lambda params, x: jnp.sum(jnp.square(adapter.apply(params, x)))))
    temporary = step.lower(params, x).compile().memory_analysis().temp_size_in_bytes
    assert temporary < 12 * x.nbytes


def test_conv_adapter_starts_with_a_grouped_convolution():
    adapter = ConvAdapter(features=6, gamma=3, sizes=(3, 3), learnable_scale=False)
    x = jax.random.normal(jax.random.key(0), (2, 7, 5, 6))
    down = jax.random.normal(jax.random.key(1), (3, 3, 1, 6))
    up = jnp.eye(2, 6)[None, None]
    params = {"down": {"kernel": down, "bias": jnp.ones(2)}, "up": {"kernel": up, "bias": jnp.zeros(6)}}
    # flax and torch keep such a kernel as (*k, channels per group, groups); output j sees inputs 3 j, 3 j + 1, 3 j + 2
    kernel = down.reshape(3, 3, 2, 3).transpose(0, 1, 3, 2)
    grouped = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
                                           feature_group_count=2)  # fmt: skip
    found = adapter.apply({"params": params}, x)
    np.testing.assert_allclose(found[..., :2], jax.nn.gelu(grouped + 1, approximate=False), rtol=1e-4, atol=1e-5)
    assert not found[..., 2:].any()

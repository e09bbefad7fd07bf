"""Whole networks equal upstream's and the original study's: outputs, inner activations, every gradient, UpKern."""

import jax
import numpy as np
import pytest

from mednext_jax import convert, loading
from mednext_jax.nn import paths
from mednext_jax.nn.mednext import MedNeXt
from tests.golden import reading

NETWORKS = reading.names("net_", "adapter_lin", "adapter_par", "adapter_seq")
GRADIENTS = reading.names("grad_")


def build(state_dict: dict[str, np.ndarray], ctor: dict):
    """The network that a state dict means, told only what it cannot show; its arguments and parameters."""
    known = {key: ctor[key] for key in ("do_res", "norm_type") if key in ctor}
    kwargs, params = convert.from_torch(state_dict, **known)
    return MedNeXt(**kwargs), params, kwargs


def outputs(model: MedNeXt, params, x, **options):
    return reading.run(lambda p, x: model.apply({"params": p}, x), params, x, **options)


@pytest.mark.parametrize("name", NETWORKS)
def test_golden_network_outputs_match_upstream(name):
    golden = reading.Golden(name)
    model, params, _ = build(golden.state_dict, golden.meta["ctor"])
    golden.assert_outputs(outputs(model, params, golden.input, optimised=name == "net_k3_b1"))


def test_golden_activations_of_every_module_match_upstream():
    golden = reading.Golden("net_k3_b1_ds")
    model, params, _ = build(golden.state_dict, golden.meta["ctor"])

    def forward(p, x):
        # The modules right under the network; their names are upstream's.
        _, state = model.apply({"params": p}, x, mutable=["intermediates"],
                               capture_intermediates=lambda module, _: len(module.path) == 1)
        return {name: inner["__call__"][0] for name, inner in state["intermediates"].items() if "__call__" in inner}

    found = {name: reading.channels_first(y) for name, y in reading.run(forward, params, golden.input).items()
             if isinstance(y, jax.Array)}
    wanted = golden.group("act")
    assert found.keys() >= wanted.keys() and len(wanted) == 23
    gap = golden.meta["max_abs_f32_vs_f64"][0]
    for name, theirs in wanted.items():
        step = max(1, found[name].shape[-1] // 8)
        reading.assert_within(found[name][..., ::step, ::step, ::step], theirs, gap, what=name)


@pytest.mark.parametrize("name", GRADIENTS)
def test_golden_gradients_of_every_parameter_and_of_the_input_match_upstream(name):
    golden = reading.Golden(name)
    model, params, kwargs = build(golden.state_dict, golden.meta["ctor"])

    def loss(p, x):
        y = model.apply({"params": p}, x)
        return sum((output**2).mean() for output in (y if isinstance(y, list) else [y]))

    value, (by_params, by_input) = reading.run(jax.value_and_grad(loss, (0, 1)), params, golden.input)
    assert value == pytest.approx(float(golden.arrays["loss_f64"]), rel=1e-5)
    found = convert.to_torch(kwargs, by_params)
    wanted = golden.group("grad")
    assert found.keys() - {"dummy_tensor"} == wanted.keys() | set(golden.meta["no_grad"]) - {"dummy_tensor"}
    gap, scale = golden.meta["grad_max_abs_f32_vs_f64"], golden.meta["grad_absmax"]
    for key, theirs in wanted.items():
        reading.assert_within(found[key], theirs, gap, scale, what=key)
        if key not in golden.meta["grad_numerically_zero"]:  # those hold only rounding noise
            assert np.abs(found[key] - theirs).max() <= 1e-3 * np.abs(theirs).max(), key
    reading.assert_within(reading.channels_first(by_input), golden.arrays["grad_input"], gap, scale)


def test_golden_upkern_grows_every_kernel_and_the_grown_network_matches_upstream():
    golden = reading.Golden("upkern_k3_to_k5")
    small, source, _ = build(golden.group("src"), golden.meta["src_ctor"])
    large, wanted, _ = build(golden.group("dst"), golden.meta["dst_ctor"])
    wanted = paths.flatten(wanted)
    grown, report = loading.merge(wanted, paths.flatten(source), grow_kernels=True)
    assert grown.keys() == wanted.keys() and not report.new and not report.dropped
    assert set(report.grown) == {path for path in wanted if path.endswith("conv1/kernel")}
    for path, theirs in wanted.items():
        np.testing.assert_allclose(grown[path], theirs, rtol=0, atol=1e-7, err_msg=path)
    x, gap = golden.input, golden.meta["max_abs_f32_vs_f64"][0]
    for model, params, theirs in ((small, source, "output_src"), (large, paths.unflatten(grown), "output_dst")):
        reading.assert_within(reading.channels_first(outputs(model, params, x)), golden.arrays[theirs], gap)

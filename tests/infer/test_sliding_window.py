"""The sliding window against MONAI's results and against sums written out in numpy."""

import functools
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mednext_jax.infer import windows
from mednext_jax.infer.sliding_window import SlidingWindow

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "sliding_window.npz")
CASES = {case["name"]: case for case in json.loads(str(GOLDEN["meta"]))["cases"]}


def golden_network(params, x, instance_norm=False):
    """The golden file's network: a 3x3x3 convolution, then optionally instance norm over the window."""
    y = jax.lax.conv_general_dilated(
        x, params["weight"], (1, 1, 1), "SAME", dimension_numbers=("NDHWC", "OIDHW", "NDHWC")
    )
    y = y + params["bias"]
    if instance_norm:
        mean, variance = y.mean((1, 2, 3), keepdims=True), y.var((1, 2, 3), keepdims=True)
        y = (y - mean) / jnp.sqrt(variance + 1e-5)
    return y


def scaled(params, x):
    """A network whose windows agree wherever they overlap: the average equals the function itself."""
    return x[..., :2] * params["factor"]


PARAMS = {"factor": np.float32(2)}
IMAGE = np.random.default_rng(0).standard_normal((13, 18, 11, 3)).astype(np.float32)


@pytest.mark.parametrize("accumulate", ["device", "host"])
@pytest.mark.parametrize("instance_norm", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_sliding_window_equals_monai(name, instance_norm, accumulate):
    case = CASES[name]
    apply = functools.partial(golden_network, instance_norm=instance_norm)
    window = SlidingWindow(apply, case["roi"], 3, overlap=case["overlap"], mode=case["mode"],
                           windows_per_batch=case["sw_batch_size"], accumulate=accumulate)
    params = {"weight": GOLDEN["weight"], "bias": GOLDEN["bias"]}
    ours = window.predict(params, np.moveaxis(GOLDEN[f"{name}/input"][0], 0, -1))
    kind = "output_conv_instnorm" if instance_norm else "output_conv"
    theirs = np.moveaxis(GOLDEN[f"{name}/{kind}"][0], 0, -1)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6 * np.abs(theirs).max() + 1e-6)


@pytest.mark.parametrize("name", CASES)
def test_window_positions_and_weights_equal_monai(name):
    case = CASES[name]
    shape = np.maximum(case["volume"], case["roi"])
    assert len(windows.window_starts(shape, case["roi"], case["overlap"])) == case["windows"]
    weights = windows.importance_map(case["roi"], case["mode"], 0.125)
    theirs = GOLDEN[f"{name}/importance_map"] if case["mode"] == "gaussian" else 1
    np.testing.assert_allclose(weights, theirs, rtol=1e-5)


def test_windows_cover_every_voxel_and_end_with_the_volume():
    starts = windows.window_starts((21, 8, 9), (8, 8, 8), 0.3)
    assert sorted(set(starts[:, 0])) == [0, 5, 10, 13]  # steps of int(8 * 0.7)
    assert set(starts[:, 1]) == {0}
    assert sorted(set(starts[:, 2])) == [0, 1]


def test_windows_that_fill_up_the_last_batch_do_not_count():
    single = SlidingWindow(lambda p, x: x.cumsum(2), (8, 8, 8), 3).predict({}, IMAGE)
    for windows_per_batch in (4, 5):  # 18 windows: 2 and 3 left over; 4 also spreads over the four devices
        many = SlidingWindow(lambda p, x: x.cumsum(2), (8, 8, 8), 3, windows_per_batch=windows_per_batch)
        np.testing.assert_allclose(many.predict({}, IMAGE), single, atol=1e-5)


@pytest.mark.parametrize("windows_per_batch", [3, 4])
def test_flips_average_the_probabilities_of_all_eight_mirror_images(windows_per_batch):
    def apply(params, x):  # sees left from right on every axis
        depth, height, width = jnp.meshgrid(*[jnp.arange(8.0)] * 3, indexing="ij")
        return x[..., :2] * (depth + 2 * height + width)[..., None] / 10

    image = IMAGE[:8, :8, :8]
    expected = np.zeros((8, 8, 8, 2))
    for mirror in itertools.product((False, True), repeat=3):
        axes = tuple(axis for axis in range(3) if mirror[axis])
        logits = np.flip(np.asarray(apply({}, np.flip(image, axes)[None])[0]), axes)
        expected += 1 / (1 + np.exp(-logits)) / 8
    window = SlidingWindow(apply, (8, 8, 8), 2, flips=True, activation="sigmoid",
                           windows_per_batch=windows_per_batch)
    np.testing.assert_allclose(window.predict({}, image), expected, atol=1e-6)


def test_softmax_probabilities_sum_to_one():
    window = SlidingWindow(lambda p, x: 5 * x, (8, 16, 8), 3, activation="softmax")
    np.testing.assert_allclose(window.predict({}, IMAGE).sum(-1), 1, atol=1e-5)


def test_network_is_compiled_once_for_volumes_of_many_shapes():
    traces = []

    def apply(params, x):
        traces.append(x.shape)
        return scaled(params, x)

    window = SlidingWindow(apply, (8, 8, 8), 2)
    for shape in ((13, 18, 11), (9, 8, 40), (3, 70, 5)):
        image = np.random.default_rng(1).standard_normal((*shape, 3)).astype(np.float16)
        expected = 2 * image[..., :2].astype(np.float32)
        np.testing.assert_allclose(window.predict(PARAMS, image), expected, rtol=1e-5)
    assert traces == [(1, 8, 8, 8, 3)]


def test_first_output_is_taken_from_a_network_with_deep_supervision():
    window = SlidingWindow(lambda p, x: [scaled(p, x), x[:, ::2]], (8, 8, 8), 2)
    np.testing.assert_allclose(window.predict(PARAMS, IMAGE), 2 * IMAGE[..., :2], rtol=1e-5)


def test_parameters_may_lie_on_several_devices():
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    spread = jax.device_put(PARAMS, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    for windows_per_batch in (1, 4):
        window = SlidingWindow(scaled, (8, 8, 8), 2, windows_per_batch=windows_per_batch)
        np.testing.assert_allclose(window.predict(spread, IMAGE), 2 * IMAGE[..., :2], rtol=1e-5)


@pytest.mark.parametrize(("windows_per_batch", "size"), [(4, 4), (3, 1)])
def test_the_network_is_traced_within_the_mesh_that_computes_the_windows(windows_per_batch, size):
    seen = []  # by which kernels for GPUs are divided over several devices

    def apply(params, x):
        seen.append(jax.sharding.get_abstract_mesh())
        return scaled(params, x)

    SlidingWindow(apply, (8, 8, 8), 2, windows_per_batch=windows_per_batch).predict(PARAMS, IMAGE)
    assert {(mesh.axis_names, mesh.size) for mesh in seen} == {(("data",), size)}


def test_auto_goes_to_the_host_when_the_volume_does_not_fit():
    stored = 4 * 32 * 32 * 32 * (3 + 2 + 2 + 1)  # volume, sums, result and weight, rounded up to 32 voxels
    fits = SlidingWindow(scaled, (8, 8, 8), 2, device_bytes=stored)
    too_small = SlidingWindow(scaled, (8, 8, 8), 2, device_bytes=stored - 1)
    assert fits._fits_device((13, 18, 11), 3) and not too_small._fits_device((13, 18, 11), 3)
    np.testing.assert_allclose(fits.predict(PARAMS, IMAGE), too_small.predict(PARAMS, IMAGE), rtol=1e-6)


def test_sums_are_updated_in_place():
    window = SlidingWindow(scaled, (8, 8, 8), 2, windows_per_batch=2)
    sums, weighted = jnp.zeros((64, 64, 64, 3)), jnp.zeros((2, 8, 8, 8, 3))
    lowered = window._programs.add.lower(sums, weighted, np.zeros((2, 3), np.int32))
    memory = lowered.compile().memory_analysis()
    assert memory.alias_size_in_bytes == sums.nbytes
    assert memory.temp_size_in_bytes < 2 * weighted.nbytes


@pytest.mark.parametrize("accumulate", ["device", "host"])
def test_progress_counts_up_to_all_windows(accumulate):
    seen = []
    window = SlidingWindow(scaled, (8, 8, 8), 2, windows_per_batch=5, accumulate=accumulate)
    window.predict(PARAMS, IMAGE, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (3 * 4 * 2, 24)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.parametrize("accumulate", ["device", "host"])
def test_prediction_makes_no_hidden_transfers(accumulate):
    window = SlidingWindow(scaled, (8, 8, 8), 2, accumulate=accumulate)
    window.predict(PARAMS, IMAGE)
    with jax.transfer_guard("disallow"):
        window.predict(PARAMS, IMAGE)


@pytest.mark.parametrize(
    ("change", "line"),
    [({"overlap": 1.0}, "overlap is 1.0"), ({"mode": "linear"}, "mode is 'linear'"),
     ({"patch_voxels": (8, 8)}, "patch_voxels"), ({"activation": "relu"}, "activation is 'relu'"),
     ({"accumulate": "disk"}, "accumulate is 'disk'"), ({"windows_per_batch": 0}, "windows_per_batch is 0")],
)  # fmt: skip
def test_impossible_options_are_refused(change, line):
    with pytest.raises(ValueError, match=line):
        SlidingWindow(**{"apply": scaled, "patch_voxels": (8, 8, 8), "n_outputs": 2, **change})


def test_network_with_another_number_of_outputs_is_refused():
    with pytest.raises(ValueError, match="returns"):
        SlidingWindow(scaled, (8, 8, 8), 5).predict(PARAMS, IMAGE)

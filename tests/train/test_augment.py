"""Augmentation against NumPy, SciPy and hand-worked cases; odd, unequal shapes."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from scipy import ndimage

from mednext_jax.train import augment as augmentation
from mednext_jax.train import resample
from mednext_jax.train.augment import DEFAULTS, augment

OFF = {name: 0.0 for name in DEFAULTS if name.endswith("_probability")}
INTENSITIES = {**OFF, **{f"{name}_probability": 1.0 for name, *_ in augmentation.INTENSITIES}}
KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def batch():
    """Four samples (9, 11, 10) with a border of exact zeros, as outside the brain."""
    generator = np.random.default_rng(0)
    image = np.zeros((4, 9, 11, 10, 4), np.float32)
    image[:, 1:-1, 2:-1, 1:-2] = generator.standard_normal((4, 7, 8, 7, 4)) * [1, 2, 3, 4] + [0, 1, 2, 3]
    label = np.zeros(image.shape[:-1], np.int32)
    label[:, 2:-2, 3:-3, 2:-3] = generator.integers(0, 4, (4, 5, 5, 5))
    return image, label


@cache
def compiled(settings):
    return jax.jit(lambda key, *arrays: augment(key, *arrays, dict(settings)))


def run(batch, config, key=KEY):
    image, label = compiled(tuple(config.items()))(key, *batch)
    return np.asarray(image), np.asarray(label)


def test_parameters_are_drawn_per_sample_and_channel_within_their_range(batch):
    image, _ = run(batch, {**OFF, "brightness_probability": 1.0, "brightness_shift": (0.1, 0.3)})
    inside = (batch[0] != 0).any(-1)
    shifts = np.stack([(image - batch[0])[row][inside[row]].mean(0) for row in range(4)])
    assert (0.1 <= shifts).all() and (shifts <= 0.3).all()
    assert len(np.unique(shifts.round(4))) == 16


def test_nothing_changes_when_all_probabilities_are_zero(batch):
    image, label = run(batch, OFF)
    np.testing.assert_array_equal(image, batch[0])
    np.testing.assert_array_equal(label, batch[1])


def test_transform_of_probability_zero_is_not_in_the_program(batch):
    def program(config):
        return jax.jit(lambda key, *arrays: augment(key, *arrays, config)).lower(KEY, *batch).as_text()

    off, noise = program(OFF), program({**OFF, "noise_probability": 0.5})
    assert "stablehlo.case" not in off and "gather" not in off and "erf_inv" not in off
    assert noise.count("stablehlo.case") == 1 and "erf_inv" in noise and "stablehlo.gather" not in noise


def test_certain_flip_reverses_all_axes_of_image_and_label(batch):
    image, label = run(batch, {**OFF, "flip_probability": 1.0})
    np.testing.assert_array_equal(image, batch[0][:, ::-1, ::-1, ::-1])
    np.testing.assert_array_equal(label, batch[1][:, ::-1, ::-1, ::-1])


def test_flips_are_drawn_per_sample_and_axis():
    image = np.arange(64 * 8, dtype=np.float32).reshape(64, 2, 2, 2, 1)
    label = image[..., 0].astype(np.int32)
    ours, our_label = run((image, label), {**OFF, "flip_probability": 0.5})
    np.testing.assert_array_equal(ours[..., 0], our_label)
    corners = ours[:, 0, 0, 0, 0].astype(int) - 8 * np.arange(64)  # 0 to 7: which corner came to the front
    axes = np.stack([corners // 4, corners // 2 % 2, corners % 2])
    assert len(set(corners)) == 8
    assert (np.abs(axes.mean(axis=1) - 0.5) < 0.2).all()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_rotation_by_90_degrees_is_rot90(axis):
    shape = [9, 9, 9]
    shape[axis] = 5
    image = np.random.default_rng(1).standard_normal((*shape, 3)).astype(np.float32)
    label = np.random.default_rng(2).integers(0, 4, shape).astype(np.uint8)
    angles = jnp.zeros(3).at[axis].set(jnp.pi / 2)
    inverse = resample.rotation(angles).T
    first, second = (other for other in range(3) if other != axis)
    turned = partial(np.rot90, k=1, axes=(first, second))
    ours = resample.affine(image, inverse, jnp.zeros(3))
    np.testing.assert_allclose(ours, turned(image), atol=1e-4)
    ours = np.asarray(resample.affine_nearest(label, inverse, jnp.zeros(3)))
    assert ours.dtype == np.uint8
    np.testing.assert_array_equal(ours, turned(label))


def test_rotation_is_orthonormal_and_about_the_axes_in_turn():
    matrix = np.asarray(resample.rotation(jnp.array([0.3, -0.7, 1.1])))
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(3), atol=1e-6)
    assert np.linalg.det(matrix) == pytest.approx(1)
    one_by_one = np.eye(3)
    for angles in ([0.3, 0, 0], [0, -0.7, 0], [0, 0, 1.1]):
        one_by_one = np.asarray(resample.rotation(jnp.array(angles))) @ one_by_one
    np.testing.assert_allclose(matrix, one_by_one, atol=1e-6)


def test_affine_equals_scipy():
    shape = (9, 12, 10)
    image = np.random.default_rng(1).standard_normal((*shape, 2)).astype(np.float32)
    inverse = np.array([[0.9, 0.3, 0.1], [-0.2, 1.1, 0.2], [0.1, -0.3, 0.8]])
    offset = np.array([0.7, -1.3, 0.4])
    middle = (np.array(shape) - 1) / 2
    expected = np.stack(
        [
            ndimage.affine_transform(
                np.pad(image[..., channel], 2), inverse, middle + 2 - inverse @ (middle + 2) + offset, order=1
            )[2:-2, 2:-2, 2:-2]
            for channel in range(2)
        ],
        axis=-1,
    )
    ours = jax.jit(resample.affine)(
        image, jnp.asarray(inverse, jnp.float32), jnp.asarray(offset, jnp.float32)
    )
    np.testing.assert_allclose(ours, expected, atol=2e-5)


def test_scale_above_one_enlarges():
    label = np.zeros((15, 15, 15), np.int32)
    label[6:9, 6:9, 6:9] = 3
    config = {**OFF, "affine_probability": 1.0, "rotation_deg": 0.0, "scale": (3.0, 3.0)}
    image, enlarged = run((np.zeros((1, 15, 15, 15, 1)), label[None]), config)
    assert (enlarged == 3).sum() == 9**3


def test_affine_keeps_label_values_and_moves_image_and_label_alike(batch):
    generator = np.random.default_rng(0)
    label = np.zeros((2, 21, 20, 19), np.int32)
    label[:, 5:-5, 5:-5, 5:-5] = generator.choice([1, 3], (2, 1, 1, 1))
    image = label[..., None].astype(np.float32)
    moved, moved_label = run((image, label), {**OFF, "affine_probability": 1.0, "translation_voxels": 2.0})
    assert set(np.unique(moved_label)) == set(np.unique(label))
    assert np.mean(moved_label != label) > 0.01
    assert np.mean(np.abs(moved[..., 0] - moved_label) < 1.5) > 0.99  # interpolation blurs edges and corners


def test_background_stays_exactly_zero_under_all_intensity_changes(batch):
    image, label = run(batch, INTENSITIES)
    outside = (batch[0] == 0).all(-1)
    assert not image[outside].any()
    assert (image[~outside] != batch[0][~outside]).mean() > 0.9
    np.testing.assert_array_equal(label, batch[1])


def test_empty_crop_stays_empty_and_finite(batch):
    image, label = run((np.zeros_like(batch[0]), np.zeros_like(batch[1])), INTENSITIES)
    assert not image.any() and not label.any()


def test_same_key_same_output_and_other_keys_others(batch):
    first, again, other = (run(batch, {}, jax.random.key(seed)) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    assert (first[0] != other[0]).any()
    twice = tuple(np.stack([array[0]] * 4) for array in batch)
    image, _ = run(twice, {**OFF, "noise_probability": 1.0})
    assert all((image[0] != image[row]).any() for row in range(1, 4))


def test_one_transform_does_not_depend_on_the_others(batch):
    alone, _ = run(batch, {**OFF, "brightness_probability": 0.5})
    with_more, _ = run(batch, {**OFF, "brightness_probability": 0.5, "gamma_probability": 1e-9})
    np.testing.assert_array_equal(alone, with_more)


def test_one_and_four_devices_give_the_same_batch_without_communication(batch):
    expected = run(batch, {})
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    sharded = [jax.device_put(array, sharding) for array in batch]
    step = jax.jit(lambda key, *arrays: augment(key, *arrays, {}, mesh)).lower(KEY, *sharded).compile()
    image, label = step(KEY, *sharded)
    assert image.sharding.is_equivalent_to(sharding, image.ndim)
    np.testing.assert_allclose(image, expected[0], atol=1e-5)
    np.testing.assert_array_equal(label, expected[1])
    assert not any(
        word in step.as_text() for word in ("all-gather", "all-reduce", "all-to-all", "collective")
    )


def brain(image, inside):
    return image[inside]  # (voxels, C)


def one_sample(batch):
    image = batch[0][0]
    inside = (image != 0).any(-1)
    return image, inside, (KEY, jnp.asarray(image), jnp.asarray(inside)[..., None])


def test_gamma_equals_its_formula(batch):
    image, inside, arguments = one_sample(batch)
    ours = brain(np.asarray(augmentation.change_gamma(*arguments, jnp.full((3, 4), 1.4))), inside)
    values = brain(image, inside).astype(np.float64)
    low, high = values.min(0), values.max(0)
    changed = ((values - low) / (high - low)) ** 1.4
    expected = (changed - changed.mean(0)) / changed.std(0) * values.std(0) + values.mean(0)
    np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_contrast_equals_its_formula(batch):
    image, inside, arguments = one_sample(batch)
    ours = brain(np.asarray(augmentation.change_contrast(*arguments, jnp.full((3, 4), 1.25))), inside)
    values = brain(image, inside)
    expected = np.clip((values - values.mean(0)) * 1.25 + values.mean(0), values.min(0), values.max(0))
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_brightness_shifts_every_channel_by_its_own_constant(batch):
    image, inside, arguments = one_sample(batch)
    shifts = np.tile(np.float32([-0.25, 0.1, 0.0, 0.2]), (3, 1))
    shift = brain(np.asarray(augmentation.shift_brightness(*arguments, shifts)) - image, inside)
    np.testing.assert_allclose(shift, np.broadcast_to(shifts[0], shift.shape), atol=1e-6)


def test_noise_has_the_stated_standard_deviation_and_no_mean():
    image = jnp.ones((24, 25, 23, 2))
    noise = np.asarray(augmentation.add_noise(KEY, image, None, jnp.full((3, 2), 0.2))) - 1
    assert np.abs(noise.mean((0, 1, 2))).max() < 4 * 0.2 / np.sqrt(24 * 25 * 23)
    np.testing.assert_allclose(noise.std((0, 1, 2)), 0.2, rtol=0.03)
    assert abs(np.corrcoef(noise[..., 0].ravel(), noise[..., 1].ravel())[0, 1]) < 0.04


def test_blur_equals_scipy(batch):
    image, _, arguments = one_sample(batch)
    ours = np.asarray(augmentation.blur(*arguments, jnp.full((3, 4), 0.8)))
    wide = np.pad(image, [(12, 12)] * 3 + [(0, 0)])  # scipy extends the border, ours renormalises the weights
    expected = [
        ndimage.gaussian_filter(wide[..., c], 0.8, truncate=12)[12:-12, 12:-12, 12:-12] for c in range(4)
    ]
    weight = ndimage.gaussian_filter(np.pad(np.ones(image.shape[:3]), 12), 0.8, truncate=12)[
        12:-12, 12:-12, 12:-12
    ]
    np.testing.assert_allclose(ours, np.stack(expected, -1) / weight[..., None], atol=1e-3)


def test_half_resolution_is_every_other_voxel_interpolated():
    matrix = np.asarray(resample.coarse_matrix(8, jnp.array([0.5])))[0]
    # Coarse points 0 to 3 lie at 0.5, 2.5, 4.5, 6.5 and hold the voxels 1, 3, 5, 7; each voxel in between is
    # interpolated, voxel 1 at a quarter of the way from the first to the second.
    expected = np.zeros((8, 8))
    expected[0, 1] = expected[7, 7] = 1
    for row, (one, other) in enumerate([(1, 3), (1, 3), (3, 5), (3, 5), (5, 7), (5, 7)], start=1):
        expected[row, one], expected[row, other] = (0.75, 0.25) if row % 2 else (0.25, 0.75)
    np.testing.assert_allclose(matrix, expected, atol=1e-6)


def test_full_resolution_changes_nothing(batch):
    image, _, arguments = one_sample(batch)
    ours = augmentation.lower_resolution(*arguments, jnp.full((3, 4), 1.0))
    np.testing.assert_allclose(ours, image, atol=1e-6)


def test_bias_field_is_a_smooth_gain_of_the_stated_strength():
    field = np.asarray(resample.smooth_field(KEY, (40, 33, 36, 4), augmentation.BIAS_FIELD_WAVES))
    np.testing.assert_allclose(np.abs(field).max((0, 1, 2)), 1, rtol=1e-5)
    assert all(np.abs(np.diff(field, axis=axis)).max() < 0.35 for axis in range(3))
    assert not np.allclose(field[..., 0], field[..., 1])


def test_bias_field_keeps_mean_and_standard_deviation_of_the_brain(batch):
    image, inside, arguments = one_sample(batch)
    ours = brain(np.asarray(augmentation.apply_bias_field(*arguments, jnp.full((3, 4), 0.4))), inside)
    values = brain(image, inside)
    np.testing.assert_allclose(ours.mean(0), values.mean(0), atol=1e-4)
    np.testing.assert_allclose(ours.std(0), values.std(0), rtol=1e-4)
    assert np.abs(ours - values).max() > 0.1


@pytest.mark.parametrize(
    "config, message",
    [
        ({"flip": 0.5}, "unknown augmentation setting 'flip'"),
        ({"noise_probability": 1.5}, "noise_probability is 1.5"),
        ({"scale": (1.4, 0.7)}, "scale is"),
        ({"gamma_exponent": (0.0, 1.0)}, "positive"),
        ({"noise_std": 0.3}, "two numbers"),
    ],
)
def test_bad_setting_is_named(config, message):
    with pytest.raises(ValueError, match=message):
        augmentation.check_config(config)

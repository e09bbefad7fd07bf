"""Augmentation on the device: flips, rotation and scale, and what scanners do to intensities.

    image, label = augment(fold_in(key(seed), step), image, label, DEFAULTS)

The host only cuts crops; everything here is jitted together with (or next to) the training step.

* Each transform has its own probability and range (``DEFAULTS``). One with probability 0 is not in the
  compiled program at all; the others are real branches, taken sample by sample: a skipped one costs nothing.
* Sample ``i`` of the global batch uses ``fold_in(key, i)``, and each transform its own fixed part of that:
  the result depends neither on the number of devices nor on which other transforms are switched on.
* Intensities are z-scores with exact zeros outside the brain. Voxels that are zero in every modality count
  as outside and stay exactly zero; modalities are changed independently of each other.

Ranges follow nnU-Net's where it has the transform (Isensee et al., Nature Methods 2021); brightness shifts
instead of scaling, since scaling a z-score is what contrast does. The bias field is ours: the cohorts this
package adapts to are low-field.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from mednext_jax.train import resample

DEFAULTS = {
    "flip_probability": 0.5,  # of each axis
    "affine_probability": 0.3,
    "rotation_deg": 30.0,  # largest angle about each axis
    "scale": (0.7, 1.4),  # above 1 enlarges; the same for all axes
    "translation_voxels": 0.0,  # largest shift along each axis
    "noise_probability": 0.15,
    "noise_std": (0.0, 0.3),  # in standard deviations of the brain
    "blur_probability": 0.2,
    "blur_sigma_voxels": (0.5, 1.0),
    "brightness_probability": 0.15,
    "brightness_shift": (-0.25, 0.25),
    "contrast_probability": 0.15,
    "contrast_factor": (0.75, 1.25),
    "low_resolution_probability": 0.25,
    "low_resolution_zoom": (0.5, 1.0),  # of each axis
    "bias_field_probability": 0.2,
    "bias_field_strength": (0.0, 0.4),  # largest logarithm of the gain
    "gamma_probability": 0.3,
    "gamma_exponent": (0.7, 1.5),
}

DATA_AXIS = "data"
BIAS_FIELD_WAVES = 4  # cosines per axis: at most one and a half periods across the patch


def check_config(config: Mapping) -> dict:
    """Returns ``DEFAULTS`` with the entries of ``config``.

    Raises:
      ValueError: unknown name, probability outside [0, 1], or a range that is not two rising numbers.
    """
    if unknown := sorted(set(config) - set(DEFAULTS)):
        raise ValueError(f"unknown augmentation setting {unknown[0]!r}; known: {', '.join(sorted(DEFAULTS))}")
    settings = {**DEFAULTS, **config}
    for name, value in settings.items():
        if isinstance(DEFAULTS[name], tuple):
            value = settings[name] = tuple(float(v) for v in np.atleast_1d(value))
            if len(value) != 2 or not value[0] <= value[1]:
                raise ValueError(f"augment.{name} is {value}: two numbers (lowest, highest) are needed")
        elif name.endswith("_probability") and not 0 <= value <= 1:
            raise ValueError(f"augment.{name} is {value}: a number from 0 to 1 is needed")
    for name in ("scale", "low_resolution_zoom", "gamma_exponent", "blur_sigma_voxels"):
        if settings[name][0] <= 0:
            raise ValueError(f"augment.{name} is {settings[name]}: positive numbers are needed")
    return settings


def augment(
    key: jax.Array, image: jax.Array, label: jax.Array, config: Mapping, mesh: Mesh | None = None
) -> tuple[jax.Array, jax.Array]:
    """Augments a batch, sample by sample. To be called under ``jit``, with ``config`` static.

    Args:
      key: of this step, ``fold_in(key(seed), step)``.
      image: (B, D, H, W, C) float32.
      label: (B, D, H, W) integers.
      config: see ``DEFAULTS``; missing entries take the default.
      mesh: with a "data" axis over which the batch is sharded: each device then augments its own samples.
        Without it a sharded batch would first be gathered on every device, since samples are visited in turn.

    Returns:
      Image and label of the same shapes and dtypes; labels contain only values that were there, and 0.

    Raises:
      ValueError: see ``check_config``.
    """
    settings = check_config(config)

    def one(sample: tuple) -> tuple:
        index, *arrays = sample
        return _augment_sample(jax.random.fold_in(key, index), *arrays, settings)

    def samples(index: jax.Array, image: jax.Array, label: jax.Array) -> tuple:
        return jax.lax.map(one, (index, image, label))

    if mesh is not None:
        batch = PartitionSpec(DATA_AXIS)
        samples = jax.shard_map(samples, mesh=mesh, in_specs=batch, out_specs=batch)
    return samples(jnp.arange(len(image)), image.astype(jnp.float32), label)


def _augment_sample(key: jax.Array, image: jax.Array, label: jax.Array, settings: dict) -> tuple:
    """Space first; then intensities in the order in which a scan suffers them, receiver noise last."""
    # All decisions and parameters are drawn at once: a generator per transform doubles the compile time.
    keys = jax.random.split(key, TRANSFORMS + 1)
    channels = image.shape[-1]
    draws = jax.random.uniform(keys[TRANSFORMS], (TRANSFORMS, 1 + 3 * channels))

    def maybe(number: int, name: str, transform: Callable, value):
        """``transform(value)`` with its probability; no branch where the outcome is certain."""
        probability = settings[f"{name}_probability"]
        if probability == 0:
            return value
        if probability == 1:
            return transform(value)
        return jax.lax.cond(draws[number, 0] < probability, transform, lambda same: same, value)

    pair = maybe(0, "affine", partial(_affine, keys[0], settings=settings), (image, label))
    for axis in range(3):
        pair = maybe(1 + axis, "flip", partial(_flip, axis=axis), pair)
    image, label = pair
    inside = jnp.any(image != 0, axis=-1, keepdims=True)
    for number, (name, parameter, transform) in enumerate(INTENSITIES, start=4):
        low, high = settings[parameter]
        value = low + (high - low) * draws[number, 1:].reshape(3, channels)

        def change(image, transform=transform, key=keys[number], value=value):
            return jnp.where(inside, transform(key, image, inside, value), 0.0)

        image = maybe(number, name, change, image)
    return image, label


def _flip(pair: tuple, axis: int) -> tuple:
    image, label = pair
    return jnp.flip(image, axis), jnp.flip(label, axis)


def _affine(key: jax.Array, pair: tuple, settings: dict) -> tuple:
    image, label = pair
    draws = jax.random.uniform(key, (7,), minval=-1.0)
    rotation = resample.rotation(jnp.deg2rad(settings["rotation_deg"]) * draws[:3])
    low, high = np.log(settings["scale"])  # a factor and its inverse are equally likely
    scale = jnp.exp((low + high) / 2 + (high - low) / 2 * draws[3])
    offset = settings["translation_voxels"] * draws[4:]
    inverse = rotation.T / scale  # from the augmented grid back to the given one
    return resample.affine(image, inverse, offset), resample.affine_nearest(label, inverse, offset)


def _statistics(image: jax.Array, inside: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation (C,) of the brain; 0 and 0 without one."""
    count = jnp.maximum(inside.sum(), 1)
    mean = jnp.where(inside, image, 0).sum((0, 1, 2)) / count
    variance = jnp.where(inside, (image - mean) ** 2, 0).sum((0, 1, 2)) / count
    return mean, jnp.sqrt(variance)


def _range(image: jax.Array, inside: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Lowest and highest value (C,) of the brain; both 0 without one."""
    low = jnp.where(inside, image, jnp.inf).min((0, 1, 2))
    high = jnp.where(inside, image, -jnp.inf).max((0, 1, 2))
    return jnp.where(low <= high, low, 0.0), jnp.where(low <= high, high, 0.0)


def _restandardise(image: jax.Array, inside: jax.Array, mean: jax.Array, std: jax.Array) -> jax.Array:
    """Gives the brain the stated mean and standard deviation per channel, as preprocessing would have."""
    new_mean, new_std = _statistics(image, inside)
    return (image - new_mean) / jnp.maximum(new_std, 1e-6) * std + mean


def change_gamma(key: jax.Array, image: jax.Array, inside: jax.Array, value: jax.Array) -> jax.Array:
    """``u ** exponent`` on the brain's values scaled to [0, 1]; mean and standard deviation are kept.

    Args (of this and the following transforms):
      key: of this transform and sample.
      image: (D, H, W, C) float32 z-scores.
      inside: (D, H, W, 1) bool, the brain; the caller zeroes the rest.
      value: (3, C) of the transform's parameter, for each axis and channel; where there is nothing to vary by
        axis, the first row counts.
    """
    low, high = _range(image, inside)
    mean, std = _statistics(image, inside)
    unit = jnp.clip((image - low) / jnp.maximum(high - low, 1e-6), 0.0, 1.0)
    return _restandardise(unit ** value[0], inside, mean, std)


def change_contrast(key: jax.Array, image: jax.Array, inside: jax.Array, value: jax.Array) -> jax.Array:
    """Stretches about the brain's mean; clipped to the brain's former range, as nnU-Net does."""
    low, high = _range(image, inside)
    mean, _ = _statistics(image, inside)
    return jnp.clip((image - mean) * value[0] + mean, low, high)


def shift_brightness(key: jax.Array, image: jax.Array, inside: jax.Array, value: jax.Array) -> jax.Array:
    """Adds a constant per channel, in standard deviations of the brain."""
    return image + value[0]


def apply_bias_field(key: jax.Array, image: jax.Array, inside: jax.Array, value: jax.Array) -> jax.Array:
    """Multiplies by a smooth gain, ``exp`` of a random sum of low-frequency cosines.

    A coil scales the raw signal, which z-scores no longer are: intensities are counted from the brain's
    darkest voxel, and mean and standard deviation are restored after, as z-scoring a shaded scan would.
    """
    field = resample.smooth_field(key, image.shape, BIAS_FIELD_WAVES)
    low, _ = _range(image, inside)
    mean, std = _statistics(image, inside)
    shaded = (image - low) * jnp.exp(value[0] * field)
    return _restandardise(shaded, inside, mean, std)


def blur(key: jax.Array, image: jax.Array, inside: jax.Array, value: jax.Array) -> jax.Array:
    """Gaussian blur, sigma in voxels."""
    return resample.along_axes(image, lambda size, axis: resample.gaussian_matrix(size, value[0]))


def lower_resolution(key: jax.Array, image: jax.Array, inside: jax.Array, value: jax.Array) -> jax.Array:
    """Samples a coarser grid and interpolates back, with its own zoom per axis: thick slices occur."""
    return resample.along_axes(image, lambda size, axis: resample.coarse_matrix(size, value[axis]))


def add_noise(key: jax.Array, image: jax.Array, inside: jax.Array, value: jax.Array) -> jax.Array:
    """Adds Gaussian noise, independent between voxels and channels."""
    # Drawn as one row, with the same result: bits for four axes at once take XLA a second longer to compile.
    return image + value[0] * jax.random.normal(key, (image.size,)).reshape(image.shape)


# name of the probability, of the range, and what is done; the position is part of the random stream
INTENSITIES = (
    ("gamma", "gamma_exponent", change_gamma),
    ("contrast", "contrast_factor", change_contrast),
    ("brightness", "brightness_shift", shift_brightness),
    ("bias_field", "bias_field_strength", apply_bias_field),
    ("blur", "blur_sigma_voxels", blur),
    ("low_resolution", "low_resolution_zoom", lower_resolution),
    ("noise", "noise_std", add_noise),
)
TRANSFORMS = 4 + len(INTENSITIES)  # affine, three flips, intensities

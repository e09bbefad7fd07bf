"""Segmentation losses: soft Dice with cross-entropy (exclusive labels) or binary cross-entropy (nested
regions).

Everything is computed in float32 whatever the logits' dtype. Sums run over the whole global array, so under
``jit`` with a sharded batch the batch Dice is that of the global batch, on any number of devices.

``dice_ce`` equals MONAI's ``DiceCELoss`` (``to_onehot_y=True, softmax=True``), values and gradients.
"""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import optax

SMOOTH = 1e-5  # MONAI's smooth_nr and smooth_dr: an empty class predicted empty has Dice 1, loss 0

Loss = Callable[[jax.Array, jax.Array], jax.Array]


def soft_dice_loss(probabilities: jax.Array, targets: jax.Array, batch_dice: bool = False) -> jax.Array:
    """One minus the soft Dice of each class.

    Args:
      probabilities: (B, *spatial, K) in [0, 1].
      targets: (B, *spatial, K), 0 or 1.
      batch_dice: pool the voxels of all samples before dividing.

    Returns: (B, K), or (1, K) with ``batch_dice``.
    """
    axes = tuple(range(0 if batch_dice else 1, probabilities.ndim - 1))
    overlap = jnp.sum(probabilities * targets, axes)
    size = jnp.sum(probabilities, axes) + jnp.sum(targets, axes)
    return jnp.atleast_2d(1 - (2 * overlap + SMOOTH) / (size + SMOOTH))


def dice_ce(
    logits: jax.Array,
    labels: jax.Array,
    include_background: bool = False,
    batch_dice: bool = False,
    dice_weight: float = 1.0,
    ce_weight: float = 1.0,
) -> jax.Array:
    """Soft Dice of the softmax plus cross-entropy averaged over all voxels, background included.

    Args:
      logits: (B, *spatial, K).
      labels: (B, *spatial) integers in [0, K).
      include_background: whether class 0 has a Dice term.

    Returns: a float32 scalar.
    """
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32))
    targets = jax.nn.one_hot(labels, logits.shape[-1], dtype=jnp.float32)
    first = 0 if include_background else 1
    dice = soft_dice_loss(jnp.exp(log_probabilities)[..., first:], targets[..., first:], batch_dice)
    # A product with the one-hot targets instead of a gather, which would not shard under explicit axes.
    cross_entropy = -jnp.sum(targets * log_probabilities, -1)
    return dice_weight * jnp.mean(dice) + ce_weight * jnp.mean(cross_entropy)


def region_targets(labels: jax.Array, regions: Mapping[str, Sequence[int]]) -> jax.Array:
    """Label map (B, *spatial) -> float32 masks (B, *spatial, R) in the order of ``regions``."""
    masks = [jnp.isin(labels, jnp.asarray(values, labels.dtype)) for values in regions.values()]
    return jnp.stack(masks, -1).astype(jnp.float32)


def dice_bce(
    logits: jax.Array,
    labels: jax.Array,
    regions: Mapping[str, Sequence[int]],
    batch_dice: bool = False,
    dice_weight: float = 1.0,
    ce_weight: float = 1.0,
) -> jax.Array:
    """Soft Dice of one sigmoid per region plus binary cross-entropy averaged over voxels and regions.

    Args:
      logits: (B, *spatial, R).
      labels: (B, *spatial) integers; the nested region masks are made from them here, on the device.
      regions: region name -> label values, as many as the logits have channels and in their order.

    Returns: a float32 scalar.
    """
    if logits.shape[-1] != len(regions):
        raise ValueError(
            f"the network has {logits.shape[-1]} outputs for {len(regions)} regions {list(regions)}"
        )
    logits = logits.astype(jnp.float32)
    targets = region_targets(labels, regions)
    dice = soft_dice_loss(jax.nn.sigmoid(logits), targets, batch_dice)
    cross_entropy = optax.sigmoid_binary_cross_entropy(logits, targets)
    return dice_weight * jnp.mean(dice) + ce_weight * jnp.mean(cross_entropy)


def deep_supervision_weights(n_outputs: int) -> list[float]:
    """1, 1/2, 1/4, ... normalised to sum 1: the full-resolution output counts most (nnU-Net, MedNeXt)."""
    weights = [0.5**i for i in range(n_outputs)]
    return [weight / sum(weights) for weight in weights]


def deep_supervision(loss: Loss, outputs: jax.Array | Sequence[jax.Array], labels: jax.Array) -> jax.Array:
    """``loss`` of one output, or its weighted sum over outputs of full, 1/2, 1/4, ... resolution.

    Lower heads see every 2nd, 4th, ... label (nearest neighbour): voxel ``i`` of a stride-2 convolution with
    padding 1 is centred on voxel ``2 i`` of its input.
    """
    if not isinstance(outputs, (list, tuple)):
        return loss(outputs, labels)
    total = jnp.zeros((), jnp.float32)
    for level, (weight, logits) in enumerate(
        zip(deep_supervision_weights(len(outputs)), outputs, strict=True)
    ):
        stride = (slice(None), *[slice(None, None, 2**level)] * (labels.ndim - 1))
        total += weight * loss(logits, labels[stride])
    return total


def make_loss(config: Mapping, output: str, regions: Mapping[str, Sequence[int]]) -> Callable:
    """The loss that a config describes, as ``loss(outputs, labels) -> scalar``.

    Args:
      config: ``batch_dice``, ``include_background``, ``dice_weight``, ``ce_weight``.
      output: ``"regions"`` (sigmoids, Dice + BCE) or ``"labels"`` (softmax, Dice + CE).
    """
    options = {
        "batch_dice": config["batch_dice"],
        "dice_weight": config["dice_weight"],
        "ce_weight": config["ce_weight"],
    }

    def single(logits: jax.Array, labels: jax.Array) -> jax.Array:
        if output == "regions":
            return dice_bce(logits, labels, regions, **options)
        return dice_ce(logits, labels, config["include_background"], **options)

    return lambda outputs, labels: deep_supervision(single, outputs, labels)

"""The range of every number in a config: a slip of the finger is told before a cohort is prepared."""

import math
from collections.abc import Mapping
from typing import Any

from mednext_jax import modeldir

INF = math.inf
BELOW_ONE = 1 - 1e-12
SEEDS = 2**32 - 1
MOST_PATCH_VOXELS = 2**28  # 640 cubed; guards memory against a slip, not against ambition

# field -> lowest and highest value, both allowed
RANGES = {
    "seed": (0, SEEDS), "data.order_seed": (-1, SEEDS), "data.subset_seed": (0, INF), "data.fold": (-1, INF),
    "data.max_train_cases": (0, INF), "data.batch_size": (1, INF), "data.foreground_fraction": (0, 1),
    "data.workers": (0, INF), "data.threads": (0, INF), "data.buffer": (0, INF),
    **{f"model.{name}": (0, modeldir.MOST[name]) for name in ("kernel_size", "n_channels", "block_counts", "exp_r")},
    "loss.dice_weight": (0, INF), "loss.ce_weight": (0, INF),
    "optim.peak_lr": (0, INF), "optim.weight_decay": (0, INF), "optim.b1": (0, BELOW_ONE), "optim.b2": (0, BELOW_ONE),
    "optim.eps": (0, INF), "optim.momentum": (0, 1), "optim.warmup_steps": (0, INF), "optim.total_steps": (1, INF),
    "optim.final_fraction": (0, 1), "optim.poly_power": (0, INF), "optim.plateau_factor": (0, 1),
    "optim.plateau_patience": (0, INF), "optim.clip_norm": (0, INF), "optim.accumulate": (1, INF),
    "optim.ema_decay": (0, 1), "optim.layer_decay": (0, 1), "optim.new_warmup_steps": (0, INF),
    "eval.every": (0, INF), "eval.max_cases": (0, INF), "eval.overlap": (0, 0.95), "eval.windows_per_device": (1, INF),
    "eval.patience": (0, INF), "log_every": (1, INF), "checkpoint_every": (1, INF), "resume_step": (0, INF),
    "max_bad_steps": (0, INF), "n_devices": (0, INF),
}  # fmt: skip


def check(config: Mapping[str, Any]) -> None:
    """Raises ValueError, naming the field, for a number that is NaN, infinite, or outside its range."""
    for name, value in _numbers(config):
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"config.{name} is {value}: a finite number is needed")
        low, high = RANGES.get(name, (-INF, INF))
        if not low <= value <= high:
            wanted = f"at least {low}" if high == INF else f"a number from {low} to {_shown(high)}"
            raise ValueError(f"config.{name} is {value}: {wanted} is needed")
    if (size := config["model"]["kernel_size"]) and size % 2 == 0:
        raise ValueError(f"config.model.kernel_size is {size}: an odd size is needed")


def _shown(high: float) -> str:
    return "below 1" if high == BELOW_ONE else str(high)


def check_patch(patch: Any, divisor: int) -> None:
    """Raises ValueError unless ``patch`` is three sizes that the network can halve, of a volume that could be read."""
    whole = all(isinstance(size, int) and size >= divisor and size % divisor == 0 for size in patch)
    if len(patch) != 3 or not whole:
        raise ValueError(f"config.data.patch_voxels is {tuple(patch)}: three sizes divisible by {divisor} are needed")
    if math.prod(patch) > MOST_PATCH_VOXELS:
        raise ValueError(
            f"config.data.patch_voxels is {tuple(patch)}: at most {MOST_PATCH_VOXELS} voxels are possible"
        )


def _numbers(value: Any, name: str = "") -> list[tuple[str, float]]:
    """All numbers of a config with the names of their fields; a number in a list has the list's."""
    if isinstance(value, Mapping):
        return [found for key, part in value.items() for found in _numbers(part, f"{name}.{key}" if name else key)]
    if isinstance(value, list | tuple):
        return [found for part in value for found in _numbers(part, name)]
    return [(name, value)] if isinstance(value, int | float) and not isinstance(value, bool) else []

"""All metrics of one case: a predicted against a true label map, region by region."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mednext_jax.evaluate import instances, lesionwise, overlap, policy, surface

# The order of columns and tables. `nsd_<tolerance>mm` stands between surface and lesion-wise metrics.
OVERLAP = ("dice", "iou", "sensitivity", "specificity", "precision")
VOLUME = ("volume_mm3", "reference_volume_mm3", "volume_difference_mm3")
DISTANCE = ("hd95_mm", "hd95_max_directed_mm", "hd95_pooled_mm", "assd_mm")
LESIONWISE = ("lesionwise_dice", "lesionwise_hd95_mm", "lesions_tp", "lesions_fp", "lesions_fn")
INSTANCE = ("instance_pq", "instance_rq", "instance_sq", "instances_tp", "instances_fp", "instances_fn")
HIGHER_IS_BETTER = frozenset(
    (*OVERLAP, "lesionwise_dice", "lesions_tp", "instance_pq", "instance_rq", "instance_sq", "instances_tp")
)


@dataclass(frozen=True)
class Settings:
    """What is measured and under which rules.

    Attributes:
      regions: region name to the label values it unites, in the order of the tables.
      challenge: key of `lesionwise.CHALLENGES`.
      tolerances_mm: of the normalised surface Dice.
      empty: key of `policy.POLICIES`.
    """

    regions: Mapping[str, tuple[int, ...]]
    challenge: str = "SSA"
    tolerances_mm: tuple[float, ...] = (0.5, 1.0, 2.0)
    empty: str = "penalise"

    def __post_init__(self):
        if self.challenge not in lesionwise.CHALLENGES:
            known = ", ".join(lesionwise.CHALLENGES)
            raise ValueError(f"unknown challenge {self.challenge!r}: choose from {known}")
        if self.empty not in policy.POLICIES:
            known = ", ".join(policy.POLICIES)
            raise ValueError(f"unknown policy {self.empty!r} for absent regions: choose from {known}")

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of all metrics, in the order of the tables."""
        nsd = tuple(nsd_name(t) for t in self.tolerances_mm)
        return OVERLAP + VOLUME + DISTANCE[:3] + nsd + DISTANCE[3:] + LESIONWISE + INSTANCE


@dataclass(frozen=True)
class RegionResult:
    """Values (absent regions resolved by the policy) and lesion table of one region of one case."""

    values: dict[str, float]
    lesions: tuple[lesionwise.Lesion, ...]


def nsd_name(tolerance_mm: float) -> str:
    """Column name of a surface Dice: 1.0 gives ``nsd_1mm``."""
    return f"nsd_{tolerance_mm:g}mm"


def higher_is_better(metric: str) -> bool:
    """Whether a larger value of the metric is the better one."""
    return metric in HIGHER_IS_BETTER or metric.startswith("nsd_")


def measure(
    pred: np.ndarray, truth: np.ndarray, spacing_mm: Sequence[float], settings: Settings
) -> dict[str, RegionResult]:
    """Measures two (D, H, W) integer label maps of one label scheme.

    Returns:
      region name to its result, in the order of ``settings.regions``.

    Raises:
      ValueError: the maps are not three-dimensional or differ in shape.
    """
    if pred.shape != truth.shape or pred.ndim != 3:
        raise ValueError(f"label maps must be 3-D and of one shape, got {pred.shape} and {truth.shape}")
    results = {}
    for name, values in settings.regions.items():
        masks = (overlap.region_masks(labels, {name: values})[name] for labels in (pred, truth))
        results[name] = measure_region(*masks, spacing_mm, settings)
    return results


def measure_region(pred: np.ndarray, truth: np.ndarray, spacing_mm, settings: Settings) -> RegionResult:
    """Measures two (D, H, W) bool masks; everything after the voxel counts works on their bounding box."""
    counts = overlap.confusion(pred, truth)
    pred, truth = surface.crop(pred, truth)
    voxel_mm3 = float(np.prod(np.asarray(spacing_mm, float)))
    volume, reference = (counts.tp + counts.fp) * voxel_mm3, (counts.tp + counts.fn) * voxel_mm3
    surfels = surface.surfel_distances(pred, truth, spacing_mm)
    borders = surface.border_distances(pred, truth, spacing_mm)
    lesions = lesionwise.score(pred, truth, spacing_mm, lesionwise.CHALLENGES[settings.challenge])
    matched = instances.match(pred, truth, spacing_mm)
    values = {name: getattr(counts, name) for name in OVERLAP}
    values |= {
        "volume_mm3": volume,
        "reference_volume_mm3": reference,
        "volume_difference_mm3": volume - reference,
        "hd95_mm": surface.hd_mm(surfels),
        "hd95_max_directed_mm": surface.hd_max_directed_mm(borders),
        "hd95_pooled_mm": surface.hd_pooled_mm(borders),
    }
    values |= {nsd_name(t): surface.nsd(surfels, t) for t in settings.tolerances_mm}
    values["assd_mm"] = surface.assd_mm(borders)
    values = policy.resolve_region(values, (volume == 0, reference == 0), settings.empty)
    values |= {
        "lesionwise_dice": lesions.dice,
        "lesionwise_hd95_mm": lesions.hd95_mm,
        "lesions_tp": lesions.tp,
        "lesions_fp": lesions.fp,
        "lesions_fn": lesions.fn,
        "instance_pq": matched.pq,
        "instance_rq": matched.rq,
        "instance_sq": matched.sq,
        "instances_tp": matched.tp,
        "instances_fp": matched.fp,
        "instances_fn": matched.fn,
    }
    return RegionResult(values, lesions.lesions)

"""From probabilities to label maps, and what may be cleaned up on the way.

Everything beyond thresholding is off by default. Voxels that lose a region fall to the region around it (ET
to NCR, NCR to oedema, oedema to background): the regions of a label map stay nested whatever is removed.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import ndimage

# Of the third place of BraTS-Africa 2024 (arXiv:2411.15872, ablation: 0.8930 -> 0.8963 lesion-wise Dice).
STRICT_THRESHOLDS = {"WT": 0.5, "TC": 0.7, "ET": 0.7}
NEIGHBOURS = np.ones((3, 3, 3), bool)  # 26-connectivity, as in the challenge's lesion-wise metrics

Regions = Mapping[str, Sequence[int]]


@dataclasses.dataclass(frozen=True)
class PostProcess:
    """How probabilities become labels.

    Attributes:
      thresholds: region -> probability from which a voxel belongs to it; 0.5 for regions not named. Not for
        networks that predict labels, whose most probable label wins.
      min_component_mm3: region -> volume; smaller connected components (26 neighbours) are removed. Off: {}.
      min_total_mm3: region -> volume; a region that is smaller as a whole is removed. ``{"ET": 200}`` is the
        usual rule against specks of ET in tumours without any. Off: {}.
    """

    thresholds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    min_component_mm3: Mapping[str, float] = dataclasses.field(default_factory=dict)
    min_total_mm3: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def check(self, regions: Regions) -> None:
        """Raise ValueError for a region that is unknown, a threshold outside (0, 1) or a negative volume."""
        for field in dataclasses.fields(self):
            for region, value in getattr(self, field.name).items():
                if region not in regions:
                    raise ValueError(f"{field.name} names the region {region!r}; known: {', '.join(regions)}")
                if field.name == "thresholds" and not 0 < value < 1:
                    raise ValueError(f"the threshold of {region} is {value}; it must lie between 0 and 1")
                if not value >= 0:
                    raise ValueError(f"{field.name} of {region} is {value}; it must be at least 0")

    def __call__(
        self, probabilities: np.ndarray, output: str, regions: Regions, spacing_mm: Sequence[float]
    ) -> np.ndarray:
        """Labels (D, H, W) uint8 from probabilities (D, H, W, K).

        Args:
          probabilities: of the regions in their order (``output="regions"``) or of labels 0.. (``"labels"``).
          regions: region -> label values, outermost first.
          spacing_mm: voxel size along D, H, W.
        """
        self.check(regions)
        if output == "labels":
            labels = labels_from_softmax(probabilities)
        else:
            labels = regions_to_labels(probabilities, self.thresholds, regions)
        voxel_mm3 = float(np.prod(spacing_mm))
        labels = remove_small_components(labels, self.min_component_mm3, voxel_mm3, regions)
        return remove_small_regions(labels, self.min_total_mm3, voxel_mm3, regions)


def by_region(name: str, items: Sequence[str], regions: Sequence[str]) -> dict[str, float]:
    """Reads ``["0.5"]`` (for all) or ``["WT:0.5", "ET:0.7"]`` as {region: number}.

    Raises: ValueError that begins with ``name=``, for anything else.
    """
    pairs = [item.rpartition(":") for item in items]
    try:
        if len(pairs) == 1 and not pairs[0][1]:
            return dict.fromkeys(regions, float(pairs[0][2]))
        if not all(separator for _, separator, _ in pairs):
            raise ValueError
        return {region.strip(): float(value) for region, _, value in pairs}
    except ValueError:
        example = ",".join(f"{region}:0.5" for region in regions)
        raise ValueError(f"{name}={','.join(items)}: give one number, or one per region like {example}") from None


def regions_to_labels(
    probabilities: np.ndarray, thresholds: Mapping[str, float] | float, regions: Regions
) -> np.ndarray:
    """Label of the innermost region whose probability reaches its threshold; 0 where none does.

    An inner region wins over a missing outer one: a voxel of ET is tumour, whatever the WT output says.

    Args:
      probabilities: (D, H, W, R) in the order of ``regions``.
      thresholds: region -> probability (0.5 for regions not named), or one for all.
      regions: region -> label values, nested, outermost first.

    Returns: (D, H, W) uint8.
    """
    if probabilities.shape[-1] != len(regions):
        raise ValueError(f"{probabilities.shape[-1]} probabilities for the regions {', '.join(regions)}")
    labels = np.zeros(probabilities.shape[:-1], np.uint8)
    for i, (region, label) in enumerate(own_labels(regions).items()):
        threshold = thresholds.get(region, 0.5) if isinstance(thresholds, Mapping) else thresholds
        labels[probabilities[..., i] >= threshold] = label
    return labels


def labels_from_softmax(probabilities: np.ndarray) -> np.ndarray:
    """The most probable label (D, H, W) uint8 of (D, H, W, K) probabilities; the lower one of equals."""
    return probabilities.argmax(-1).astype(np.uint8)


def remove_small_components(
    labels: np.ndarray, min_mm3: Mapping[str, float], voxel_mm3: float, regions: Regions
) -> np.ndarray:
    """A copy of ``labels`` without a region's connected components that are smaller than its ``min_mm3``."""
    labels = labels.copy()
    for region, fallback in _fallbacks(regions):
        if min_mm3.get(region, 0) > 0:
            components, _ = ndimage.label(np.isin(labels, regions[region]), NEIGHBOURS)
            small = np.bincount(components.ravel()) * voxel_mm3 < min_mm3[region]
            small[0] = False  # the voxels outside the region
            labels[small[components]] = fallback
    return labels


def remove_small_regions(
    labels: np.ndarray, min_mm3: Mapping[str, float], voxel_mm3: float, regions: Regions
) -> np.ndarray:
    """A copy of ``labels`` without the regions whose whole volume is below their ``min_mm3``."""
    labels = labels.copy()
    for region, fallback in _fallbacks(regions):
        mask = np.isin(labels, regions[region])
        if mask.sum() * voxel_mm3 < min_mm3.get(region, 0):
            labels[mask] = fallback
    return labels


def own_labels(regions: Regions) -> dict[str, int]:
    """Region -> the one label that belongs to it and to no region inside it: WT 2, TC 1, ET 3 in BraTS.

    Raises:
      ValueError: the regions are not nested from the outermost to the innermost, one label apart.
    """
    own = {}
    inner_sets = [*[set(values) for values in list(regions.values())[1:]], set()]
    for (region, values), inner in zip(regions.items(), inner_sets, strict=True):
        rest = set(values) - inner
        if not inner <= set(values) or len(rest) != 1:
            raise ValueError(f"the regions {dict(regions)} are not nested, one label apart, at {region}: "
                             "labels cannot be told from them")
        own[region] = rest.pop()
    return own


def _fallbacks(regions: Regions) -> list[tuple[str, int]]:
    """(region, label that its voxels get when they lose it), outermost first."""
    own = own_labels(regions)
    return list(zip(own, [0, *own.values()], strict=False))

"""How intensities become what a network sees, by name; models, stores and adapters carry the name.

Every function takes ``whole`` (X, Y, Z, C), all modalities of a case in any numeric dtype, ``box``, the slices of
its first three axes that hold the brain, and ``inside`` (D, H, W) bool, the brain within that box. It returns the
normalised box (D, H, W, C) float16 and, per channel, the mean and standard deviation that were used.
"""

import numpy as np

DEFAULT = "zscore_brain"

Normalized = tuple[np.ndarray, list[float], list[float]]


def zscore_brain(whole: np.ndarray, box: tuple[slice, ...], inside: np.ndarray) -> Normalized:
    """Each modality by its own mean and standard deviation inside the brain; 0 outside."""
    normalized = np.zeros((*inside.shape, whole.shape[-1]), np.float16)
    means, deviations = [], []
    for channel in range(whole.shape[-1]):
        values = np.ascontiguousarray(whole[(*box, channel)])[inside].astype(np.float64)
        means.append(float(values.mean()))
        deviations.append(float(values.std()))
        normalized[inside, channel] = (values - means[-1]) / deviations[-1]
    return normalized, means, deviations


def zscore_joint(whole: np.ndarray, box: tuple[slice, ...], inside: np.ndarray) -> Normalized:
    """All modalities and the background by one mean and deviation: the released study's way, for its ablation.

    Source: torchio's ``ZNormalization`` on a four-channel image without a mask, as PEFT_MedNeXt uses it.
    """
    values = whole.astype(np.float64)
    mean, deviation = float(values.mean()), float(values.std())
    normalized = ((values[box] - mean) / deviation).astype(np.float16)
    return normalized, [mean] * whole.shape[-1], [deviation] * whole.shape[-1]


NORMALIZATIONS = {function.__name__: function for function in (zscore_brain, zscore_joint)}

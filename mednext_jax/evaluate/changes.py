"""What fine-tuning changed: parameters of an adapted network against those of its base, stage by stage."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


class StageChange(NamedTuple):
    """One part of the network.

    Attributes:
      stage: first element of the parameter path, such as ``enc_block_0``.
      parameters: numbers the adapted network has there.
      new: how many of them the base does not have (adapters).
      changed: how many of the shared ones lie in arrays that differ.
      relative_change: |adapted - base| / |base| over the shared arrays, as Euclidean norms; 0 if frozen.
      new_norm: Euclidean norm of the new arrays.
    """

    stage: str
    parameters: int
    new: int
    changed: int
    relative_change: float
    new_norm: float


def by_stage(base: Mapping[str, np.ndarray], adapted: Mapping[str, np.ndarray]) -> list[StageChange]:
    """Compares two flat parameter dicts (path to array), in the order in which `adapted` names its stages.

    Raises:
      ValueError: a shared path has another shape, so that the one is not the other's base.
    """
    stages: dict[str, list[str]] = {}
    for path in adapted:
        stages.setdefault(path.split("/")[0], []).append(path)
    rows = []
    for stage, paths in stages.items():
        shared = [p for p in paths if p in base]
        new = [p for p in paths if p not in base]
        for path in shared:
            if base[path].shape != adapted[path].shape:
                shapes = f"{base[path].shape} in the base, {adapted[path].shape} in the adapted network"
                raise ValueError(f"{path} has shape {shapes}: they do not belong together")
        rows.append(
            StageChange(
                stage=stage,
                parameters=sum(adapted[p].size for p in paths),
                new=sum(adapted[p].size for p in new),
                changed=sum(adapted[p].size for p in shared if not np.array_equal(base[p], adapted[p])),
                relative_change=_norm(adapted[p] - base[p] for p in shared)
                / max(_norm(base[p] for p in shared), 1e-30),
                new_norm=_norm(adapted[p] for p in new),
            )
        )
    return rows


def _norm(arrays) -> float:
    return float(np.sqrt(sum(float(np.square(a, dtype=np.float64).sum()) for a in arrays)))

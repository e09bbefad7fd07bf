"""From the plans of one batch to its arrays: opens the cases and cuts their crops."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data_pipeline import patches
from data_pipeline.store import Store

OPEN_CASES = 64  # per process: two memory-mapped files each, far below the usual limit of 1024 open files

Batch = dict[str, np.ndarray]


class Plan(NamedTuple):
    """What sample ``index`` of the stream is made of: a case of one cohort. Light enough to shuffle."""

    index: int
    cohort: int
    case_id: str


class CutBatch:
    """Turns the plans of one global batch into this shard's arrays.

    Sent to worker processes by pickle, hence a class: the memory maps stay behind and are opened anew.
    """

    def __init__(
        self,
        stores: Sequence[Store],
        patch_voxels: Sequence[int],
        foreground_fraction: float,
        seed: int,
        rows: slice,
    ):
        self.stores = tuple(stores)
        self.patch_voxels = tuple(patch_voxels)
        self.foreground_fraction = foreground_fraction
        self.seed = seed
        self.rows = rows
        self._forget()

    def _forget(self) -> None:
        self._cases: dict[tuple[int, str], tuple] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name not in ("_cases", "_lock")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._forget()

    def __call__(self, plans: Sequence[Plan]) -> Batch:
        """Returns the batch of this shard's rows; the layout is that of ``stream.make_stream``."""
        mine = plans[self.rows]
        channels = len(self.stores[0].channels)
        image = np.empty((len(mine), *self.patch_voxels, channels), np.float32)
        label = np.empty((len(mine), *self.patch_voxels), np.int32)
        for row, plan in enumerate(mine):
            self._fill(plan, image[row], label[row])
        return {
            "image": image,
            "label": label,
            "case_id": np.array([plan.case_id for plan in mine]),
            "index": np.array([plan.index for plan in mine], np.int64),
            "batch_case_id": np.array([plan.case_id for plan in plans]),
        }

    def _fill(self, plan: Plan, image: np.ndarray, label: np.ndarray) -> None:
        case_image, case_label, foreground = self._case(plan)
        generator = patches.sample_generator(self.seed, plan.index)
        start = patches.choose_start(
            case_label.shape, self.patch_voxels, foreground, self.foreground_fraction, generator
        )
        patches.cut(case_image, start, image)
        patches.cut(case_label, start, label)

    def _case(self, plan: Plan) -> tuple:
        """The case's memory maps and foreground voxels, from the most recently used or from disk."""
        key = (plan.cohort, plan.case_id)
        with self._lock:
            case = self._cases.pop(key, None)
        if case is None:
            image, label, record = self.stores[plan.cohort].load(plan.case_id)
            case = image, label, record["foreground"]
        with self._lock:
            self._cases[key] = case  # last in the dict: the most recently used
            while len(self._cases) > OPEN_CASES:
                self._cases.pop(next(iter(self._cases)))
        return case

"""Crops that a store gives, per second and per core, beside what a training step needs."""

import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.timing import medians
from data_pipeline import store
from data_pipeline.store import Store
from data_pipeline.stream import make_stream

SHAPE = (140, 172, 138)  # of a brain's box at 1 mm
CROPS_PER_SAMPLE = 16


def noise_store(path: Path, n_cases: int = 4) -> Store:
    """A store of noise with a ball for a tumour: for reading, one voxel is like another."""
    random, names, written = np.random.default_rng(0), [f"noise-{i}" for i in range(n_cases)], []
    grid = np.ogrid[tuple(slice(-size // 2, size - size // 2) for size in SHAPE)]
    label = (3 * (sum(axis**2 for axis in grid) < 20**2)).astype(np.uint8)
    for name in names:
        image = random.standard_normal((*SHAPE, 4), np.float32).astype(np.float16)
        written.append(store.write_case(path, name, image, label, {}))
    return store.write_dataset(path, written, {"train": names, "val": [], "test": []})


def row(found: Store, size: int, batch: int, threads: int, workers: int, repeats: int) -> dict[str, Any]:
    """Seconds and processor seconds per crop of ``size``^3 x 4 voxels, from the store to a batch in memory.

    Processor seconds are this process's: with ``workers`` they miss what the workers do.
    """
    cases = [case for case in found.case_ids if found.cases[case]["labelled"]]
    if not cases:
        raise ValueError(f"{found.path} has no case with a segmentation: training reads such cases alone")
    samples, n_crops = [], batch * max(CROPS_PER_SAMPLE // batch, 1)
    with make_stream(found, cases, (size,) * 3, batch, 0.33, 0, workers=workers, threads=threads) as stream:
        for _ in range(2 + threads + workers):
            next(stream)  # what was read ahead, and the pages of the files
        for _ in range(repeats):
            began = time.perf_counter(), time.process_time()
            for _ in range(n_crops // batch):
                next(stream)
            samples.append({"seconds": (time.perf_counter() - began[0]) / n_crops,
                            "cpu_seconds": (time.process_time() - began[1]) / n_crops})  # fmt: skip
    row = medians(f"crop of {size}^3 x {len(found.channels)}", samples)
    moved = size**3 * len(found.channels) * (2 + 4)  # read as float16, written as float32
    row |= {"crops_per_second": 1 / row["seconds"], "crops_per_second_and_core": 1 / row["cpu_seconds"]}
    row["gbytes"] = moved / 1e9
    if workers:  # their processor time is not ours to see
        del row["cpu_seconds"], row["crops_per_second_and_core"]
    return row


def demand(batch: int, step_seconds: float) -> dict[str, Any]:
    """The row of what a step of ``batch`` crops uses up."""
    return {"name": f"demand of a step of {batch}", "seconds": step_seconds / batch,
            "crops_per_second": batch / step_seconds}  # fmt: skip

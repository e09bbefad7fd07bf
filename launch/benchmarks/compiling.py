"""How long the training step takes to compile: with an empty cache, and again from the cache."""

import tempfile
import time
from typing import Any

import jax

from benchmarks import apart, timing
from mednext_jax.train import devices, experiment, network
from mednext_jax.train.step import compile_step

CHANNELS = ("t1n", "t1c", "t2w", "t2f")
REGIONS = {"WT": [1, 2, 3], "TC": [1, 3], "ET": [3]}


def rows(config: dict[str, Any], repeats: int) -> list[dict[str, Any]]:
    """Cold and from the cache, each in a process of its own; medians if repeated."""
    found: dict[str, list[dict[str, float]]] = {"cold": [], "from the cache": []}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as cache:
            for name, times in found.items():
                began = time.perf_counter()
                times.append(apart.run(seconds, config, cache))
                timing.tell(f"train step {name}: compiled", began)
    return [timing.medians(f"train step {name}", times) for name, times in found.items()]


def seconds(config: dict[str, Any], cache: str) -> dict[str, float]:
    """Seconds to draw the weights, and to trace and compile the step, as a run does it."""
    jax.config.update("jax_compilation_cache_dir", cache)
    mesh = devices.make_mesh(config["n_devices"])
    contract = network.DataContract(CHANNELS, "zscore_brain", "brats2023", REGIONS)
    began = time.perf_counter()
    parts = experiment.build(config, network.start(config, contract), mesh)
    state = experiment.initial_state(config, parts)
    prepared, processor = time.perf_counter(), time.process_time()
    compile_step(parts.step, mesh, state, parts.frozen, experiment.batch_shapes(config, len(CHANNELS)))
    ended = time.perf_counter()
    return {"seconds": ended - prepared, "cpu_seconds": time.process_time() - processor,
            "weights_seconds": prepared - began}  # fmt: skip

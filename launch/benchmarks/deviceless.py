"""What steps would hold and move on a GPU that is not here: compiled for it from its description, not run.

XLA's CUDA plugin compiles without a device ("deviceless" is its word). What needs one is left out: every time,
and the choice among ways to multiply matrices, which XLA makes by timing them; here it is always the library's.
"""

import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

# JAX and XLA read these when they are imported.
os.environ |= {
    "JAX_PLATFORMS": "cpu,cuda",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "JAX_ENABLE_COMPILATION_CACHE": "false",  # a program from there could only be loaded onto a device
    "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false",
}

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from benchmarks import ours, traffic
from mednext_jax.nn.mednext import parameter_shapes
from mednext_jax.nn.paths import unflatten
from mednext_jax.peft import cost
from mednext_jax.peft.flops import flops

BANDWIDTH = re.compile(r"\bmemory_bandwidth:\s*(\d+)")  # bytes per second
# XLA divides by some of these, and takes the process down where one is missing.
NEEDED = ("platform_name", "cuda_compute_capability", "threads_per_block_limit", "threads_per_warp",
          "shared_memory_per_block", "shared_memory_per_core", "threads_per_core_limit", "core_count", "fpus_per_core",
          "block_dim_limit_x", "memory_bandwidth", "l2_cache_size", "clock_rate_ghz", "device_memory_size",
          "registers_per_core_limit", "registers_per_block_limit")  # fmt: skip


def rows(network: ours.Network, size: int, batch: int, names: Sequence[str], gpu: Path) -> list[dict[str, Any]]:
    """One row for the forward pass and one for the training step of each method, ``full`` first.

    Args:
      gpu: description of the card, a GpuTargetConfigProto as text, such as ``h200.txtpb`` beside this file; openxla/xla
        has more in xla/backends/gpu/target_config/specs. Fields that the installed plugin does not know must go.

    Returns: GFLOP, GB that the program reads and writes, the milliseconds that the card's bandwidth takes for them,
    GB of temporaries and of arguments, seconds of compilation.

    Raises:
      ValueError: the plugin is not installed, or does not understand the description.
      OSError: the description cannot be read.
    """
    description = gpu.read_text(encoding="utf-8")
    bandwidth = BANDWIDTH.search(description)
    missing = [name for name in NEEDED if not re.search(rf"\b{name}\b", description)]
    if missing or not bandwidth:
        raise ValueError(f"{gpu} has no {', '.join(missing) or 'number of bytes per second'}: it must be a "
                         "GpuTargetConfigProto as text, like launch/benchmarks/h200.txtpb")  # fmt: skip
    place = _place(description, gpu)
    model = ours.model_of(network)
    x = jax.ShapeDtypeStruct((batch, *(size,) * 3, model.in_channels), jnp.float32)

    def forward(params: dict, x: jax.Array) -> Any:
        return model.apply({"params": unflatten(params)}, x)

    works = [("forward", forward, (parameter_shapes(model), x), ())]
    for name in dict.fromkeys(["full", *names]):
        works.append((f"step of {name}", *cost.step_of(ours.method_of(name), model, x), (0, 1)))
    # The network is written differently for a GPU, by what it is traced on; its own kernels ask what kind it is.
    kind = jax.sharding.use_abstract_mesh(place.mesh.abstract_mesh)
    with mock.patch.object(jax, "default_backend", lambda: "gpu"), kind:
        return [_row(*work, place, float(bandwidth[1])) for work in works]


def _place(description: str, gpu: Path) -> jax.sharding.Sharding:
    """The one device of a machine that has one such card."""
    try:
        topology = topologies.get_topology_desc(platform="cuda", target_config=description, topology="1x1x1")
    except NotImplementedError as error:
        raise ValueError("compiling for a GPU needs JAX's CUDA plugin: pip install 'mednext_jax[cuda12]'") from error
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"{gpu}: XLA does not understand this description; remove the field that it names above ({error})"
        ) from error
    mesh = topologies.make_mesh(topology, (1,), ("data",))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def _row(
    name: str, function: Callable, arguments: tuple, donated: tuple, place: jax.sharding.Sharding, bandwidth: float
) -> dict[str, Any]:
    placed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), arguments)
    began = time.perf_counter()
    program = jax.jit(function, donate_argnums=donated).lower(*placed).compile()
    seconds = time.perf_counter() - began
    memory, moved = program.memory_analysis(), traffic.moved_bytes(program.as_text())
    return {
        "name": name,
        "gflop": flops(function, *arguments) / 1e9,
        "gbytes": moved / 1e9,
        "bandwidth_ms": 1e3 * moved / bandwidth,
        "temporaries_gb": memory.temp_size_in_bytes / 1e9,
        "arguments_gb": memory.argument_size_in_bytes / 1e9,
        "compile_seconds": seconds,
    }

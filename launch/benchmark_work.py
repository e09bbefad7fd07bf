"""What ``launch/benchmark.py`` runs of ours, how it times jobs, and the table it prints."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from mednext_jax import peft
from mednext_jax.nn.depthwise import depthwise_conv, depthwise_conv_transpose
from mednext_jax.nn.mednext import create_mednext


@dataclass
class Job:
    """One thing to time.

    Attributes:
      name: shown; jobs whose names agree up to the first ":" are compared ("backward: ours", "backward: torch").
      run: does it once and waits for the end.
      facts: what is known beforehand, such as compile seconds, FLOPs and bytes of the compiled program.
    """

    name: str
    run: Callable[[], Any]
    facts: dict[str, float] = field(default_factory=dict)


def compiled_job(name: str, function: Callable, *arguments: Any) -> Job:
    """Compiles ``function`` for ``arguments`` and keeps what the compiler says of it."""
    began = time.perf_counter()
    program = jax.jit(function).lower(*arguments).compile()
    seconds = time.perf_counter() - began
    cost, memory = program.cost_analysis(), program.memory_analysis()
    facts = {
        "compile_seconds": seconds,
        "gflop": cost.get("flops", 0.0) / 1e9,
        "gbytes": cost.get("bytes accessed", 0.0) / 1e9,
        "temporaries_gb": memory.temp_size_in_bytes / 1e9,
    }
    return Job(name, lambda: jax.block_until_ready(program(*arguments)), facts)


def step_jobs(network: dict[str, Any], batch: int, size: int) -> list[Job]:
    """Forward, and forward + backward with respect to every parameter, of a mean-square loss."""
    model = create_mednext(
        network["variant"], 4, network["kernel_size"], network["deep_supervision"],
        dtype=jnp.dtype(network["dtype"]), remat=network["remat"],
    )  # fmt: skip
    x = jax.random.normal(jax.random.key(0), (batch, size, size, size, 4))
    params = jax.jit(model.init)(jax.random.key(1), x[:1, :16, :16, :16])["params"]

    def forward(params, x):
        return model.apply({"params": params}, x)

    def loss(params, x):
        return sum(jnp.mean(jnp.square(y)) for y in jax.tree.leaves(forward(params, x)))

    return [
        compiled_job("forward: ours", forward, params, x),
        compiled_job("forward+backward: ours", jax.value_and_grad(loss), params, x),
    ]


def depthwise_jobs(batch: int, size: int, channels: int, dtype: str) -> list[Job]:
    """Each depthwise operation and its gradients; the copy of an array is the floor of one pass."""
    x = jax.random.normal(jax.random.key(0), (batch, size, size, size, channels), jnp.dtype(dtype))
    w = jax.random.normal(jax.random.key(1), (3, 3, 3, 1, channels), jnp.dtype(dtype))
    half = x[:, : size // 2, : size // 2, : size // 2]
    jobs = [compiled_job("copy", lambda x: x + 1, x)]
    for name, operation, argument in (
        ("stride 1", depthwise_conv, x),
        ("stride 2", lambda x, w: depthwise_conv(x, w, 2), x),
        ("transpose", depthwise_conv_transpose, half),
    ):
        shape = jax.eval_shape(operation, argument, w)
        g = jax.random.normal(jax.random.key(2), shape.shape, shape.dtype)
        jobs.append(compiled_job(f"{name} forward", operation, argument, w))
        for which, position in (("input", 0), ("kernel", 1)):
            pull = lambda x, w, g, f=operation, i=position: jax.vjp(f, x, w)[1](g)[i]  # noqa: E731
            jobs.append(compiled_job(f"{name} {which} gradient", pull, argument, w, g))
    return jobs


def peft_table(network: dict[str, Any], size: int, batch: int, repeats: int) -> str:
    """Parameters, file, FLOPs, memory and time of each method's compiled step, as markdown."""
    model = create_mednext(network["variant"], 4, network["kernel_size"], network["deep_supervision"],
                           dtype=jnp.dtype(network["dtype"]), remat=network["remat"])  # fmt: skip
    methods = [peft.create(name) for name in peft.METHODS]
    return peft.markdown(peft.costs(methods, model, (size,) * 3, batch, compiled=True, timed_steps=repeats))


def measure(jobs: list[Job], repeats: int) -> list[dict[str, Any]]:
    """Times the jobs alternating, after one run of each to warm up; medians and spread in seconds."""
    for job in jobs:
        job.run()
    seconds: dict[str, list[float]] = {job.name: [] for job in jobs}
    for _ in range(repeats):
        for job in jobs:
            began = time.perf_counter()
            job.run()
            seconds[job.name].append(time.perf_counter() - began)
    rows = []
    for job in jobs:
        times = seconds[job.name]
        spread = {"seconds": statistics.median(times), "fastest": min(times), "slowest": max(times)}
        rows.append({"name": job.name, **spread, **job.facts})
    return rows


def ceilings() -> dict[str, float]:
    """This machine's copy bandwidth (GB/s, read plus written) and float32 matrix rate (GFLOP/s)."""
    x = jnp.ones((64, 2**20))
    m = jnp.ones((2048, 2048))
    rows = measure([compiled_job("copy", lambda x: x + 1, x), compiled_job("matmul", lambda m: m @ m, m)], 5)
    copy, product = (row["fastest"] for row in rows)
    return {"copy_gb_per_s": 2 * x.nbytes / copy / 1e9, "matmul_gflop_per_s": 2 * 2048**3 / product / 1e9}


def table(result: dict[str, Any]) -> str:
    """The rows as plain text."""
    columns = ("seconds", "fastest", "slowest", "compile_seconds", "gflop", "gbytes", "temporaries_gb")
    lines = [f"{'':32}" + "".join(f"{name:>17}" for name in columns)]
    for row in result["rows"]:
        cells = [format(row[name], ".4g") if name in row else "-" for name in columns]
        lines.append(f"{row['name']:32}" + "".join(f"{cell:>17}" for cell in cells))
    lines += [f"{name}: {value:.3f} of the peer's time" for name, value in result["ratio_to_peer"].items()]
    c = result["ceilings"]
    lines.append(f"{result['device']}, jax {result['jax']}: copies {c['copy_gb_per_s']:.1f} GB/s, multiplies "
                 f"{c['matmul_gflop_per_s']:.0f} GFLOP/s in float32")
    return "\n".join(lines)

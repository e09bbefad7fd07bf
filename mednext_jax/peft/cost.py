"""What a method costs: parameters, file, arithmetic, and on request memory and time of a training step."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.numpy

from mednext_jax.nn.mednext import count_parameters, parameter_shapes
from mednext_jax.peft import rules
from mednext_jax.peft.flops import flops
from mednext_jax.peft.methods import METHODS
from mednext_jax.peft.registry import Method, options_of


@dataclass(frozen=True)
class Cost:
    """One row of the table of methods.

    Attributes:
      method: its name and the options that matter.
      trains: what it trains, in words.
      trainable, all: numbers of parameters.
      file_bytes: size of ``adapter_model.safetensors``.
      step_flops: operations of one training step (forward, backward, AdamW), recomputed activations included.
      predict_flops: operations of one forward pass.
      temporary_bytes: memory that the compiled step needs beside parameters and optimizer state; None if not
        compiled.
      step_seconds: of one step (:func:`costs` takes the fastest of those it times); None if not run.
    """

    method: str
    trains: str
    trainable: int
    all: int
    file_bytes: int
    step_flops: int
    predict_flops: int
    temporary_bytes: int | None = None
    step_seconds: float | None = None


def costs(
    methods: Sequence[Method],
    model: Any,
    patch_voxels: Sequence[int],
    batch_size: int = 1,
    compiled: bool = False,
    timed_steps: int = 0,
) -> list[Cost]:
    """The cost of each method on one network and patch.

    Args:
      model: a ``MedNeXt`` without adapters.
      patch_voxels: (D, H, W).
      compiled: compile each step for this machine, for its temporary memory (a minute each for a real
        network).
      timed_steps: run that many compiled steps on random data after one to warm up.

    Raises:
      ValueError: a method does not fit the network.
    """
    x = jax.ShapeDtypeStruct((batch_size, *patch_voxels, model.in_channels), jnp.float32)
    return [_cost(method, model, x, compiled or timed_steps > 0, timed_steps) for method in methods]


def markdown(rows: Sequence[Cost]) -> str:
    """The rows as a Markdown table; FLOPs are relative to the first row's (give ``full`` first)."""
    lines = [
        "| method | trains | parameters | % | file | step FLOPs | predict FLOPs | step memory | step time |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        memory = "" if row.temporary_bytes is None else f"{row.temporary_bytes / 2**20:,.0f} MiB"
        seconds = "" if row.step_seconds is None else f"{row.step_seconds:.2f} s"
        lines.append(
            f"| {row.method} | {row.trains} | {row.trainable:,} | {100 * row.trainable / row.all:.2f} "
            f"| {row.file_bytes / 1e3:,.0f} kB | {row.step_flops / rows[0].step_flops:.2f} "
            f"| {row.predict_flops / rows[0].predict_flops:.2f} | {memory} | {seconds} |"
        )
    return "\n".join(lines)


def training_step(model: Any):
    """A plain training step ``(trainable, state, frozen, x) -> (trainable, state)`` and its Optax transform.

    The loss is the mean square of the logits: it costs next to nothing and reaches every parameter.
    """
    transform = optax.adamw(1e-3)

    def loss(trainable, frozen, x):
        outputs = jax.tree.leaves(model.apply({"params": rules.merge_trees(trainable, frozen)}, x))
        return sum(jnp.mean(jnp.square(output)) for output in outputs)

    def step(trainable, state, frozen, x):
        gradients = jax.grad(loss)(trainable, frozen, x)
        updates, state = transform.update(gradients, state, trainable)
        return optax.apply_updates(trainable, updates), state

    return step, transform


def step_of(method: Method, model: Any, x: jax.ShapeDtypeStruct) -> tuple[Callable, tuple]:
    """The method's :func:`training_step` on a network without adapters, and the shapes of its arguments."""
    adapted = model.clone(adapters=method.adapters)
    trainable, frozen = rules.split(parameter_shapes(adapted), method.rule)
    step, transform = training_step(adapted)
    return step, (trainable, jax.eval_shape(transform.init, trainable), frozen, x)


def compile_step(step: Callable, arguments: tuple) -> jax.stages.Compiled:
    """The step as a run compiles it: parameters and optimizer state are updated in place."""
    return jax.jit(step, donate_argnums=(0, 1)).lower(*arguments).compile()


def _cost(method: Method, model: Any, x: jax.ShapeDtypeStruct, compiled: bool, timed_steps: int) -> Cost:
    adapted = model.clone(adapters=method.adapters)
    params = parameter_shapes(adapted)
    step, arguments = step_of(method, model, x)
    trainable = arguments[0]
    memory = seconds = None
    if compiled:
        program = compile_step(step, arguments)
        memory = program.memory_analysis().temp_size_in_bytes
        seconds = _time(program, arguments, timed_steps) if timed_steps else None
    return Cost(
        method=_title(method),
        trains=" + ".join(_first_line(name) for name in method.options),
        trainable=count_parameters(trainable),
        all=count_parameters(params),
        file_bytes=_file_bytes(trainable),
        step_flops=flops(step, *arguments),
        predict_flops=flops(
            lambda params, x: adapted.apply({"params": rules.merge_trees(params, {})}, x), params, x
        ),
        temporary_bytes=memory,
        step_seconds=seconds,
    )


def _time(program: Any, arguments: tuple, steps: int) -> float:
    """The fastest of ``steps`` calls after one to warm up, in seconds."""
    run, seconds = runner(program, arguments), []
    for _ in range(steps + 1):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def runner(program: Any, arguments: tuple) -> Callable[[], None]:
    """Does one step of what :func:`compile_step` made, on random numbers, and waits for its end.

    Args:
      arguments: their shapes, as of :func:`step_of`.
    """
    random = np.random.default_rng(0)
    trainable, state, frozen, x = jax.tree.map(
        lambda leaf: jnp.asarray(random.standard_normal(leaf.shape) * 0.02, leaf.dtype), arguments
    )
    state = jax.tree.map(jnp.abs, state)  # second moments are not negative

    def run() -> None:
        nonlocal trainable, state
        trainable, state = jax.block_until_ready(program(trainable, state, frozen, x))

    return run


def _file_bytes(trainable: Mapping[str, Any]) -> int:
    return len(
        safetensors.numpy.save({path: np.zeros(leaf.shape, np.float32) for path, leaf in trainable.items()})
    )


def _title(method: Method) -> str:
    """The method's name with the options that differ from their defaults."""
    from_default = [
        f"{key}={value}"
        for name, options in method.options.items()
        for key, value in options.items()
        if value != options_of(name)[key]
    ]
    return f"`{method.name}`" + (f" {', '.join(from_default)}" if from_default else "")


def _first_line(name: str) -> str:
    """What the method's docstring says up to its first full stop or semicolon."""
    first = (METHODS[name].__doc__ or "").strip().split("\n", 1)[0]
    return first.split(";", 1)[0].rstrip(".")

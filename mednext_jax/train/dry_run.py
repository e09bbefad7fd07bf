"""What a config would train and cost, beside full fine-tuning, before anyone waits for a night."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from mednext_jax import peft
from mednext_jax.nn.mednext import MedNeXt
from mednext_jax.train import experiment, network, optimizer

TIMED_STEPS = 3
CPU_VOXELS = 64**3  # a CPU takes minutes for a step of 128^3, and more memory than most have


def cost(config: Mapping[str, Any]) -> peft.Cost:
    """Parameters and counted arithmetic of what a config trains; nothing is compiled."""
    methods, data = [experiment.method_of(config)], config["data"]
    return peft.costs(methods, network.planned(config)[0], data["patch_voxels"], data["batch_size"])[0]


def report(config: Mapping[str, Any]) -> Iterator[str]:
    """The parameter summary of the config's method, and then a table of costs: full fine-tuning, then the method.

    A line below the table says what its FLOPs are relative to, and which memory it shows.

    The table takes a while: memory and time are those of the compiled step on this machine. A CPU times larger steps
    on a smaller patch and scales them by their arithmetic; the report says so.

    Raises: ValueError or FileNotFoundError if method, ``init_from`` and config do not fit, as a run would.
    """
    experiment.check_config(config)
    method = experiment.method_of(config)
    model, new = network.planned(config)
    shapes = method.shapes_on(model)
    trainable, frozen = peft.split(shapes, method.rule)
    network.check_new_are_trained(method, new, frozen)
    optimizer.make_optimizer(config["optim"], trainable)
    batch_size, patch = config["data"]["batch_size"], tuple(config["data"]["patch_voxels"])
    head = f"{method.name} on {config['init_from'] or 'a new network'}, batch {batch_size} of "
    head += "x".join(map(str, patch)) + f", compiled for {jax.devices()[0].device_kind}"
    smaller = jax.default_backend() == "cpu" and batch_size * math.prod(patch) > CPU_VOXELS
    timed_on = (1, tuple(min(size, 64) for size in patch)) if smaller else (batch_size, patch)
    if smaller:
        head += f"; step time scaled from batch {timed_on[0]} of {'x'.join(map(str, timed_on[1]))}"
    yield "\n".join([head, peft.summary(shapes, method.rule), ""])
    rows = [peft.create("full")] + ([method] if method.name != "full" else [])
    costs = _costs(rows, model, (batch_size, patch), timed_on)
    yield peft.markdown(costs)
    yield (
        f"FLOPs relative to full fine-tuning's: {costs[0].step_flops / 1e9:,.4g} GFLOP per step, "
        f"{costs[0].predict_flops / 1e9:,.4g} GFLOP per prediction of a batch; step memory is that of the step's "
        "temporaries, beside parameters and optimizer state"
    )


def _costs(
    methods: Sequence[peft.Method], model: MedNeXt, wanted: tuple[int, tuple[int, ...]],
    timed_on: tuple[int, tuple[int, ...]],
) -> list[peft.Cost]:  # fmt: skip
    """The cost of each method for the (batch, patch) that is wanted, its time scaled from that on which it is taken."""
    batch_size, patch = wanted
    if timed_on == wanted:
        return peft.costs(methods, model, patch, batch_size, timed_steps=TIMED_STEPS)
    whole = peft.costs(methods, model, patch, batch_size, compiled=True)
    batch_size, patch = timed_on
    timed = peft.costs(methods, model, patch, batch_size, timed_steps=TIMED_STEPS)
    return [
        dataclasses.replace(cost, step_seconds=part.step_seconds * cost.step_flops / part.step_flops)
        for cost, part in zip(whole, timed, strict=True)
    ]

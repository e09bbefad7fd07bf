"""The constructor arguments of a network, read off the names and shapes of its state dict.

Each number has many witnesses (the width, say, is in nearly every tensor), and the majority decides: one
damaged tensor does not mislead the rest, so the comparison that follows (``state_dict.py``) names that very
tensor.

What names and shapes cannot tell:

* ``do_res``, the residual connection of the ordinary blocks, has no parameters. Networks of the factories
  have it together with the residual convolutions of the up and down blocks, which do show; so it is taken to
  be on where those are, and off where they are not.
* ``norm_type``: group and layer normalisation have the same two vectors; ``"group"`` is taken, the default
  everywhere.
"""
from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from mednext_jax.convert.names import FLAVOURS, MODULES, STAGES

Shapes = Mapping[str, tuple[int, ...]]

LAYER = r"((?:conv[123]|norm|fc[12])\.(?:weight|bias)|grn_gamma|grn_beta)"
ALL_STAGES = r"(enc_block|dec_block)_[0-3]|bottleneck"


def find_flavour(names: Iterable[str]) -> str:
    """Which of :data:`names.FLAVOURS` the state dict is: the one whose templates most of the names fit."""
    found = list(names)

    def fitting(flavour: str) -> int:
        templates = FLAVOURS[flavour].blocks, FLAVOURS[flavour].adapter
        return sum(any(_pattern(template).fullmatch(name) for template in templates) for name in found)

    return max(FLAVOURS, key=fitting)


@functools.cache
def _pattern(template: str) -> re.Pattern:
    """Regular expression for the names that a template of :class:`names.Flavour` gives."""
    pattern = re.escape(template)
    for field, group in (("stage", r"(\w+)"), ("block", r"(\d+)"), ("layer", LAYER)):
        pattern = pattern.replace(re.escape(f"{{{field}}}"), group)
    return re.compile(pattern)


def infer(shapes: Shapes) -> tuple[dict[str, Any], list[str]]:
    """``MedNeXt`` arguments of the network whose state dict has these names and shapes.

    Returns: the arguments, and one line per argument that was assumed rather than read.

    Raises:
      ValueError: no tensor tells an argument; the error names the tensors that would.
    """
    flavour = find_flavour(shapes)
    layers = _layers(shapes, flavour)
    notes = []
    spatial = _vote((len(shape) - 2 for (_, _, layer), shape in layers.items() if layer == "conv1.weight"),
                    "the convolutions (enc_block_0.0.conv1.weight, ...)")
    width = _vote(_widths(layers), "enc_block_0.0.conv1.weight")
    ratios = tuple(_vote(_expansions(layers, width, index), f"{stage}.0.conv2.weight")
                   for index, stage in enumerate(STAGES))
    encoder = _vote(_kernels(layers, "enc"), "enc_block_0.0.conv1.weight")
    decoder = _vote(_kernels(layers, "dec"), "dec_block_0.0.conv1.weight")
    same = encoder == decoder
    resamples = any(layer.startswith("res_conv") for _, _, layer in layers)
    if not resamples:
        notes.append("do_res=False is assumed: there is no residual convolution in the up and down blocks, "
                     "and the residual of the other blocks leaves no trace (say do_res=True if it was on)")
    kwargs = {
        "in_channels": _vote(shapes.get("stem.weight", ())[1:2], "stem.weight"),
        "n_channels": width,
        "n_classes": _vote(_classes(shapes), "out_0.conv_out.weight"),
        "exp_r": ratios[0] if len(set(ratios)) == 1 else ratios,
        "kernel_size": encoder if same else None,
        "enc_kernel_size": None if same else encoder,
        "dec_kernel_size": None if same else decoder,
        "deep_supervision": any(re.match(r"out_[1-4]\.", name) for name in shapes),
        "do_res": resamples,
        "do_res_up_down": resamples,
        "block_counts": tuple(_blocks(layers, stage) for stage in STAGES),
        "norm_type": "group",
        "dim": {2: "2d", 3: "3d"}.get(spatial, f"{spatial}d"),
        "grn": any(layer.startswith("grn_") for _, _, layer in layers),
        "adapters": _adapters(shapes, flavour, width),
    }
    return kwargs, notes


def _layers(shapes: Shapes, flavour: str) -> dict[tuple[str, int, str], tuple[int, ...]]:
    """(module, block, layer) -> shape for everything inside a stage's blocks and the up and down blocks."""
    pattern, found = _pattern(FLAVOURS[flavour].blocks), {}
    for name, shape in shapes.items():
        in_stage, alone = pattern.fullmatch(name), re.fullmatch(r"((?:up|down)_\d)\.(.+)", name)
        if in_stage and in_stage[1] in STAGES:
            found[in_stage[1], int(in_stage[2]), in_stage[3]] = shape
        elif alone and alone[1] in MODULES:
            found[alone[1], 0, alone[2]] = shape
    return found


def _vote(witnesses: Iterable[int], told_by: str) -> int:
    """The value most witnesses give (the first of equals)."""
    counted = Counter(witnesses).most_common(1)
    if not counted:
        raise ValueError(f"not a MedNeXt state dict, or an incomplete one: missing {told_by}")
    return counted[0][0]


def _widths(layers) -> Iterable[int]:
    for (module, _, layer), shape in layers.items():
        factor = MODULES[module][0]
        if layer in ("conv1.weight", "norm.weight") and shape and shape[0] % factor == 0:
            yield shape[0] // factor


def _kernels(layers, side: str) -> Iterable[int]:
    for (module, _, layer), shape in layers.items():
        if layer == "conv1.weight" and MODULES[module][2] == side and shape:
            yield shape[-1]


def _expansions(layers, width: int, stage: int) -> Iterable[int]:
    for (module, _, layer), shape in layers.items():
        factor, index, _ = MODULES[module]
        axis = {"conv2.weight": 0, "conv2.bias": 0, "conv3.weight": 1}.get(layer)
        if index == stage and axis is not None and len(shape) > axis and shape[axis] % (factor * width) == 0:
            yield shape[axis] // (factor * width)


def _classes(shapes: Shapes) -> Iterable[int]:
    for name, shape in shapes.items():
        if re.fullmatch(r"out_\d\.conv_out\.weight", name) and len(shape) > 1:
            yield shape[1]
        elif re.fullmatch(r"out_\d\.conv_out\.bias", name) and len(shape) == 1:
            yield shape[0]


def _blocks(layers, stage: str) -> int:
    return 1 + max((block for module, block, _ in layers if module == stage), default=-1)


def _adapters(shapes: Shapes, flavour: str, width: int) -> tuple[dict[str, Any], ...]:
    """The original study's adapter on all nine stages, as released (``legacy``)."""
    if flavour == "plain":
        return ()
    common = {"target": ALL_STAGES, "position": "residual", "legacy": True}
    if flavour == "linear":
        found = {stage: shapes.get(f"{stage}.1.fc1.weight") for stage in STAGES}
        ratio = _ratio({width * MODULES[stage][0]: shape[0] for stage, shape in found.items() if shape})
        return ({"kind": "linear", "placement": "sequential", "ratio": ratio, **common},)
    if flavour == "parallel":
        return ({"kind": "block", "placement": "parallel", "kernel_size": 0, **common},)
    kernel = _vote((shape[-1] for name, shape in shapes.items() if name.endswith(".med_adp_conv1.weight")),
                   "enc_block_0.1.med_adp_conv1.weight")
    return ({"kind": "block", "placement": "sequential", "kernel_size": kernel, **common},)


def _ratio(hidden: Mapping[int, int]) -> float:
    """The shortest decimal r with ``int(channels * r) == width`` in most stages; a file has only the widths."""
    ratios = [math.ceil(width / channels * 10**digits - 1e-9) / 10**digits
              for digits in range(1, 8) for channels, width in hidden.items()]
    if not ratios:
        raise ValueError("the linear adapters lack every .1.fc1.weight")
    return max(ratios, key=lambda ratio: sum(int(channels * ratio) == width for channels, width in hidden.items()))

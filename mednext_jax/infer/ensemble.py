"""Models as people use them: loaded from their directories, one or several, from image to probabilities.

An ensemble averages probabilities, so its models may differ in size and patch, but not in what goes in
(channels, normalisation) and what comes out (output kind, regions).
"""

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from mednext_jax import modeldir
from mednext_jax.infer.sliding_window import SlidingWindow

ACTIVATION_OF = {"regions": "sigmoid", "labels": "softmax"}


@dataclasses.dataclass(frozen=True)
class Member:
    """One model of an ensemble.

    Attributes:
      info: its description.
      network: the Linen module, or anything with ``apply({"params": params}, x)``.
      params: nested dict of arrays.
      source: where it came from, for messages.
    """

    info: modeldir.ModelInfo
    network: Any
    params: Any
    source: str = "model"


def load_member(
    path: str | os.PathLike,
    adapter: str | os.PathLike | None = None,
    dtype: str = "auto",
    force: bool = False,
) -> Member:
    """Load a model directory (or training workdir), with an adapter on it if one is given.

    Args:
      dtype: compute type of the network; ``"auto"`` is bfloat16 on a GPU or TPU and float32 on a CPU.
      force: take an adapter that was trained on another base.

    Raises:
      FileNotFoundError, ValueError: a file is missing or damaged, or the adapter belongs to another base.
    """
    info, params = modeldir.load_model(path)
    network = info.network(dtype=compute_dtype(dtype))
    if network.dim != "3d":
        raise ValueError(f"{path} is a {network.dim} network; whole volumes need a 3d one")
    if adapter:
        from mednext_jax import peft  # here, so that plain and merged models do not need the package

        attached = peft.load_adapter(adapter, params, force)
        peft.check_data(attached, info, adapter)
        network, params = attached.apply_to(network, params)
    network = network.clone(deep_supervision=False)  # its extra heads are for training alone
    return Member(info, network, params, f"{path} + {adapter}" if adapter else str(path))


def compute_dtype(dtype: str) -> str:
    """``dtype``, or for ``"auto"`` what suits the machine: bfloat16 on accelerators, float32 on CPUs."""
    if dtype != "auto":
        return dtype
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


class Ensemble:
    """Models whose probabilities are averaged; one model is an ensemble too.

    Args:
      members: at least one.
      patch_voxels: window of all models; None takes each one's own training patch.
      window_options: further arguments of :class:`SlidingWindow` (overlap, flips, windows_per_batch, ...).

    Raises:
      ValueError: the models differ in channels, normalisation, output kind, label scheme or regions.
    """

    def __init__(
        self, members: Sequence[Member], patch_voxels: Sequence[int] | None = None, **window_options: Any
    ):
        check_alike(members)
        self.members = tuple(members)
        self.info = members[0].info
        self._windows: dict[str, SlidingWindow] = {}
        self._patch_voxels = patch_voxels
        self._window_options = window_options

    def predict(self, image: np.ndarray, progress: Callable[[int, int], None] | None = None) -> np.ndarray:
        """Mean probabilities (D, H, W, K) float32 of one normalised image (D, H, W, C).

        Args:
          progress: called with (windows done, windows in all) of the model at work.

        Raises:
          ValueError: a model returned NaN or infinity.
        """
        total = None
        for member in self.members:
            probabilities = self._window(member).predict(member.params, image, progress)
            if not np.isfinite(probabilities).all():
                raise ValueError(f"{member.source} returned NaN: the model or the image is damaged")
            total = probabilities if total is None else np.add(total, probabilities, out=total)
        return total if len(self.members) == 1 else total / np.float32(len(self.members))

    def _window(self, member: Member) -> SlidingWindow:
        """The sliding window of a member; models of one architecture share one, and so one compilation."""
        patch = tuple(self._patch_voxels or member.info.patch_voxels)
        key = json.dumps([patch, repr(member.network)])
        if key not in self._windows:
            network = member.network
            self._windows[key] = SlidingWindow(
                lambda params, x: network.apply({"params": params}, x),
                patch,
                self.info.n_outputs,
                activation=ACTIVATION_OF[self.info.output],
                **self._window_options,
            )
        return self._windows[key]


def check_alike(members: Sequence[Member]) -> None:
    """Raise ValueError, naming the first difference, unless all models take and give the same."""
    if not members:
        raise ValueError("an ensemble needs at least one model")
    first = members[0]
    for other in members[1:]:
        modeldir.check_channels(first.info, other.info.channels, other.info.normalization)
        for field in ("output", "label_scheme", "regions"):
            ours, theirs = getattr(first.info, field), getattr(other.info, field)
            if ours != theirs or list(ours) != list(theirs):
                raise ValueError(f"{first.source} and {other.source} cannot be averaged: "
                                 f"their {field} are {ours} and {theirs}")

"""Folding adapters back into the base's own kernels, where the added branch is linear.

    lora       kernel + alpha / rank * A B                 1x1 kernels, and conv1's as taps x channels
    ssf        kernel * scale, bias * scale + shift        after a convolution or a norm
    depthwise  conv1's kernel + the branch's               the branch's padded with zeros to the same size

The merged network is a plain one: same cost as the base, no trace of the adapter. Everything else has an
activation between its two layers, so no kernel of the base can hold it, and :func:`merge` says so.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mednext_jax.nn import paths
from mednext_jax.nn.adapters import Adapter
from mednext_jax.peft import attach

Flat = dict[str, Any]

_NONLINEAR = {"conv": "a GELU", "block": "a norm and a GELU", "linear": "a ReLU"}


def merge(
    model: Any, params: Mapping[str, Any], tolerance: float = 1e-4, key: Any = None
) -> tuple[Any, Flat]:
    """The plain network, without adapters, that computes what the adapted one does.

    The result is proven before it is returned: both networks see one random input in float32, and no logit
    may differ by more than ``tolerance`` times the largest logit.

    Args:
      model: a ``MedNeXt`` with adapters (one without is returned as it is).
      params: its parameters, nested or flat.
      key: JAX key of the random input.

    Returns: (model without adapters, nested parameters).

    Raises:
      ValueError: an adapter is not linear, does not fit into the base's kernel, or the proof fails.
    """
    if not model.adapters:
        return model, paths.unflatten(paths.flatten(params))
    merged = paths.unflatten(fold(paths.flatten(params), model.adapters))
    plain = model.clone(adapters=())
    difference = _largest_difference(model, params, plain, merged, jax.random.key(0) if key is None else key)
    if not difference <= tolerance:
        raise ValueError(
            f"the merged network's logits differ from the adapted one's by {difference:.2g} of the largest "
            f"logit, above the tolerance {tolerance:.2g}: keep the adapter beside the base"
        )
    return plain, merged


def unmerge(
    merged_params: Mapping[str, Any], adapter_params: Mapping[str, Any], adapters: tuple[Adapter, ...]
) -> Flat:
    """The base's nested parameters from merged ones, up to rounding (so their hash is not the base's).

    Args:
      merged_params: what :func:`merge` returned, or a model file made of it.
      adapter_params: the adapter's leaves, flat (an adapter file's tensors).
      adapters: the method's adapters.

    Raises:
      ValueError: as :func:`merge`, or an SSF scale is zero.
    """
    flat = {**paths.flatten(merged_params), **paths.flatten(adapter_params)}
    return paths.unflatten(fold(flat, adapters, inverse=True))


def fold(flat: Mapping[str, Any], adapters: tuple[Adapter, ...], inverse: bool = False) -> Flat:
    """Flat parameters with every adapter added into (``inverse``: taken out of) the base's leaves.

    The adapters' own leaves are absent from the result.
    """
    for spec in adapters:
        if spec.kind in _NONLINEAR:
            raise ValueError(
                f"a {spec.kind!r} adapter cannot be merged: there is {_NONLINEAR[spec.kind]} between its "
                "layers, so no kernel of the base can hold it; keep the adapter file beside the base"
            )
    flat = {path: np.asarray(leaf) for path, leaf in flat.items()}
    # A layer computes ssf(kernel + update), so updates go in before scales, and come out after them.
    order = sorted(adapters, key=lambda spec: spec.kind == "ssf", reverse=inverse)
    for spec in order:
        flat = _FOLDS[spec.kind](flat, spec, inverse)
    return flat


def _fold_lora(flat: Flat, spec: Adapter, inverse: bool) -> Flat:
    for layer in _sites(flat, spec, "lora_a"):
        a, b = flat.pop(f"{layer}/lora_a"), flat.pop(f"{layer}/lora_b")
        kernel = flat[f"{layer}/kernel"]
        update = (a @ b).reshape(kernel.shape) * np.float32(spec.alpha / spec.rank)
        flat[f"{layer}/kernel"] = kernel - update if inverse else kernel + update
    return flat


def _fold_ssf(flat: Flat, spec: Adapter, inverse: bool) -> Flat:
    for layer in _sites(flat, spec, "ssf_scale"):
        factor = next((name for name in ("kernel", "scale") if f"{layer}/{name}" in flat), None)
        if factor is None:
            raise ValueError(
                f"ssf after the block {layer} cannot be merged: it also scales the block's residual, which "
                "no kernel computes; train with scope='layer' to merge"
            )
        scale, shift = flat.pop(f"{layer}/ssf_scale"), flat.pop(f"{layer}/ssf_shift")
        if inverse and not scale.all():
            raise ValueError(f"{layer}/ssf_scale has a zero: what it removed cannot be brought back")
        kernel, bias = flat[f"{layer}/{factor}"], flat[f"{layer}/bias"]
        flat[f"{layer}/{factor}"] = kernel / scale if inverse else kernel * scale
        flat[f"{layer}/bias"] = (bias - shift) / scale if inverse else bias * scale + shift
    return flat


def _fold_depthwise(flat: Flat, spec: Adapter, inverse: bool) -> Flat:
    for layer in _sites(flat, spec, "branch"):
        kernel = flat[f"{layer}/kernel"]
        update = pad_kernel(flat.pop(f"{layer}/branch"), kernel.shape, f"{layer}/branch")
        flat[f"{layer}/kernel"] = kernel - update if inverse else kernel + update
    return flat


_FOLDS = {"lora": _fold_lora, "ssf": _fold_ssf, "depthwise": _fold_depthwise}


def pad_kernel(kernel: np.ndarray, shape: tuple[int, ...], where: str) -> np.ndarray:
    """``kernel`` (*k, 1, C) with zeros around it up to ``shape`` (*K, 1, C): the same convolution."""
    margins = [(large - small) // 2 for small, large in zip(kernel.shape, shape, strict=True)]
    if min(margins) < 0:
        raise ValueError(
            f"{where} has kernel size {kernel.shape[0]}, larger than the {shape[0]} of the convolution "
            "beside it: it cannot be merged; keep the adapter file beside the base"
        )
    return np.pad(kernel, [(margin, margin) for margin in margins])


def _sites(flat: Mapping[str, Any], spec: Adapter, leaf: str) -> list[str]:
    """Modules that ``spec`` targets and that hold ``leaf``."""
    ends = [path.removesuffix(f"/{leaf}") for path in flat if path.endswith(f"/{leaf}")]
    return [module for module in ends if re.fullmatch(spec.target, module)]


def _largest_difference(model: Any, params: Any, plain: Any, merged: Any, key: Any) -> float:
    """max|a - b| / max|a| over all outputs of the two networks on one random input, in float32."""
    spatial = (32,) * int(model.dim[0])  # at 16 the bottleneck is one voxel, and its norm hides all
    x = jax.random.normal(key, (1, *spatial, model.in_channels))
    first, second = (
        jax.tree.leaves(attach.compiled(net.clone(dtype=jnp.float32))({"params": paths.unflatten(paths.flatten(p))}, x))
        for net, p in ((model, params), (plain, merged))
    )
    return max(float(jnp.abs(a - b).max() / jnp.abs(a).max()) for a, b in zip(first, second, strict=True))

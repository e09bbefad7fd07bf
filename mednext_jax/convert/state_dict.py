"""A PyTorch state dict as our parameters, and back, bit for bit.

The names come from one table (``names.py``), the wanted shapes from the network itself (``jax.eval_shape``),
so every tensor of either side has exactly one place on the other, and a missing, unexpected, misshapen or
damaged one is an error that names it.
"""
from __future__ import annotations

import dataclasses
import functools
import json
import logging
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from mednext_jax.convert import infer_kwargs, layouts, monai, names
from mednext_jax.nn import paths
from mednext_jax.nn.mednext import MedNeXt, parameter_shapes

LOG = logging.getLogger(__name__)

# Tensors of a training module that are no part of its network, e.g. MONAI's dice_loss_fn.class_weight.
STRAY = re.compile(r"(\w*loss\w*|criterion|\w*metrics?)(\.|$).*")
SHOWN = 4


@dataclasses.dataclass(frozen=True)
class Conversion:
    """A state dict, understood.

    Attributes:
      kwargs: arguments of ``MedNeXt``, plain JSON values and tuples.
      params: nested parameters, float32, ready for ``apply``.
      notes: what was assumed, changed or left out, a sentence each.
      dummy_tensor: the value of upstream's unused parameter, for a bit-equal way back.
    """

    kwargs: dict[str, Any]
    params: dict[str, Any]
    notes: tuple[str, ...]
    dummy_tensor: float = 1.0


def from_torch(state_dict: Mapping[str, Any], **known: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters of a MedNeXt trained in PyTorch: ``MedNeXt(**kwargs).apply({"params": params}, x)``.

    Args:
      state_dict: name -> array, of upstream's network, the original study's adapter networks or MONAI's
      MedNeXt,
        with or without a prefix (``net.``, ``module.``, ``_orig_mod.``).
      **known: arguments of ``MedNeXt`` that a state dict cannot tell (``do_res``, ``norm_type``); they win.

    Returns: the arguments and the nested float32 parameters. What was assumed is logged as a warning;
      :func:`convert` returns it instead.

    Raises:
      ValueError: a tensor is missing, unexpected, misshapen or damaged; the error names it.
    """
    done = convert(state_dict, **known)
    for note in done.notes:
        LOG.warning("%s", note)
    return done.kwargs, done.params


def convert(state_dict: Mapping[str, Any], **known: Any) -> Conversion:
    """As :func:`from_torch`, returning the notes beside the arguments and parameters."""
    state_dict, notes = strip(state_dict)
    is_monai = monai.matches(state_dict)
    if is_monai:
        state_dict, more = monai.to_upstream(state_dict)
        notes += more
    shapes = {name: tuple(value.shape) for name, value in state_dict.items()}
    kwargs, assumed = infer_kwargs.infer(shapes)
    unknown = sorted(set(known) - set(kwargs))
    if unknown:
        raise ValueError(f"{unknown[0]} is not an argument of MedNeXt; there are {', '.join(kwargs)}")
    kwargs.update(known)
    notes += [note for note in assumed if note.partition("=")[0] not in known]

    spatial = 2 if kwargs["dim"] == "2d" else 3
    flavour = infer_kwargs.find_flavour(shapes)
    wanted = {names.DUMMY: (1,)}
    places = {}
    for path, shape in expected_shapes(kwargs).items():
        name, layout = names.upstream_name(path, flavour)
        places[name] = path, layout
        wanted[name] = layouts.torch_shape(shape, layout, spatial)
    _compare(shapes, wanted)

    flat, dtypes = {}, {}
    for name, (path, layout) in places.items():
        array = _array(name, state_dict[name])
        dtypes.setdefault(array.dtype.name, name)
        flat[path] = layouts.from_torch(array, layout)
    dummy = float(_array(names.DUMMY, state_dict[names.DUMMY])[0])
    if dummy != 1.0:
        notes.append(f"dummy_tensor is {dummy:g}, not 1: it takes part in no computation, "
                     f"pass dummy_tensor={dummy:g} to to_torch for a bit-equal way back")
    notes += [f"converted from {dtype} to float32 (e.g. {name})"
              for dtype, name in sorted(dtypes.items()) if dtype != "float32"]
    return Conversion(kwargs, paths.unflatten(flat), tuple(notes), dummy)


def to_torch(kwargs: Mapping[str, Any], params: Mapping[str, Any], dummy_tensor: float = 1.0
             ) -> dict[str, np.ndarray]:
    """Upstream's state dict of a network, the exact inverse of :func:`from_torch`.

    Args:
      kwargs: arguments of ``MedNeXt``; of adapters only the original study's have upstream names.
      params: nested or flat parameters.
      dummy_tensor: value of upstream's unused parameter; training never moves it from 1.

    Returns: name -> array in the parameters' dtype, for ``load_state_dict`` of the class that the arguments
    mean.

    Raises:
      ValueError: a parameter is missing, unexpected or misshapen, or has no name upstream.
    """
    flat = paths.flatten(params)
    _compare({path: tuple(value.shape) for path, value in flat.items()}, expected_shapes(kwargs))
    spatial = 2 if kwargs.get("dim", "3d") == "2d" else 3
    flavour = _flavour_of(kwargs)
    state_dict = {names.DUMMY: np.full((1,), dummy_tensor, np.float32)}
    for path, value in flat.items():
        name, layout = names.upstream_name(path, flavour)
        state_dict[name] = layouts.to_torch(np.asarray(value), layout, spatial)
    return state_dict


def module_from_torch(state_dict: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Nested parameters of a single block.

    Args:
      state_dict: that of upstream's ``MedNeXtBlock`` (also the study's prefixed one), ``MedNeXtDownBlock``,
        ``MedNeXtUpBlock`` or ``OutBlock``.
      kind: ``"block"``, ``"down"``, ``"up"`` or ``"out"``.

    Raises:
      ValueError: a name that no such block has.
    """
    leaves = {}
    for layer in names.LAYERS:
        name, layout = names.layer_name(layer, up=kind == "up")
        leaves[name] = layer, layout
    flat = {}
    for name, value in state_dict.items():
        found = leaves.get(name.removeprefix("med_adp_"))
        if found is None:
            raise ValueError(f"unexpected {name}: no {kind} block has it")
        flat[found[0]] = layouts.from_torch(_array(name, value), found[1])
    return paths.unflatten(flat)


def strip(state_dict: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The network's own tensors under their own names, and a note on each thing taken off.

    Wrappers put a prefix before every name (Lightning's ``net.``, data-parallel ``module.``, compiled
    ``_orig_mod.``), found by the one tensor each network has, its stem. Tensors beside the prefix, and those
    of losses and metrics, are left out.

    Raises:
      ValueError: several networks in one state dict, or a wrapper that makes two names equal.
    """
    notes = []
    clean: dict[str, Any] = {}
    for name, value in state_dict.items():
        short = name.replace("_orig_mod.", "")
        if short in clean:
            raise ValueError(f"the state dict holds both {short} and {name}: keep one of them")
        clean[short] = value
    stems = sorted(name for name in clean if re.search(r"(^|\.)stem\.weight$", name))
    if not stems:
        raise ValueError(f"missing stem.weight: not the state dict of a MedNeXt; there are {_some([*clean])}")
    if len(stems) > 1:
        raise ValueError(f"the state dict holds several networks ({', '.join(stems)}): keep one of them")
    prefix = stems[0].removesuffix("stem.weight")
    inside = {name.removeprefix(prefix): value for name, value in clean.items() if name.startswith(prefix)}
    outside = [name for name in clean if not name.startswith(prefix)]
    outside += [name for name in inside if STRAY.fullmatch(name)]
    if outside:
        notes.append(f"left out what is not the network's: {_some(outside)}")
    return {name: value for name, value in inside.items() if not STRAY.fullmatch(name)}, notes


def expected_shapes(kwargs: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """path -> shape of every parameter of ``MedNeXt(**kwargs)``."""
    return dict(_expected_shapes(json.dumps(kwargs, sort_keys=True, default=dataclasses.asdict)))


@functools.lru_cache(maxsize=8)
def _expected_shapes(kwargs_json: str) -> dict[str, tuple[int, ...]]:
    kwargs = {key: tuple(value) if isinstance(value, list) else value
              for key, value in json.loads(kwargs_json).items()}
    return {path: tuple(leaf.shape) for path, leaf in parameter_shapes(MedNeXt(**kwargs)).items()}


def _flavour_of(kwargs: Mapping[str, Any]) -> str:
    """The flavour of upstream's network with these adapters."""
    adapters = MedNeXt(**kwargs).adapters
    if not adapters:
        return "plain"
    first = adapters[0]
    released = first.legacy and first.position == "residual" and all(map(first.matches, names.STAGES))
    if len(adapters) > 1 or first.kind not in ("block", "linear") or not released:
        raise ValueError(f"an adapter of kind {first.kind!r} has no counterpart in the PyTorch networks: "
                         "merge it, or export the base network without it")
    return "linear" if first.kind == "linear" else first.placement


def _array(name: str, value: Any) -> np.ndarray:
    """A tensor of any of the kinds that callers hold, as a finite floating-point array."""
    if hasattr(value, "detach"):  # a torch tensor; numpy knows no bfloat16 of torch's
        value = value.detach().cpu()
        value = value.float() if "bfloat16" in str(value.dtype) else value
    array = np.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"{name} holds {array.dtype}, not floating-point numbers")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds NaN or infinite numbers: it is damaged, or its training diverged")
    return array


def _compare(found: Mapping[str, tuple], wanted: Mapping[str, tuple]) -> None:
    """Raise unless names and shapes agree; the error names what does not."""
    faults = []
    missing, unexpected = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    misshapen = [f"{name} has shape {found[name]} instead of {wanted[name]}"
                 for name in sorted(wanted.keys() & found.keys()) if found[name] != wanted[name]]
    for word, group in (("missing ", missing), ("unexpected ", unexpected), ("", misshapen)):
        if group:
            faults.append(f"{word}{_some(group)}")
    if faults:
        raise ValueError(f"the parameters do not fit the network that they describe: {'; '.join(faults)}")


def _some(found: list[str]) -> str:
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return ", ".join(found[:SHOWN]) + more

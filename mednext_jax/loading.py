"""Fit the parameters of one network into another, and say what happened to every tensor.

Used wherever weights meet a network they were not made for: a base checkpoint into a network with adapters,
one with deep-supervision heads into one without, a small kernel into a large one (UpKern), another head.
Nothing is left out silently: a path that only one side has must be allowed by a pattern, or it is an error.
"""
from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from mednext_jax.convert import upkern

SHOWN = 6  # paths listed per kind before the rest is only counted

Patterns = Iterable[str]


@dataclasses.dataclass(frozen=True)
class Report:
    """What :func:`merge` did, by path.

    Attributes:
      matched: taken from the source as they are.
      grown: taken from the source, kernel enlarged by UpKern.
      replaced: on both sides with different shapes; the source's is not used.
      new: only in the target; not loaded, they keep their initial value.
      dropped: only in the source; not used.
      cast: loaded, but in another dtype than the source's.
    """

    matched: tuple[str, ...] = ()
    grown: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    new: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    cast: tuple[str, ...] = ()

    def lines(self, shown: int = SHOWN) -> list[str]:
        """One line per kind that occurred: its number and, but for the matched, its first ``shown`` paths."""
        lines = [f"matched {len(self.matched)} tensors"]
        for field in dataclasses.fields(self)[1:]:
            found = getattr(self, field.name)
            if found:
                more = f", and {len(found) - shown} more" if len(found) > shown else ""
                lines.append(f"{field.name} {len(found)}: {', '.join(found[:shown])}{more}")
        return lines

    def __str__(self) -> str:
        return "\n".join(self.lines())


def merge(
    target: Mapping[str, Any],
    source: Mapping[str, Any],
    allow_new: Patterns = (),
    allow_dropped: Patterns = (),
    allow_replaced: Patterns = (),
    grow_kernels: bool = False,
) -> tuple[dict[str, np.ndarray], Report]:
    """The source's tensors that the target network takes, by path.

        loaded, report = loading.merge(initial, base, allow_new=[r".*/adapter/.*"],
                                       allow_dropped=[r"out_[1-4]/.*"])
        params = paths.unflatten({**initial, **loaded})

    Args:
      target: flat path -> array or ``jax.ShapeDtypeStruct``: what the network needs.
      source: flat path -> array: what there is.
      allow_new: patterns (``re.fullmatch``) of paths that may be missing in the source.
      allow_dropped: patterns of paths of the source that the target may not have.
      allow_replaced: patterns of paths that may differ in shape (a head with other classes): not loaded.
      grow_kernels: enlarge spatially smaller convolution kernels, see :mod:`mednext_jax.convert.upkern`.

    Returns: the loaded tensors in the target's dtype (no others), and the report.

    Raises:
      ValueError: a path is missing, left over or misshapen and no pattern allows it (the error names it), or
        nothing matches at all.
    """
    new = sorted(set(target) - set(source))
    dropped = sorted(set(source) - set(target))
    _refuse(new, allow_new, "the file lacks {path}, which the network needs")
    _refuse(dropped, allow_dropped, "the file holds {path}, which the network does not have")
    loaded: dict[str, np.ndarray] = {}
    kinds: dict[str, list[str]] = {"matched": [], "grown": [], "replaced": [], "cast": []}
    for path in sorted(set(target) & set(source)):
        wanted, array = tuple(target[path].shape), np.asarray(source[path])
        if array.shape == wanted:
            kinds["matched"].append(path)
        elif grow_kernels and upkern.can_grow(array.shape, wanted):
            array = upkern.grow(array, wanted[:-2])
            kinds["grown"].append(path)
        else:
            _refuse([path], allow_replaced,
                    f"{{path}} has shape {array.shape} in the file, the network needs {wanted}")
            kinds["replaced"].append(path)
            continue
        dtype = np.dtype(getattr(target[path], "dtype", array.dtype))
        if dtype != array.dtype:
            kinds["cast"].append(path)
        loaded[path] = array.astype(dtype, copy=False)
    if not loaded:
        raise ValueError("no tensor of the file fits the network: it belongs to another architecture")
    return loaded, Report(new=tuple(new), dropped=tuple(dropped), **{k: tuple(v) for k, v in kinds.items()})


def _refuse(found: list[str], allowed: Patterns, message: str) -> None:
    """Raise for the first path that no pattern allows; the message counts the others."""
    patterns = [re.compile(pattern) for pattern in allowed]
    refused = [path for path in found if not any(pattern.fullmatch(path) for pattern in patterns)]
    if refused:
        more = f" (and {len(refused) - 1} more like it)" if len(refused) > 1 else ""
        raise ValueError(message.format(path=refused[0]) + more)

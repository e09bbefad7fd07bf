"""Checkpoint files as state dicts: what PyTorch, Lightning and nnU-Net write, and safetensors.

    .model           nnU-Net v1 (upstream's own)     under "state_dict"
    .ckpt            Lightning                       under "state_dict", names begin with ``net.``
    .pth             nnU-Net v2                      under "network_weights"
    .pt, .pth, .bin  torch.save(net.state_dict())    the file itself, or under "model", "model_state_dict",
    ... .safetensors     safetensors

The container is told by its first bytes, not by its suffix. torch is not needed, see ``torch_file.py``.
"""
from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from mednext_jax import tensor_file
from mednext_jax.convert import torch_file
from mednext_jax.convert.tensors import FileTensor, contiguous_strides

# Where a checkpoint keeps its network, most telling first.
KEYS = ("state_dict", "network_weights", "model_state_dict", "model", "network", "net")
STEM = re.compile(r"(^|\.)stem\.weight$")
DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16,
          "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_}
MAX_HEADER = 100_000_000  # bytes, the format's own limit
EXPECTED_CODE = ("torch.", "numpy.", "collections.", "_codecs.")  # not worth a note


def read(path: str | os.PathLike) -> tuple[dict[str, FileTensor], list[str]]:
    """The state dict in a checkpoint file; tensors are read when used.

    Returns: name -> tensor, and notes on what of the file was not loaded.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged, of another kind, or holds no tensors of a network.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist" if not path.exists() else f"{path} is not a file")
    with open(path, "rb") as file:
        start = file.read(9)
    if start.startswith(b"version h"):
        raise ValueError(f"{path} is a Git LFS pointer, not the file itself: fetch it with git lfs pull")
    if start[8:9] == b"{":  # 8 bytes of header length, then JSON
        return _read_safetensors(path), []
    content, refused = torch_file.load(path)
    state_dict = _find_state_dict(path, content)
    foreign = [origin for origin in refused if not origin.startswith(EXPECTED_CODE)]
    notes = []
    if foreign:
        more = ", ..." if len(foreign) > 3 else ""
        notes = [f"the file also pickles Python objects ({', '.join(foreign[:3])}{more}); they were not "
                 "loaded: only tensors are, no code of a file is ever executed"]
    return {name: _named(path, name, tensor) for name, tensor in state_dict.items()}, notes


def write_safetensors(path: str | os.PathLike, state_dict: Mapping[str, np.ndarray]) -> None:
    """Write a state dict that ``safetensors.torch.load_file`` reads; whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        tensor_file.write(temporary, state_dict, {"format": "pt"})
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _find_state_dict(path: Path, content: Any) -> Mapping[str, Any]:
    """The mapping of names to tensors that is a network's."""
    if isinstance(content, torch_file.Inert):
        raise ValueError(f"{path} is a pickled Python object ({content.origin}), not tensors; it can be opened "
                         "only by executing it, which is refused: save model.state_dict() instead")
    places = {(): content}
    if isinstance(content, Mapping):
        places |= {(key,): value for key, value in content.items()}
    tensors = {place: value for place, value in places.items() if isinstance(value, Mapping)
               and any(isinstance(tensor, FileTensor) for tensor in value.values())}
    networks = {place: value for place, value in tensors.items()
                if any(isinstance(name, str) and STEM.search(name) for name in value)}
    for choice in (networks, tensors):  # without a stem the conversion will say so by name
        for key in ((), *((key,) for key in KEYS)):
            if key in choice:
                return choice[key]
        if len(choice) == 1:
            return next(iter(choice.values()))
        if choice:
            found = ", ".join(str(place[0]) for place in choice)
            raise ValueError(f"{path} holds several sets of tensors, under {found}: "
                             f"save the wanted one alone, or under {KEYS[0]!r}")
    raise ValueError(f"{path} holds no tensors of a network; give the file with the weights "
                     "(nnU-Net: the .model or .pth, not the .pkl beside it)")


def _named(path: Path, name: Any, tensor: Any) -> FileTensor:
    if not isinstance(tensor, FileTensor):
        kind = tensor.origin if isinstance(tensor, torch_file.Inert) else type(tensor).__name__
        raise ValueError(f"{path}: {name} is no dense tensor ({kind})")
    return dataclasses.replace(tensor, name=str(name))


def _read_safetensors(path: Path) -> dict[str, FileTensor]:
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(MAX_HEADER, size):
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        return {name: _safetensor(path, name, fields, 8 + length, size) for name, fields in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is no safetensors file, or it is damaged or truncated ({error})") from None


def _safetensor(path: Path, name: str, fields: dict[str, Any], data: int, size: int) -> FileTensor:
    dtype, shape = np.dtype(DTYPES[fields["dtype"]]), tuple(int(n) for n in fields["shape"])
    start, end = fields["data_offsets"]
    if not 0 <= start <= end <= size - data or end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"tensor {name} does not lie within the file")
    read_bytes = functools.partial(_read_range, path, data + start, end - start)
    return FileTensor(shape, dtype, contiguous_strides(shape), 0, read_bytes, name)


def _read_range(path: Path, start: int, size: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(size)

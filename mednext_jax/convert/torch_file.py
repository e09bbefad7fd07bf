"""Reads what ``torch.save`` wrote, without torch and without running anything the file says.

A PyTorch checkpoint is a pickle, and a pickle is a program: it may name any function and have it called.
Here the pickle is walked by an unpickler that knows four things - dictionaries, tensors, parameters and
storages - and puts an inert stand-in wherever any other class or function is named. Nothing is imported,
nothing of the file's choosing is called, so a checkpoint from a stranger can be opened; what it keeps beside
tensors is not available.

Both containers are read: the zip archive (PyTorch 1.6 and later) and the plain stream of pickles before it.
"""
from __future__ import annotations

import functools
import io
import mmap
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from mednext_jax.convert.tensors import FileTensor

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C

STORAGES = {
    "DoubleStorage": np.dtype(np.float64), "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16), "BFloat16Storage": np.dtype(jnp.bfloat16),
    "LongStorage": np.dtype(np.int64), "IntStorage": np.dtype(np.int32), "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8), "ByteStorage": np.dtype(np.uint8), "BoolStorage": np.dtype(np.bool_),
}


class Inert:
    """Stands for an object of a class that is not loaded: takes whatever is done to it and does nothing."""

    origin = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def ignore(self, *args: Any, **kwargs: Any) -> Inert:
        return self

    __call__ = __setstate__ = __setitem__ = append = extend = add = ignore


class SafeUnpickler(pickle._Unpickler):
    """An unpickler to which every class but those of tensors and dictionaries is :class:`Inert`.

    Derived from the one that is written in Python: that in C allots as many places as the largest memo index
    that a file names, 34 GB for six bytes.
    """

    def __init__(self, file: io.BytesIO | mmap.mmap, storage: Callable[[tuple], Any]) -> None:
        super().__init__(file, encoding="utf-8")
        self.storage = storage
        self.refused: dict[str, type[Inert]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch._utils" and name in REBUILD:
            return REBUILD[name]
        if module in ("torch", "torch.storage") and name in STORAGES:
            return STORAGES[name]
        origin = f"{module}.{name}"
        if origin not in self.refused:
            self.refused[origin] = type("Inert", (Inert,), {"origin": origin})
        return self.refused[origin]

    def persistent_load(self, pid: Any) -> Any:
        if isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage" and isinstance(pid[1], np.dtype):
            return self.storage(pid)
        if isinstance(pid, tuple) and pid[:1] == ("module",) and isinstance(pid[1], type):
            return pid[1]  # the old container wraps the class of a pickled module so; it is Inert
        return Inert()


def _rebuild_tensor(storage: Any, offset: int, shape: tuple, strides: tuple, *rest: Any) -> Any:
    """A tensor over a storage ``(dtype, read)``; ``rest`` is what only training needs."""
    if not isinstance(storage, tuple):
        return Inert()
    dtype, read = storage
    return FileTensor(tuple(map(int, shape)), dtype, tuple(map(int, strides)), int(offset), read)


def _rebuild_parameter(data: Any, *rest: Any) -> Any:
    return data


REBUILD = {
    "_rebuild_tensor": _rebuild_tensor,
    "_rebuild_tensor_v2": _rebuild_tensor,
    "_rebuild_parameter": _rebuild_parameter,
    "_rebuild_parameter_with_state": _rebuild_parameter,
}


def load(path: Path) -> tuple[Any, list[str]]:
    """The object that ``torch.save`` wrote, tensors as :class:`FileTensor`, foreign objects as
    :class:`Inert`.

    Returns: the object, and the classes and functions that the file names and that were not loaded.

    Raises:
      ValueError: the file is damaged, or not PyTorch's.
    """
    try:
        return _load_zip(path) if zipfile.is_zipfile(path) else _load_stream(path)
    except Exception as error:  # a damaged pickle can raise anything
        detail = "" if isinstance(error, KeyError) else f" ({error})"  # an unknown code of the pickle says nothing
        raise ValueError(f"{path} is not a PyTorch file, or it is damaged or truncated{detail}") from None


def _load_zip(path: Path) -> tuple[Any, list[str]]:
    archive = zipfile.ZipFile(path)
    names = archive.namelist()
    root = next((name[:-len("data.pkl")] for name in names if name.split("/")[1:] == ["data.pkl"]), None)
    if root is None:
        raise ValueError("an archive without data.pkl")
    if f"{root}constants.pkl" in names:
        raise ValueError("a TorchScript program; save its state_dict() instead")
    if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
        raise ValueError("written on a big-endian machine")
    read = functools.lru_cache(maxsize=1)(lambda key: archive.read(f"{root}data/{key}"))  # zip checks its CRC

    def storage(pid: tuple) -> tuple:
        return pid[1], functools.partial(read, pid[2])

    unpickler = SafeUnpickler(io.BytesIO(archive.read(f"{root}data.pkl")), storage)
    return unpickler.load(), sorted(unpickler.refused)


def _load_stream(path: Path) -> tuple[Any, list[str]]:
    """The container before PyTorch 1.6: pickles one after another, then the storages in order of their keys."""
    places: dict[str, tuple[int, int]] = {}  # key -> position and size in bytes
    dtypes: dict[str, np.dtype] = {}

    def read(key: str) -> bytes:
        start, size = places[key]
        with open(path, "rb") as again:
            again.seek(start)
            return again.read(size)

    def storage(pid: tuple) -> tuple:
        dtypes[pid[2]] = pid[1]
        return pid[1], functools.partial(read, pid[2])

    with open(path, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as file:
        # A map gives what there is; a file sets memory aside for as many bytes as a forged length asks for.
        unpicklers = [SafeUnpickler(file, storage) for _ in range(5)]
        if unpicklers[0].load() != LEGACY_MAGIC:
            raise ValueError("no magic number")
        unpicklers[1].load(), unpicklers[2].load()  # protocol version; the machine it was written on
        found, keys = unpicklers[3].load(), unpicklers[4].load()
        for key in keys:
            size = struct.unpack("<q", file.read(8))[0] * dtypes[key].itemsize
            places[key] = file.tell(), size
            file.seek(size, io.SEEK_CUR)
        if file.tell() > path.stat().st_size:
            raise ValueError("it ends too early")
    return found, sorted(unpicklers[3].refused)

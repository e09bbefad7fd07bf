"""A tensor that still lies in its file: shape and type are known, the numbers are read when asked for.

Reading a checkpoint this way costs the memory of what is used: its optimizer states are never touched.
"""
from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class FileTensor:
    """One dense tensor of a file; ``np.asarray`` reads it.

    Attributes:
      shape, dtype: of the array.
      strides: in elements, as PyTorch counts them.
      offset: of the first element in the storage, in elements.
      read: gives the bytes of the storage.
      name: for error messages.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    strides: tuple[int, ...]
    offset: int
    read: Callable[[], bytes]
    name: str = ""

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        try:
            storage = np.frombuffer(self.read(), self.dtype)
        except Exception as error:  # zip, zlib and numpy each have their own
            raise ValueError(f"tensor {self.name} cannot be read, the file is damaged ({error})") from None
        last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        negative = min((self.offset, *self.strides, *self.shape)) < 0
        if negative or (math.prod(self.shape) and last >= storage.size):
            raise ValueError(f"tensor {self.name} reaches beyond its storage: the file is damaged")
        steps = [stride * self.dtype.itemsize for stride in self.strides]
        view = np.lib.stride_tricks.as_strided(storage[self.offset:], self.shape, steps, writeable=False)
        return view if dtype is None else view.astype(dtype)


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides in elements of a C-contiguous array."""
    return tuple(math.prod(shape[axis + 1:]) for axis in range(len(shape)))

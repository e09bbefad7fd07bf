"""Weights from and to PyTorch: one table of names, safe readers, UpKern."""

from mednext_jax.convert.state_dict import Conversion, convert, from_torch, module_from_torch, to_torch

__all__ = ["Conversion", "convert", "from_torch", "module_from_torch", "to_torch"]

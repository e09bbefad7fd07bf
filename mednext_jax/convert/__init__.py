"""Weights from and to PyTorch: one table of names, safe readers, UpKern."""

"""Kernels for NVIDIA GPUs, for what XLA does at a fraction of the memory's speed."""

"""Kernels for NVIDIA GPUs, for what XLA's fusions do at a fraction of the memory's speed; each with its XLA twin."""

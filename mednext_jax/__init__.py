"""MedNeXt in JAX: the network, its fine-tuning by adapters, training, use and measurement."""

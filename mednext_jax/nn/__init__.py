"""The network: depthwise operations, blocks, adapters, MedNeXt. Flax is imported here alone."""

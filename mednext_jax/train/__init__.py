"""Training: losses, the optimizer over the parameter tree, the jitted step, the loop and its checkpoints."""

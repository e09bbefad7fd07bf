"""Use of a trained network: sliding windows, test-time flips, ensembles, post-processing, export."""

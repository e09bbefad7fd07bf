"""Measurement: overlap, surface and lesion-wise metrics, statistics, and the report."""

"""What ``launch/benchmark.py`` measures: one module per sub-command, and what they share."""

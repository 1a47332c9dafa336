"""Scripts that measure; run them from the root, e.g. `python -m benchmarks.road`."""

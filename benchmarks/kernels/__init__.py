"""What `python -m benchmarks.kernels` times: every kernel beside every other implementation that is installed."""

"""What `launch/bench_kernels.py` times: every kernel beside every other implementation that is installed."""

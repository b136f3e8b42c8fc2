"""`python -m benchmarks.kernels.aot` compiles every kernel for every architecture, without a GPU."""

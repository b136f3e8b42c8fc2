"""Benchmarks of every kernel beside every other implementation that is installed."""

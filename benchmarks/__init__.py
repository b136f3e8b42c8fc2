"""Benchmarks of Ingot beside its peers. They are not installed, and the packages never import them."""

"""Tensor and sequence parallelism: the device mesh, collectives, split layers."""

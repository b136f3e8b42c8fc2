"""Attention written in Gluon, Triton's language below tiles, for NVIDIA's Hopper GPUs (sm_90)."""

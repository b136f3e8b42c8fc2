"""Ingot: distributed GPT pretraining, from raw text to trained weights."""

__version__ = "0.1.0"

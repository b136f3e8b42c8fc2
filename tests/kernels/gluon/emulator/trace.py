"""Assumed costs of operations: not measured, only to put a run's operations on a time axis."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Costs:
    """Clocks of an H100's multiprocessor, from NVIDIA's data sheet where it states them."""

    step: float = 10
    """Of an access to memory or a barrier, to issue."""
    lanes: int = 128
    """Elements per clock of any operation on registers."""
    exponentials: int = 16
    """Per clock."""
    flop: int = 4096
    """Of 16-bit products per clock."""
    latency: float = 600
    """From the issue of a copy to its first bytes."""
    bandwidth: int = 64
    """Bytes per clock that copies bring."""

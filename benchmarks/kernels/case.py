"""What is timed: one operation at one shape, by several implementations on the same tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

# What is timed. It may return its result, a tensor or several, which is then compared with the other rivals'.
Thunk = Callable[[], object]
# Makes the tensors of a case and returns what is timed. It raises where its implementation cannot run.
Setup = Callable[[], Thunk]


@dataclass(frozen=True)
class BenchCase:
    """One operation at one shape.

    kernel: its family ("attention"), a plot each. part: "forward", "backward" or "step". shape: for people.
    width: the number on the plot's axis (sequence length, row width). axis: what that number is.
    flops, bytes: the least that the operation must compute and move (docs/kernels.md); what bounds it decides which
    of the two the report gives a rate of. rivals: by name; "ingot" and names that begin so are ours, "reference" is the
    plain PyTorch twin. group: cases of one kernel and part that share a table and a panel of the plot.
    unlike: rivals that rightly give other numbers than ours, and so are timed without being compared.
    """

    kernel: str
    part: str
    shape: str
    axis: str
    width: int
    dtype: str
    flops: float
    bytes: float
    rivals: Mapping[str, Setup]
    group: str = ""
    unlike: frozenset[str] = frozenset()

"""Describes the part of a global tensor that a rank holds, for the model, its layers and checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from torch import Tensor


@dataclass(frozen=True)
class Slice:
    """The contiguous part `start:stop` of dimension `dim` of a global tensor, and all of the others.

    The slice of all of a tensor has dim 0, start 0 and stop global_shape[0]; a scalar has shape (), stop 1.
    """

    global_shape: tuple[int, ...]
    dim: int
    start: int
    stop: int

    @staticmethod
    def full(shape: tuple[int, ...]) -> Slice:
        """All of a tensor of this shape."""
        return Slice(tuple(shape), 0, 0, shape[0] if shape else 1)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the part."""
        if not self.global_shape:
            return ()
        before, after = self.global_shape[: self.dim], self.global_shape[self.dim + 1 :]
        return (*before, self.stop - self.start, *after)

    @property
    def numel(self) -> int:
        """Number of elements of the part."""
        return prod(self.shape)

    @property
    def is_full(self) -> bool:
        """Whether the part is the global tensor."""
        return not self.global_shape or (self.start, self.stop) == (0, self.global_shape[self.dim])

    def take(self, global_tensor: Tensor) -> Tensor:
        """The part of `global_tensor` [global_shape] as a view [shape]."""
        if tuple(global_tensor.shape) != self.global_shape:
            raise ValueError(f"a slice of {self.global_shape} taken of {tuple(global_tensor.shape)}")
        if not self.global_shape:
            return global_tensor
        return global_tensor.narrow(self.dim, self.start, self.stop - self.start)


def mark(tensor: Tensor, part: Slice) -> None:
    """Record on a parameter which slice of its global tensor it holds (`slice_of` reads it)."""
    tensor.slice = part  # pyright: ignore[reportAttributeAccessIssue]


def slice_of(tensor: Tensor) -> Slice:
    """The slice that `mark` recorded. Every parameter of a built model has one."""
    return tensor.slice  # pyright: ignore[reportAttributeAccessIssue]

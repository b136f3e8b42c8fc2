"""Counts the random numbers that PyTorch draws, whoever asks for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Drawn(TorchDispatchMode):
    """Within it `sizes` collects the number of elements of each tensor that is filled with random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        if torch.Tag.nondeterministic_seeded in func.tags and not result.is_meta:
            self.sizes.append(result.numel())
        return result


def sizes_drawn(action: Callable[[], object]) -> list[int]:
    """The sizes that `action` draws, ascending."""
    with Drawn() as drawn:
        action()
    return sorted(drawn.sizes)

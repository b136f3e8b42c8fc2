"""Keeps the keys and values of earlier tokens that later ones see, so that each new token costs one position."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Keys and values [2, B, K, S, D] of earlier positions, for each block, in memory that is taken once.

    A block with a window W has room for 2 W positions at most. When they are full, what no later query sees goes: the
    last W - 1 move to the front, once in W tokens.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._blocks: dict[int, tuple[Tensor, int]] = {}

    def append(self, block: int, k: Tensor, v: Tensor, window: int | None = None) -> tuple[Tensor, Tensor]:
        """Store k, v [B, T, K, D] after those of `block`; return the S + T last ones, [B, S + T, K, D].

        S: all before them, or of these the last window - 1, which the first of the T queries sees.
        """
        B, T, K, D = k.shape
        if block not in self._blocks:
            room = self.capacity if window is None else min(self.capacity, 2 * window)
            self._blocks[block] = k.new_empty(2, B, K, room, D), 0  # a head's positions are neighbours: it reads them
        held, length = self._blocks[block]
        end, first = length + T, 0 if window is None else max(0, length + 1 - window)
        if window is not None and end > held.shape[3]:
            new = torch.stack((k, v)).transpose(2, 3)
            seen = torch.cat((held[:, :, :, first:length], new), dim=3)
            end = min(window - 1, seen.shape[3])
            held[:, :, :, :end] = seen[:, :, :, seen.shape[3] - end :]
        else:
            held[0, :, :, length:end] = k.transpose(1, 2)
            held[1, :, :, length:end] = v.transpose(1, 2)
            seen = held[:, :, :, first:end]
        self._blocks[block] = held, end
        return seen[0].transpose(1, 2), seen[1].transpose(1, 2)

    def select(self, rows: Tensor) -> KVCache:
        """The cache of a batch that is made of these rows of this one, int64 [R]: a row may come several times."""
        selected = KVCache(self.capacity)
        selected._blocks = {block: (held[:, rows], length) for block, (held, length) in self._blocks.items()}
        return selected

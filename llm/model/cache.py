"""Keeps the keys and values of earlier tokens, so that each new token costs one position."""

from __future__ import annotations

from torch import Tensor


class KVCache:
    """Keys and values [B, S, K, D] of the positions seen so far, for each block; grows as blocks append."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._blocks: dict[int, tuple[Tensor, Tensor, int]] = {}

    def append(self, block: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v [B, T, K, D] after those of `block` and return all of them [B, S + T, K, D]."""
        B, T, K, D = k.shape
        keys, values, length = self._blocks.get(block, (None, None, 0))
        if keys is None or values is None:
            keys, values = k.new_empty(B, self.capacity, K, D), v.new_empty(B, self.capacity, K, D)
        keys[:, length : length + T] = k
        values[:, length : length + T] = v
        self._blocks[block] = (keys, values, length + T)
        return keys[:, : length + T], values[:, : length + T]

    def select(self, rows: Tensor) -> KVCache:
        """The cache of a batch that is made of these rows of this one, int64 [R]: a row may come several times."""
        selected = KVCache(self.capacity)
        selected._blocks = {i: (keys[rows], values[rows], n) for i, (keys, values, n) in self._blocks.items()}
        return selected

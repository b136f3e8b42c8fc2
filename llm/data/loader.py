"""Batches for training and validation. A loader's whole state is the count of consumed samples.

A step takes the next G samples of the global order (G: global batch). Rank r of D takes the
contiguous slice [r G / D, (r + 1) G / D) of them, micro-batch by micro-batch. Sample i sits at
position Order.positions(i); the sample at position p covers tokens p T .. p T + T, both included.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llm.config import RunConfig
from llm.data.folder import check_vocabulary, data_folder
from llm.data.formats import NumpyTokenStore, read_index
from llm.data.manifest import Manifest
from llm.data.order import Order
from llm.errors import InputError, require

PREFETCHED_STEPS = 4  # steps that the native loader assembles ahead
THREADS = 2  # that do it; they sleep while the ring is full


@dataclass(frozen=True)
class Batch:
    """One micro-batch, on the CPU (pinned when there is a GPU)."""

    tokens: Tensor
    """[B, T + 1], uint16 or int32 as in the file. Inputs are [:, :-1], targets [:, 1:]."""
    sample_ids: Tensor
    """[B] int64, the global numbers of the samples."""


class TokenStore(Protocol):
    """What `_native.TokenStore` and its twin NumpyTokenStore offer."""

    def __len__(self) -> int: ...
    def read_rows(self, starts: NDArray[np.int64], width: int) -> NDArray: ...


class Loader(Protocol):
    """Training batches of one data-parallel rank."""

    consumed: int
    """Samples of the global order that all ranks together have taken: the loader's whole state."""
    wait_seconds: float
    """Time spent inside next_step() so far."""

    def next_step(self) -> list[Batch]:
        """The micro-batches of the next step on this rank."""
        ...

    def close(self) -> None:
        """End the threads, if any; next_step() must not be called afterwards."""
        ...


@dataclass(frozen=True)
class _Share:
    """Which samples of each step are this rank's."""

    global_batch: int
    rows: int
    """Samples of a step on this rank."""
    offset: int
    """Of the first of them from the first of the step."""
    micro_batch: int

    @classmethod
    def of(cls, config: RunConfig, dp_rank: int, dp_size: int) -> _Share:
        total, micro = config.train.global_batch_size, config.train.micro_batch_size
        require(
            total % (dp_size * micro) == 0,
            f"train.global_batch_size {total} is not a multiple of {dp_size} data-parallel ranks x "
            f"train.micro_batch_size {micro}",
        )
        rows = total // dp_size
        return cls(total, rows, dp_rank * rows, micro)

    def split(self, tokens: NDArray, sample_ids: NDArray[np.int64]) -> list[Batch]:
        return [
            Batch(
                _tensor(tokens[i : i + self.micro_batch]),
                _tensor(sample_ids[i : i + self.micro_batch]),
            )
            for i in range(0, self.rows, self.micro_batch)
        ]


def _tensor(array: NDArray) -> Tensor:
    """The array as a tensor over the same memory; pinned, by a copy, when there is a GPU."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory() if torch.cuda.is_available() else tensor


class NumpyLoader:
    """The plain loader: the native one's twin and oracle."""

    def __init__(self, store: TokenStore, seq_len: int, order: Order, share: _Share, consumed: int):
        self._store, self._seq_len, self._order, self._share = store, seq_len, order, share
        self.consumed = consumed
        self.wait_seconds = 0.0

    def next_step(self) -> list[Batch]:
        start = time.perf_counter()
        first = self.consumed + self._share.offset
        starts = self._order.positions(first, self._share.rows) * self._seq_len
        tokens = self._store.read_rows(starts, self._seq_len + 1)
        batches = self._share.split(tokens, np.arange(first, first + self._share.rows))
        self.consumed += self._share.global_batch
        self.wait_seconds += time.perf_counter() - start
        return batches

    def close(self) -> None:
        pass


class NativeLoader:
    """Batches assembled ahead by C++ threads; tensors share their memory."""

    def __init__(self, native: ModuleType, store, seq_len: int, order: Order, share: _Share, consumed: int):
        self._share = share
        self._ring = native.Prefetcher(
            store,
            seq_len=seq_len,
            seed=order.seed,
            first=consumed + share.offset,
            stride=share.global_batch,
            rows=share.rows,
            depth=PREFETCHED_STEPS,
            threads=THREADS,
        )
        self.consumed = consumed
        self.wait_seconds = 0.0

    def next_step(self) -> list[Batch]:
        start = time.perf_counter()
        batches = self._share.split(*self._ring.next())
        self.consumed += self._share.global_batch
        self.wait_seconds += time.perf_counter() - start
        return batches

    def close(self) -> None:
        self._ring.close()


def _native() -> ModuleType:
    try:
        from llm.data import _native
    except ImportError as error:
        raise InputError(
            f"data.loader is native but the C++ extension cannot be imported ({error}); "
            "run make setup, or set data.loader to numpy"
        ) from error
    return _native


def _open_store(config: RunConfig, manifest: Manifest, split: str) -> tuple[TokenStore, int]:
    """The tokens of a split, checked against the manifest, and its number of samples."""
    check_vocabulary(config, manifest)
    prefix = data_folder(config) / split
    counts, index = manifest.splits[split], read_index(prefix)
    found = (index.dtype, index.tokens, index.documents)
    expected = (counts.shards.dtype, counts.tokens, counts.documents)
    require(
        found == expected,
        f"{prefix}.idx holds (dtype, tokens, documents) {found}; the manifest says {expected}",
    )
    n_samples = (index.tokens - 1) // config.data.seq_len
    require(
        n_samples >= 1,
        f"the {split} split has {index.tokens} tokens; a sample of data.seq_len "
        f"{config.data.seq_len} needs {config.data.seq_len + 1}; use more text or shorter samples",
    )
    path = f"{prefix}.bin"
    if config.data.loader == "numpy":
        return NumpyTokenStore(path, index.dtype, index.tokens), n_samples
    try:
        return _native().TokenStore(path, np.dtype(index.dtype).itemsize, index.tokens), n_samples
    except RuntimeError as error:
        raise InputError(str(error)) from error


def open_loader(config: RunConfig, manifest: Manifest, *, dp_rank: int, dp_size: int, consumed: int = 0) -> Loader:
    """The loader that config.data.loader names, `consumed` samples into the global order.

    The ranks of a tensor-parallel group pass the same dp_rank and read the same samples. Raises
    InputError when the data does not fit the config or is damaged.
    """
    require(0 <= dp_rank < dp_size, f"data-parallel rank {dp_rank} of {dp_size}")
    require(consumed >= 0, f"{consumed} consumed samples; expected at least 0")
    share = _Share.of(config, dp_rank, dp_size)
    store, n_samples = _open_store(config, manifest, "train")
    order = Order(config.seed, n_samples)
    if config.data.loader == "numpy":
        return NumpyLoader(store, config.data.seq_len, order, share, consumed)
    return NativeLoader(_native(), store, config.data.seq_len, order, share, consumed)


def validation_batches(
    config: RunConfig, manifest: Manifest, *, dp_rank: int, dp_size: int
) -> Iterator[tuple[Batch, int]]:
    """The first data.validation_samples (null: all) samples of the validation split, in order.

    Yields (batch, rows that count). Every rank yields the same number of batches, all of
    train.micro_batch_size rows; rows beyond the last sample repeat it and do not count.
    """
    require(0 <= dp_rank < dp_size, f"data-parallel rank {dp_rank} of {dp_size}")
    store, available = _open_store(config, manifest, "validation")
    wanted = config.data.validation_samples or available
    require(
        wanted <= available,
        f"data.validation_samples is {wanted}; the validation split has {available} samples of "
        f"data.seq_len {config.data.seq_len}",
    )
    return _validation_batches(store, config, wanted, dp_rank, dp_size)


def _validation_batches(
    store: TokenStore, config: RunConfig, wanted: int, dp_rank: int, dp_size: int
) -> Iterator[tuple[Batch, int]]:
    rows, seq_len = config.train.micro_batch_size, config.data.seq_len
    for start in range(0, wanted, rows * dp_size):
        first = start + dp_rank * rows
        sample_ids = np.minimum(np.arange(first, first + rows), wanted - 1)
        tokens = store.read_rows(sample_ids * seq_len, seq_len + 1)
        yield Batch(_tensor(tokens), _tensor(sample_ids)), min(max(wanted - first, 0), rows)

"""torchdata's StatefulDataLoader over a map-style dataset of rows in mapped files."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader  # pyright: ignore[reportMissingImports]

from benchmarks.loader.system import Batch, Batches, Job, System
from benchmarks.loader.tokens import TokenSet


class Rows(Dataset):
    """The rows of every file; a file is mapped when a row of it is first read, a row lies in one file."""

    def __init__(self, tokens: TokenSet, seq_len: int) -> None:
        self.tokens, self.seq_len = tokens, seq_len
        sizes = [os.path.getsize(path) // tokens.item_size for path in tokens.paths]
        self.firsts = np.concatenate([[0], np.cumsum([(size - 1) // seq_len for size in sizes])])
        self.files: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return int(self.firsts[-1])

    def __getitem__(self, index: int) -> Tensor:
        shard = int(np.searchsorted(self.firsts, index, "right")) - 1 if self.tokens.shards > 1 else 0
        if shard not in self.files:
            self.files[shard] = self.tokens.read(shard)
        start = (index - int(self.firsts[shard])) * self.seq_len
        return torch.from_numpy(self.files[shard][start : start + self.seq_len + 1].astype(np.int64))


class Blank(Dataset):
    """As many rows of nothing: to get at the loader's state without reading half of the tokens."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        return 0


class TorchData(System):
    def _loader(self, dataset: Dataset, job: Job) -> StatefulDataLoader:
        torch.manual_seed(0)
        return StatefulDataLoader(dataset, job.rows, shuffle=True, num_workers=job.workers, drop_last=True)

    def state(self, tokens: TokenSet, job: Job, consumed: int) -> Any:
        loader = self._loader(Blank(len(Rows(tokens, job.seq_len))), job)
        for done, _ in enumerate(loader, 1):
            if done * job.rows >= consumed:
                break
        return loader.state_dict()

    def open(self, tokens: TokenSet, job: Job, state: Any = None) -> Batches:
        loader = self._loader(Rows(tokens, job.seq_len), job)
        if state is not None:
            loader.load_state_dict(state)
        while True:
            for rows in loader:
                yield Batch(rows[:, :-1], rows[:, 1:])

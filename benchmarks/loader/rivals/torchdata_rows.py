"""torchdata's StatefulDataLoader over a map-style dataset of rows in mapped files."""

import os

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader  # pyright: ignore[reportMissingImports]

from benchmarks.loader.cases import Case
from benchmarks.loader.system import Stateful
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


class TorchData(Stateful):
    def loader(self, tokens: TokenSet, case: Case) -> StatefulDataLoader:
        torch.manual_seed(0)
        rows = Rows(tokens, case.seq_len)
        return StatefulDataLoader(rows, case.rows, shuffle=True, drop_last=True)

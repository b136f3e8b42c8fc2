"""nanoGPT's get_batch, from its description: random rows of a file that is mapped anew for every batch."""

from typing import Any

import numpy as np
import torch

from benchmarks.loader.cases import Case
from benchmarks.loader.system import Batch, Batches, System
from benchmarks.loader.tokens import TokenSet


class NanoGPT(System):
    """Drawn with replacement: it has no epochs and no place to resume at."""

    def open(self, tokens: TokenSet, case: Case, state: Any = None) -> Batches:
        T = case.seq_len
        while True:
            ids = np.memmap(tokens.paths[0], dtype=tokens.item, mode="r")
            starts = torch.randint(len(ids) - T, (case.rows,))
            inputs, labels = (
                [torch.from_numpy(ids[start + shift : start + shift + T].astype(np.int64)) for start in starts]
                for shift in (0, 1)
            )
            yield Batch(torch.stack(inputs), torch.stack(labels))

"""The machine's limit: benchmarks/loader/gather.c, compiled on the spot, copies the same rows."""

import ctypes
import subprocess
from pathlib import Path
from typing import Any

import torch

from benchmarks.loader.cases import Case
from benchmarks.loader.system import Batch, Batches, System
from benchmarks.loader.tokens import TokenSet

SOURCE = Path(__file__).with_name("gather.c")
LIBRARY = "gather.so"  # beside the tokens
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-shared", "-fPIC")


class Gather(System):
    """Rows drawn with replacement from one file. form: as of ours.Ingot."""

    def __init__(self, form: str) -> None:
        self.form = form

    def prepare(self, tokens: TokenSet, seq_len: int) -> None:
        subprocess.run(["cc", *FLAGS, "-o", str(tokens.folder / LIBRARY), str(SOURCE)], check=True)

    def open(self, tokens: TokenSet, case: Case, state: Any = None) -> Batches:
        gather = ctypes.CDLL(str(tokens.folder / LIBRARY)).gather
        gather.restype = ctypes.c_int64
        gather.argtypes = [ctypes.c_void_p, *[ctypes.c_int64] * 7, *[ctypes.c_void_p] * 3]
        B, T, ids = case.rows, case.seq_len, tokens.read(0)
        native = self.form == "native"
        rows = torch.zeros(B, T + 1, dtype=getattr(torch, tokens.item) if native else torch.int64)
        positions, starts = torch.zeros(B, T, dtype=torch.int32), torch.zeros(B * T + 1, dtype=torch.int32)
        batch = Batch(rows, None) if native else Batch(rows[:, :-1], rows[:, 1:])
        sizes = (tokens.item_size, rows.element_size(), T, B, tokens.eod_id if case.documents else -1)
        buffers = tuple(buffer.data_ptr() for buffer in (rows, positions, starts))
        places, drawn = (ids.size - 1) // T, 0
        while True:
            count = gather(ids.ctypes.data, places, drawn, *sizes, *buffers)
            drawn += B
            yield batch._replace(position_ids=positions, cu_seqlens=starts[: count + 1]) if case.documents else batch

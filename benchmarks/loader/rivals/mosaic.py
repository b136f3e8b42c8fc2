"""MosaicML's StreamingDataset over MDS shards of rows of T + 1 tokens."""

from pathlib import Path
from typing import Any

from streaming import MDSWriter, StreamingDataLoader, StreamingDataset  # pyright: ignore[reportMissingImports]
from streaming.base.util import clean_stale_shared_memory  # pyright: ignore[reportMissingImports]
from torch import Tensor

from benchmarks.loader.cases import Case
from benchmarks.loader.system import Batches, Stateful
from benchmarks.loader.tokens import TokenSet, finished

SHARD_BYTES = 1 << 26  # its default


class Mosaic(Stateful):
    def prepare(self, tokens: TokenSet, seq_len: int) -> None:
        folder = _folder(tokens, seq_len)
        if finished(folder):
            return
        row_bytes = (seq_len + 1) * tokens.item_size + 4
        rows = (tokens.sizes[0] - 1) // seq_len
        limit = SHARD_BYTES if tokens.shards == 1 else rows * row_bytes + row_bytes // 2 + 300
        columns = {"tokens": f"ndarray:{tokens.item}:{seq_len + 1}"}
        with MDSWriter(out=str(folder), columns=columns, size_limit=limit) as writer:
            for shard in range(tokens.shards):
                ids = tokens.read(shard)
                for start in range(0, (ids.size - 1) // seq_len * seq_len, seq_len):
                    writer.write({"tokens": ids[start : start + seq_len + 1]})
        (folder / "made").touch()

    def files(self, tokens: TokenSet, seq_len: int) -> list[Path]:
        return list(_folder(tokens, seq_len).glob("*.mds"))

    def begin(self) -> None:
        clean_stale_shared_memory()  # of a process before that was ended: else it refuses to start

    def loader(self, tokens: TokenSet, case: Case) -> StreamingDataLoader:
        dataset = StreamingDataset(
            local=str(_folder(tokens, case.seq_len)), shuffle=True, batch_size=case.rows, num_canonical_nodes=1
        )
        return StreamingDataLoader(dataset, batch_size=case.rows, drop_last=True)

    def rows(self, found: Any) -> Tensor:
        return found["tokens"]

    def state(self, tokens: TokenSet, case: Case, consumed: int) -> Any:
        loader = self.loader(tokens, case)
        state = loader.dataset.state_dict(consumed, from_beginning=True)  # pyright: ignore
        del loader
        clean_stale_shared_memory()
        return state | {"epoch": 0}

    def open(self, tokens: TokenSet, case: Case, state: Any = None) -> Batches:
        try:
            yield from super().open(tokens, case, state)
        finally:
            clean_stale_shared_memory()


def _folder(tokens: TokenSet, seq_len: int) -> Path:
    return tokens.folder / f"mds-{seq_len}"

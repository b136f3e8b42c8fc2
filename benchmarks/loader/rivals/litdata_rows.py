"""litdata's StreamingDataset with its TokensLoader: rows of T + 1 tokens, end to end."""

from pathlib import Path

import torch
from litdata import StreamingDataLoader, StreamingDataset, TokensLoader  # pyright: ignore[reportMissingImports]
from litdata.streaming.cache import Cache  # pyright: ignore[reportMissingImports]

from benchmarks.loader.cases import Case
from benchmarks.loader.system import Stateful
from benchmarks.loader.tokens import TokenSet, finished

FOLDER = "litdata"  # of its own form of the tokens
CHUNK_BYTES = 1 << 26
PIECE = 1 << 20  # tokens handed to the writer at a time
STORED = {"uint16": "uint16", "uint32": "int32"}  # PyTorch types that it knows


class LitData(Stateful):
    def prepare(self, tokens: TokenSet, seq_len: int) -> None:
        folder = tokens.folder / FOLDER
        if finished(folder):
            return
        chunk = CHUNK_BYTES // tokens.item_size if tokens.shards == 1 else tokens.sizes[0]
        cache = Cache(str(folder), chunk_size=chunk, item_loader=TokensLoader(block_size=seq_len + 1))
        number = 0
        for shard in range(tokens.shards):
            ids = tokens.read(shard).view(STORED[tokens.item])
            for start in range(0, len(ids), PIECE):
                cache._add_item(number, torch.from_numpy(ids[start : start + PIECE].copy()))
                number += 1
        cache.done()
        cache.merge()
        (folder / "made").touch()

    def files(self, tokens: TokenSet, seq_len: int) -> list[Path]:
        return list((tokens.folder / FOLDER).glob("*.bin"))

    def loader(self, tokens: TokenSet, case: Case) -> StreamingDataLoader:
        loader = TokensLoader(block_size=case.seq_len + 1)
        dataset = StreamingDataset(str(tokens.folder / FOLDER), item_loader=loader, shuffle=True, drop_last=True)
        return StreamingDataLoader(dataset, batch_size=case.rows, drop_last=True)

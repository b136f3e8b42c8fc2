"""Token files of every format, written by hand as their formats are described."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llm.data import _native
from llm.data.tokens.shards import NumpyCorpus, ShardList

KINDS = [
    ("raw", "uint8"), ("raw", "uint16"), ("raw", "int32"), ("raw", "uint32"),
    ("megatron", "uint8"), ("megatron", "uint16"), ("megatron", "int32"),
    ("llm.c", "uint16"), ("llm.c", "uint32"),
    ("datatrove", "uint16"), ("datatrove", "uint32"),
]  # fmt: skip
CODES = {"uint8": 1, "int32": 4, "uint16": 8}
LLMC = {"uint16": (20240520, 1), "uint32": (20240801, 7)}


def write_file(folder: Path, name: str, format: str, dtype: str, documents: list[list[int]]) -> str:
    """One token file; returns its path."""
    flat = np.array([token for document in documents for token in document]).astype(np.dtype(dtype).newbyteorder("<"))
    path = folder / (f"{name}.ds" if format == "datatrove" else f"{name}.bin")
    header = struct.pack("<256i", *LLMC[dtype], flat.size, *[0] * 253) if format == "llm.c" else b""
    path.write_bytes(header + flat.tobytes())
    lengths = [len(document) for document in documents]
    if format == "megatron":
        path.with_suffix(".idx").write_bytes(megatron_index(dtype, lengths))
    if format == "datatrove":
        ends = np.cumsum(lengths).tolist()
        (folder / f"{name}.ds.index").write_bytes(struct.pack(f"<{len(ends)}Q", *ends))
        (folder / f"{name}.ds.metadata").write_text(f"gpt2|{flat.dtype.itemsize}\n{flat.size}\n{flat.size} T")
    return str(path)


def megatron_index(dtype: str, lengths: list[int]) -> bytes:
    offsets = (np.cumsum([0, *lengths[:-1]]) * np.dtype(dtype).itemsize).tolist()
    n = len(lengths)
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, CODES[dtype], n, n + 1)
    return head + struct.pack(f"<{n}i{n}q{n + 1}q", *lengths, *offsets, *range(n + 1))


def corpus_of(format: str, dtype: str, paths: list[str], tokens: list[int], vocab_size: int, **rest) -> ShardList:
    return ShardList("test", format, dtype, tuple(paths), tuple(tokens), vocab_size, **{"eod_id": 0, **rest})


class NativeCorpus:
    """`_native.Corpus` with the methods of its twin."""

    def __init__(self, shards: ShardList, cache: _native.FileCache | None = None) -> None:
        self.cache = cache or _native.FileCache(4)
        self.corpus = _native.Corpus(
            format=shards.format,
            item_size=np.dtype(shards.dtype).itemsize,
            paths=list(shards.paths),
            tokens=list(shards.tokens),
            vocab_size=shards.vocab_size,
            cache=self.cache,
            sums=shards.sums.checked() if shards.sums else "",
        )

    def __len__(self) -> int:
        return len(self.corpus)

    def read(self, start: int, count: int) -> NDArray:
        return self.corpus.read_rows(np.array([start]), count)[0]

    def read_rows(self, starts: NDArray[np.int64], width: int) -> NDArray:
        return self.corpus.read_rows(starts, width)


CORPORA = {"native": NativeCorpus, "numpy": NumpyCorpus}


def failure(call) -> str | None:
    """The message of the damage that `call` finds, if any; anything else that is raised passes."""
    from llm.errors import DamagedFile

    try:
        call()
    except (DamagedFile, _native.DamagedFile) as error:
        return str(error)
    return None

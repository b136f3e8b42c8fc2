"""Token corpora: files of token ids, in any of four formats (llm/data/tokens/headers.py), read as one sequence.

NumpyCorpus is the NumPy twin of `_native.Corpus`. The functions that read complete indexes take time in proportion to
the documents, so a run does not call them when it starts.
"""

from __future__ import annotations

import glob
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llm.data.tokens import megatron as formats
from llm.data.tokens.headers import Header, check_header, check_metadata, check_request, index_path, read_header
from llm.data.tokens.megatron import check_rising, read_index, token_dtype
from llm.data.tokens.sums import BlockSums, SumsFile
from llm.errors import DamagedFile, require

SUFFIXES = (".bin", ".ds")
COMPANIONS = (".idx", ".ds.index", ".ds.metadata", ".ds.loss", ".sums")  # lie beside token files and hold no tokens
OPEN_MAPS = 64  # of a NumpyCorpus; each holds a file open
SCANNED = 1 << 20  # tokens looked through at a time
Say = Callable[[str], None]  # called with what the user should know


@dataclass(frozen=True)
class ShardList:
    """A token corpus: its files, one after another."""

    name: str
    """As the config names it, for messages."""
    format: str
    """raw, megatron, llm.c or datatrove."""
    dtype: str
    """uint8, uint16, int32 or uint32."""
    paths: tuple[str, ...]
    tokens: tuple[int, ...]
    """Of each file."""
    vocab_size: int
    """Ids lie below it."""
    eod_id: int
    """The end-of-document token."""
    eod_first: bool = False
    """It is the first token of its document (llm.c), not the last."""
    plans: dict[int, str] = field(default_factory=dict)
    """Sequence length -> path of its packing plan."""
    sums: SumsFile | None = None
    """The checksums that blocks are compared with as they are first read; None: they are not."""

    @property
    def n_tokens(self) -> int:
        return sum(self.tokens)

    @cached_property
    def ends(self) -> list[int]:
        """The position in the corpus at which each file ends."""
        return list(accumulate(self.tokens))

    def split(self, start: int, count: int) -> Iterator[tuple[int, int, int]]:
        """(file, first token in it, tokens) of each part of the `count` tokens from position `start` on."""
        while count:
            file = bisect_right(self.ends, start)
            part = min(count, self.ends[file] - start)
            yield file, start - self.ends[file] + self.tokens[file], part
            start, count = start + part, count - part

    def plan(self, seq_len: int) -> str:
        """The path of the packing plan for this length; InputError when there is none."""
        require(
            seq_len in self.plans,
            f"{self.name} has no packing plan for samples of {seq_len} tokens; "
            "run python launch/prepare_data.py --config <the same config>",
        )
        return self.plans[seq_len]


def inspect_files(
    name: str, pattern: str, *, vocab_size: int, eod_id: int, raw_dtype: str | None = None, say: Say = lambda line: None
) -> ShardList:
    """Token files made elsewhere as a corpus: a file, a folder or a glob (sorted) of one format, found out here.

    .ds files are datatrove's; a .bin file is Megatron's where an .idx file lies beside it, llm.c's where it has its
    magic number, else raw: ids of `raw_dtype` (None: uint16, or int32 where vocab_size needs it).
    Files of no tokens are passed over, and `say` is told. Reads headers and the ends of indexes alone.
    Raises InputError; DamagedFile where a file is not what it says.
    """
    found = {path: read_header(path, raw_dtype or token_dtype(vocab_size)) for path in _find(name, pattern)}
    empty = [path for path, header in found.items() if header.tokens == 0]
    require(len(empty) < len(found), f"corpus {name}: {', '.join(empty[:3])} hold no token; expected some in one file")
    if empty:
        say(f"note: {name}: {len(empty)} of {len(found)} files hold no token and are passed over: {empty[0]} ...")
    paths, headers = zip(*((path, header) for path, header in found.items() if header.tokens), strict=True)
    first = headers[0]
    for path, header in zip(paths, headers, strict=True):
        require(
            (header.format, header.dtype) == (first.format, first.dtype),
            f"corpus {name}: {paths[0]} is {_say(first)}, {path} is {_say(header)}; expected files of one format",
        )
    fits = 2 ** (8 * np.dtype(first.dtype).itemsize)
    require(
        0 <= eod_id < vocab_size <= fits,
        f"corpus {name}: {paths[0]} is {_say(first)}, the vocabulary has {vocab_size} ids and its end-of-document "
        f"token is {eod_id}; expected 0 <= end-of-document token < vocabulary <= {fits}",
    )
    tokens = tuple(header.tokens for header in headers)
    return ShardList(
        name, first.format, first.dtype, paths, tokens, vocab_size, eod_id, eod_first=first.format == "llm.c"
    )


def _say(header: Header) -> str:
    return f"{header.format} with {header.dtype} ids"


def _find(name: str, pattern: str) -> list[str]:
    if os.path.isdir(pattern):
        paths = [str(path) for path in Path(pattern).iterdir() if path.suffix in SUFFIXES]
    elif os.path.lexists(pattern):
        paths = [pattern]
    else:
        paths = [path for path in glob.glob(pattern, recursive=True) if not path.endswith(COMPANIONS)]
    require(bool(paths), f"corpus {name}: no token file (.bin or .ds) is at {pattern}; check the path")
    for path in paths:
        require(
            path.endswith(SUFFIXES),
            f"corpus {name}: {path} does not end in .bin or .ds; expected token files alone: narrow the pattern",
        )
    return sorted(paths)


class NumpyCorpus:
    """The NumPy twin of `_native.Corpus`: reads across files, each checked when first read."""

    def __init__(self, shards: ShardList) -> None:
        files = zip(shards.paths, shards.tokens, strict=True)
        self._header, *_ = [check_request(path, shards.format, shards.dtype, tokens) for path, tokens in files]
        if not 1 <= shards.vocab_size <= 2**31:
            raise ValueError(f"vocab_size {shards.vocab_size}; expected 1 to 2^31")
        self._shards = shards
        self._width = np.dtype(shards.dtype).itemsize
        sizes = [self._header + tokens * self._width for tokens in shards.tokens]
        self._sums = shards.sums and BlockSums(shards.sums, sizes)
        self._open = lru_cache(OPEN_MAPS)(self._map)  # of this corpus, closed with it

    def __len__(self) -> int:
        return self._shards.ends[-1]

    def read(self, start: int, count: int) -> NDArray:
        """Tokens [count] from position `start` on: uint8, uint16, or int32 where an id has four bytes.

        Raises IndexError outside the corpus; DamagedFile where a file is not what the corpus says of it, was
        truncated, or holds there another checksum or an id that is not below the vocabulary.
        """
        if not 0 <= start <= start + count <= len(self):
            raise IndexError(f"{count} tokens from {start} lie outside the {len(self)} tokens of the corpus")
        out, done = np.empty(count, f"u{self._width}"), 0
        for file, first, n in self._shards.split(start, count):
            out[done : done + n] = self._read_file(file, first, n)
            done += n
        return out.view("i4") if self._width == 4 else out

    def read_rows(self, starts: NDArray[np.int64], width: int) -> NDArray:
        """Tokens [len(starts), width], row i from position starts[i] on; raises as read()."""
        rows = [self.read(int(start), width) for start in starts]
        return np.stack(rows) if rows else np.empty((0, width), self.read(0, 0).dtype)

    def _read_file(self, shard: int, start: int, count: int) -> NDArray:
        path, data = self._shards.paths[shard], self._open(shard)
        found, begin = os.stat(path).st_size, self._header + start * self._width
        if found < data.size:
            raise DamagedFile(f"{path}: was cut to {found} bytes while in use, expected {data.size}")
        end = begin + count * self._width
        if self._sums:
            self._sums.verify(shard, path, data, begin, end)
        row = data[begin:end].view(f"<u{self._width}")  # unsigned: a negative id is a large one
        if (wrong := np.flatnonzero(row >= self._shards.vocab_size)).size:
            at = int(wrong[0])
            raise DamagedFile(
                f"{path}: the id at byte {begin + at * self._width} is {row[at]}, "
                f"expected ids below {self._shards.vocab_size}"
            )
        return row

    def _map(self, shard: int) -> NDArray[np.uint8]:
        path = self._shards.paths[shard]
        check_header(path, self._shards.format, self._shards.dtype, self._shards.tokens[shard])
        return np.memmap(path, np.uint8, "r")


def check_file(path: str, format: str, dtype: str, tokens: int) -> None:
    """Every check of a token file and its index: sizes, counts, offsets without gaps, document ends that rise.

    Takes time in proportion to the documents and memory in proportion to nothing. Raises DamagedFile.
    """
    check_header(path, format, dtype, tokens)
    if format == "megatron":
        read_index(Path(path).with_suffix(""))
    if format == "datatrove":
        check_metadata(path, dtype, tokens)
        _read_ends(path)


def _read_ends(path: str) -> NDArray[np.int64]:
    """Where each document of a datatrove file ends, in tokens; DamagedFile where an end falls."""
    ends = np.memmap(f"{path}.index", "<i8", "r")
    if ends[0] < 0:
        raise DamagedFile(f"{path}.index: the first document ends at token {ends[0]}, expected at least 0")
    check_rising(f"{path}.index", ends, 0)
    return ends


def document_lengths(shards: ShardList) -> Iterator[NDArray[np.int64]]:
    """The tokens of every document of a corpus, in order, as arrays [n] of bounded size.

    From the index where the format has one (after checking it: DamagedFile), else found by the end-of-document token;
    then a document may lie in several files, and what is left at either end counts as one.
    """
    if index_path("", shards.format) is None:
        files = [(ends for _, ends in document_ends(shards, SCANNED))]
    else:
        files = (_indexed_ends(shards, path, tokens) for path, tokens in zip(shards.paths, shards.tokens, strict=True))
    for parts in files:
        last = 0
        for ends in filter(len, parts):
            yield np.diff(ends, prepend=last)
            last = int(ends[-1])


def _indexed_ends(shards: ShardList, path: str, tokens: int) -> Iterator[NDArray[np.int64]]:
    """Where each document of one file ends, in its tokens, by its index."""
    check_header(path, shards.format, shards.dtype, tokens)
    index = read_index(Path(path).with_suffix("")) if shards.format == "megatron" else None
    bounds = index.bounds[1:] if index else _read_ends(path)
    for start in range(0, bounds.size, formats.CHUNK):
        part = bounds[start : start + formats.CHUNK]
        if index:  # which counts sequences: a document ends where the next one's first begins
            last, width = index.offsets.size - 1, np.dtype(index.dtype).itemsize
            part = np.where(part > last, index.tokens, index.offsets[np.minimum(part, last)] // width)
        yield part


def has_documents(shards: ShardList) -> bool:
    """Whether the end-of-document token is among the first 2^20 tokens, whatever other ids are. Raises DamagedFile."""
    corpus = NumpyCorpus(replace(shards, vocab_size=2**31))
    return bool((corpus.read(0, min(len(corpus), SCANNED)) == shards.eod_id).any())


def document_ends(shards: ShardList, block: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """For each `block` tokens: those read by then, and where documents end among them (the next one's first token).

    They are told apart by the end-of-document token. The last end is that of the corpus.
    """
    corpus = NumpyCorpus(shards)
    for start in range(0, len(corpus), block):
        stop = min(start + block, len(corpus))
        found = np.flatnonzero(corpus.read(start, stop - start) == shards.eod_id)
        ends = found + (start if shards.eod_first else start + 1)
        ends = ends[(ends > 0) & (ends < len(corpus))]
        yield stop, np.append(ends, stop) if stop == len(corpus) else ends

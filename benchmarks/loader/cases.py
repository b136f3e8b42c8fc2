"""The cases of a full run and of a quick one."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks.loader.tokens import TokenSet


@dataclass(frozen=True)
class Scale:
    """How much of everything.

    tokens: of the corpus that rates are measured on. seconds: timed in each case; as much again at most is not timed.
    shard_counts: numbers of files of the corpora that starts are measured on.
    """

    tokens: int
    items: tuple[str, ...]
    seq_lens: tuple[int, ...]
    seconds: float
    rounds: int
    shard_counts: tuple[int, ...]


FULL = Scale(1 << 28, ("uint16", "uint32"), (1024, 2048, 8192), 0.3, 5, (1, 1000, 10_000))
QUICK = Scale(1 << 22, ("uint16",), (1024,), 0.1, 2, (1, 100))
BATCH_TOKENS = 1 << 16  # B * T
CHECK_TOKENS = 60_000  # below 2^16, so that each has an id of its own
SHARD_TOKENS = 8200  # of a file, where there are the most of them
HUGE_SHARD_TOKENS = 10**8  # of a sparse file


@dataclass(frozen=True)
class Case:
    """One thing to measure, of every loader that it applies to.

    task: are its batches right; tokens per second; seconds to the first batch. documents: position ids and cu_seqlens
    too. cold: without the files in the page cache. resume: from the middle of the epoch. huge: a corpus of sparse
    files, larger than any disk here.
    """

    task: Literal["check", "rate", "start"]
    item: str
    seq_len: int
    documents: bool = False
    cold: bool = False
    shards: int = 1
    resume: bool = False
    huge: bool = False

    @property
    def label(self) -> str:
        words = [self.task, self.item, f"T={self.seq_len}"]
        words += [name for name in ("documents", "cold", "resume", "huge") if getattr(self, name)]
        return " ".join(words + [f"{self.shards} shards"] * (self.shards > 1))

    def token_set(self, scale: Scale, folder: Path) -> TokenSet:
        """The corpus that it reads."""
        if self.task == "check":
            name = f"check-{self.item}-{self.shards}"
            return TokenSet(folder / name, self.item, CHECK_TOKENS, self.shards, "distinct")
        if self.huge:
            return TokenSet(folder / "huge", self.item, HUGE_SHARD_TOKENS * self.shards, self.shards, "sparse")
        if self.task == "start":
            tokens = SHARD_TOKENS * max(scale.shard_counts)
            return TokenSet(folder / f"shards-{self.shards}", self.item, tokens, self.shards)
        return TokenSet(folder / self.item, self.item, scale.tokens)

    @property
    def rows(self) -> int:
        """Of a batch (B)."""
        return 4 if self.task == "check" else BATCH_TOKENS // self.seq_len


def parts(scale: Scale) -> Iterator[tuple[int, list[Case]]]:
    """(rounds, cases) of each part of a run, in order; within a round loaders take turns case by case."""
    items, lengths, counts = scale.items, scale.seq_lens, scale.shard_counts
    grid = [(item, T, documents) for item in items for T in lengths for documents in (False, True)]
    checks = [Case("check", item, T, documents, shards=n) for item, T, documents in grid for n in (1, 3)]
    yield 1, [case for case in checks if case.shards * case.seq_len < CHECK_TOKENS // 3]
    yield scale.rounds, [Case("rate", item, T, documents) for item, T, documents in grid]
    starts = [Case("start", items[0], lengths[0], shards=n, resume=r) for n in counts for r in (False, True)]
    huge = [Case("start", items[0], lengths[0], shards=max(counts), huge=True, resume=r) for r in (False, True)]
    yield scale.rounds, starts + huge
    yield scale.rounds, [Case("rate", item, T, cold=True) for item in items for T in lengths]

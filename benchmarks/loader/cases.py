"""What is measured: the cases of a whole run and of a quick one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from benchmarks.loader.system import Job
from benchmarks.loader.tokens import TokenSet


@dataclass(frozen=True)
class Scale:
    """How much of everything."""

    tokens: int
    """Of the corpus of rates and waits."""
    batch_tokens: int
    """Of a batch, as B * T."""
    items: tuple[str, ...]
    seq_lens: tuple[int, ...]
    seconds: float
    """Timed in each case; as much again at most is not timed."""
    rounds: int
    few_rounds: int
    """Of the cases that are not rates: a start or a wait varies less, or takes long."""
    shard_counts: tuple[int, ...]
    shard_tokens: int
    """Of a corpus of any of these counts of files."""
    huge_tokens: int
    huge_shards: int
    wait_steps: int
    patience: float
    """Seconds after which a measurement is ended."""


FULL = Scale(
    tokens=1 << 28,
    batch_tokens=1 << 16,
    items=("uint16", "uint32"),
    seq_lens=(1024, 2048, 8192),
    seconds=0.3,
    rounds=5,
    few_rounds=3,
    shard_counts=(1, 1000, 10_000),
    shard_tokens=10_000 * 8200,
    huge_tokens=10**12,
    huge_shards=10_000,
    wait_steps=100,
    patience=60.0,
)
QUICK = replace(
    FULL,
    tokens=1 << 22,
    items=("uint16",),
    seq_lens=(1024,),
    seconds=0.1,
    rounds=2,
    few_rounds=1,
    shard_counts=(1, 100),
    shard_tokens=100 * 8200,
    huge_tokens=10**9,
    huge_shards=100,
    wait_steps=20,
    patience=30.0,
)
CHECK_TOKENS = 60_000  # below 2^16, so that each has an id of its own
STEP_SECONDS = 0.005  # of work in a simulated training step
STEP_TOKENS = 1 << 14  # and what it trains on


@dataclass(frozen=True)
class Case:
    """One thing to measure, of every loader that it applies to."""

    task: Literal["check", "rate", "start", "wait"]
    """check: are its batches right; rate: tokens per second; start: seconds to the first batch; wait: of training."""
    item: str
    seq_len: int
    documents: bool = False
    cold: bool = False
    """Without the files in the page cache."""
    shards: int = 1
    resume: bool = False
    """From the middle of the epoch."""
    fresh: bool = False
    """Without what an earlier start left on disk."""
    huge: bool = False
    """A corpus of sparse files, larger than any disk here."""
    workers: int = 0

    @property
    def label(self) -> str:
        words = [self.task, self.item, f"T={self.seq_len}"]
        words += [name for name in ("documents", "cold", "resume", "fresh", "huge") if getattr(self, name)]
        words += [f"{self.shards} shards"] * (self.shards > 1) + [f"{self.workers} workers"] * (self.workers > 0)
        return " ".join(words)

    @property
    def kin(self) -> str:
        """The label that failures go by: what cannot start once cannot start resumed."""
        return replace(self, resume=False, fresh=False).label

    def token_set(self, scale: Scale, folder: Path) -> TokenSet:
        """The corpus that it reads."""
        if self.task == "check":
            return TokenSet(
                folder / f"check-{self.item}-{self.shards}", self.item, CHECK_TOKENS, self.shards, "distinct"
            )
        if self.huge:
            return TokenSet(folder / "huge", self.item, scale.huge_tokens, self.shards, "sparse")
        if self.task == "start":
            return TokenSet(folder / f"shards-{self.shards}", self.item, scale.shard_tokens, self.shards)
        return TokenSet(folder / self.item, self.item, scale.tokens)

    def job(self, scale: Scale) -> Job:
        tokens = {"check": 4 * self.seq_len, "wait": STEP_TOKENS}.get(self.task, scale.batch_tokens)
        return Job(self.seq_len, max(1, tokens // self.seq_len), self.documents, self.workers)


def parts(scale: Scale) -> Iterator[tuple[str, int, list[Case]]]:
    """(name, rounds, cases) of each part of a run, in order; within a round loaders take turns case by case."""
    items, lengths = scale.items, scale.seq_lens
    middle = lengths[len(lengths) // 2]
    grid = [(item, T, documents) for item in items for T in lengths for documents in (False, True)]
    yield (
        "are the batches right",
        1,
        [Case("check", item, T, documents, shards=n) for item, T, documents in grid for n in (1, 3) if n * T < 20_000],
    )
    rates = [Case("rate", item, T, documents) for item, T, documents in grid]
    workers = [Case("rate", items[0], middle, workers=2)] * (scale is FULL)
    yield "warm cache", scale.rounds, rates + workers
    waits = [Case("wait", items[0], middle, documents, workers=n) for documents in (False, True) for n in (0, 2)]
    yield "waiting", scale.few_rounds, waits
    counts = scale.shard_counts
    fresh = [Case("start", items[0], lengths[0], shards=n, fresh=True) for n in counts]
    yield "first start", 1, fresh
    again = [Case("start", items[0], lengths[0], shards=n, resume=r) for n in counts for r in (False, True)]
    huge = [Case("start", items[0], lengths[0], shards=scale.huge_shards, huge=True, resume=r) for r in (False, True)]
    yield "start", scale.few_rounds, again + huge
    yield "cold cache", scale.rounds, [replace(case, cold=True) for case in rates]

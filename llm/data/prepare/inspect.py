"""Describes a sample of the run and where it comes from, and the lengths of a corpus's documents."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llm.config.phases import consumed_samples
from llm.data.corpora import Corpora
from llm.data.samples.packing import NumpyPackPlan, read_header
from llm.data.samples.schedule import Schedule
from llm.data.tokenizer import Tokenizer
from llm.data.tokens.headers import header_bytes
from llm.data.tokens.shards import NumpyCorpus, ShardList, document_lengths
from llm.errors import require


def show(corpora: Corpora, sample: int) -> str:
    """A sample of the run's global order, for people: files, bytes, documents and text.

    Raises InputError where there is no such sample, or its files cannot be read.
    """
    config = corpora.config
    end = consumed_samples(config.phases, config.train.max_steps)
    require(0 <= sample < end, f"sample {sample} is not of this run; expected 0 to {end - 1}")
    drawn = corpora.curriculum()
    schedule = Schedule(config.seed, drawn.phases)
    (number,), (position,), (epoch,) = (column.tolist() for column in schedule.locate(sample, 1))
    name = drawn.names[number]
    shards = corpora.training[name].shards
    index = schedule.phase_index(sample)
    phase = config.phases[index]
    n_samples = next(s.n_samples for s in drawn.phases[index].sources if s.corpus == number)
    step = phase.first_step + (sample - phase.first_sample) // phase.global_batch_size
    head = [
        f"sample {sample}: step {step + 1}, phase {index + 1} of {len(drawn.phases)}, {phase.seq_len} tokens",
        f"corpus {name}: epoch {epoch + 1}, place {position} of {n_samples}",
    ]
    if len(blend := corpora.blends[index]) > 1:
        head[1] += f", weight {blend[name]:g} of {sum(blend.values()):g}"
    if config.data.packing == "chunk":
        pieces = [(position * phase.seq_len, phase.seq_len + 1)]
    else:
        plan = NumpyPackPlan(Path(shards.plan(phase.seq_len)), phase.seq_len, shards.n_tokens)
        pieces = [(int(start), int(count)) for start, count in plan.pieces(position)]
    padding = phase.seq_len + 1 - sum(count for _, count in pieces)
    tail = [f"padding: {padding} tokens"] if padding else []
    return "\n".join([*head, *_describe(shards, pieces, corpora.folder), *tail])


def _describe(shards: ShardList, pieces: Sequence[tuple[int, int]], folder: Path) -> list[str]:
    """The files of a sample, then its documents with their numbers in the corpus and their text.

    pieces: (first token in the corpus, tokens) of each.
    """
    corpus, tokenizer = NumpyCorpus(shards), Tokenizer.load(folder / "tokenizer.json", shards.eod_id)
    lines = [line for start, count in pieces for line in _files(shards, start, count)]
    parts: list[tuple[int, NDArray]] = []  # first token in the corpus, ids of one document
    for start, count in pieces:
        ids = corpus.read(start, count)
        cuts = np.flatnonzero(ids == shards.eod_id) + (0 if shards.eod_first else 1)
        edges = [0, *(int(cut) for cut in cuts if 0 < cut < count), count]
        parts += [(start + at, ids[at:to]) for at, to in pairwise(edges)]
    numbers = document_numbers(shards, [start for start, _ in parts])
    for (start, ids), (number, first, length) in zip(parts, numbers, strict=True):
        lines += [
            "",
            f"--- document {number}: {ids.size} of its {length} tokens, from its token {start - first} on ---",
            tokenizer.decode([int(i) for i in ids if i != shards.eod_id]),
        ]
    return [*lines, ""]


def _files(shards: ShardList, start: int, count: int) -> Iterator[str]:
    """A line for each file that tokens start .. start + count - 1 lie in."""
    width, before = np.dtype(shards.dtype).itemsize, header_bytes(shards.format)
    for file, first, n in shards.split(start, count):
        begin, end = (before + token * width for token in (first, first + n))
        yield f"{shards.paths[file]}: bytes {begin} to {end - 1}, tokens {start} to {start + n - 1} of the corpus"
        start += n


def document_numbers(shards: ShardList, tokens: Sequence[int]) -> list[tuple[int, int, int]]:
    """(number, first token, tokens) of the document that each token of the corpus lies in; numbers count from 0."""
    found: dict[int, tuple[int, int, int]] = {}
    wanted, documents, end = sorted(set(tokens)), 0, 0
    for lengths in document_lengths(shards):
        ends = end + np.cumsum(lengths)
        while wanted and wanted[0] < ends[-1]:
            i = int(np.searchsorted(ends, wanted[0], side="right"))
            found[wanted.pop(0)] = (documents + i, int(ends[i] - lengths[i]), int(lengths[i]))
        if not wanted:
            break
        documents, end = documents + lengths.size, int(ends[-1])
    return [found[token] for token in tokens]


@dataclass(frozen=True)
class Lengths:
    """How long documents are: every length that occurs, in tokens and rising, and how often."""

    lengths: NDArray[np.int64]
    counts: NDArray[np.int64]

    @classmethod
    def of(cls, parts: Iterable[NDArray[np.int64]]) -> Lengths:
        """From the lengths [n] of documents; memory grows with the different lengths, at most sqrt(2 x tokens)."""
        lengths = counts = np.zeros(0, np.int64)
        for part in parts:
            some, times = np.unique(part, return_counts=True)
            lengths, where = np.unique(np.concatenate((lengths, some)), return_inverse=True)
            counts = np.bincount(where, np.concatenate((counts, times)), lengths.size).astype(np.int64)
        return cls(lengths, counts)

    @property
    def documents(self) -> int:
        return int(self.counts.sum())

    @property
    def mean(self) -> float:
        return float(self.lengths @ self.counts) / self.documents

    def quantile(self, share: float) -> int:
        """The least length that at least this share of the documents do not exceed."""
        return int(self.lengths[np.searchsorted(self.counts.cumsum(), share * self.documents)])

    def histogram(self) -> list[tuple[int, int, int]]:
        """(least, largest, documents) for lengths of 0 and of 2^k to 2^(k + 1) - 1 tokens, from the shortest on."""
        bits = np.frexp(self.lengths)[1]
        counts = np.bincount(bits, self.counts).astype(np.int64)
        return [(2**k // 2, 2**k - 1, int(counts[k])) for k in range(int(bits.min()), counts.size)]


@dataclass(frozen=True)
class Statistics:
    """Of one corpus of a run."""

    shards: ShardList
    lengths: Lengths
    padding: dict[int, float]
    """Sequence length -> share of the slots of its packing plan that hold no token."""
    epochs: float
    """How often the run goes through it."""


def statistics(corpora: Corpora) -> list[Statistics]:
    """Of every training corpus of the run. InputError where one cannot be read or lacks a packing plan."""
    config = corpora.config
    epochs = corpora.curriculum().epochs(consumed_samples(config.phases, config.train.max_steps))
    return [
        Statistics(
            corpus.shards,
            Lengths.of(document_lengths(corpus.shards)),
            {seq_len: read_header(Path(plan)).padding_share for seq_len, plan in sorted(corpus.shards.plans.items())},
            epochs[name],
        )
        for name, corpus in corpora.training.items()
    ]

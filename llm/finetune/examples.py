"""Examples: token sequences of which some are learnt and the rest is given, packed into samples and read from memory.

Every rank reads all of them and keeps them as two arrays. Samples are made by best-fit packing (llm/data/samples/
packing.py) of whole examples, which do not see one another; a target counts where its token is learnt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llm.config import RunConfig
from llm.data.batch import Batch, Loader, Step, batch_of
from llm.data.native import import_native
from llm.data.prepare.tokenise import split_of
from llm.data.samples.documents import lay_out_pieces
from llm.data.samples.order import sample_positions
from llm.data.samples.sampler import Share
from llm.data.samples.schedule import Curriculum
from llm.data.tokenizer import Tokenizer
from llm.data.tokens.manifest import SPLITS
from llm.errors import InputError, require
from llm.train.resume import check_settings, check_steps
from llm.train.source import Source


class Example(NamedTuple):
    """What is given and what is learnt."""

    tokens: list[int]
    learnt: list[bool]
    """Whether each token is learnt; at least one is, and not the first, before which nothing is given."""


class Samples:
    """Examples packed into rows of T + 1 tokens."""

    def __init__(self, examples: list[Example], seq_len: int, padding: int) -> None:
        """padding: the token that fills rows. No example is longer than a row."""
        self.seq_len, self.padding, self.examples = seq_len, padding, len(examples)
        self.tokens = np.array([token for example in examples for token in example.tokens], np.int32)
        self.learnt = np.array([is_learnt for example in examples for is_learnt in example.learnt], np.uint8)
        lengths = np.array([len(example.tokens) for example in examples], np.int64)
        ranges = np.stack([lengths.cumsum() - lengths, lengths], axis=1)
        self.pieces, self.ends = import_native().plan_window(ranges, seq_len)

    def __len__(self) -> int:
        return len(self.ends)

    def row(self, number: int) -> NDArray[np.int64]:
        """The pieces [n, 2] (first token, tokens) of a row."""
        return self.pieces[self.ends[number - 1] if number else 0 : self.ends[number]]

    @cached_property
    def targets(self) -> NDArray[np.int64]:
        """How many targets count in each row: of an example, every learnt token is one."""
        counts = np.concatenate([[0], self.learnt.cumsum(dtype=np.int64)])
        of_pieces = np.array([counts[first + count] - counts[first] for first, count in self.pieces.tolist()])
        return np.diff(of_pieces.cumsum()[self.ends - 1], prepend=0)

    def batch(self, rows: NDArray[np.int64], sample_ids: NDArray[np.int64], dtype: type = np.int64) -> Batch:
        """The rows of these numbers, whose global sample numbers are `sample_ids`."""
        tokens = np.full((len(rows), self.seq_len + 1), self.padding, dtype)
        learnt = np.zeros(tokens.shape, np.uint8)
        pieces = [self.row(number) for number in rows.tolist()]
        for i, row in enumerate(pieces):
            slots = np.concatenate([np.arange(first, first + count) for first, count in row.tolist()])
            tokens[i, : len(slots)], learnt[i, : len(slots)] = self.tokens[slots], self.learnt[slots]
        # What lay_out_pieces does not count is not learnt either: a piece's first token, and padding.
        position_ids, cu_seqlens, _ = lay_out_pieces(pieces, self.seq_len)
        return batch_of(tokens, sample_ids, position_ids, cu_seqlens, learnt[:, 1:].copy())


class ExampleLoader(Loader):
    """A rank's share of the samples of each step. The order is a permutation per epoch, as that of a corpus."""

    def __init__(self, samples: Samples, config: RunConfig, share: Share, consumed: int, *, widen: bool) -> None:
        """widen: tokens are int64, else int32."""
        n_samples, name = len(samples), config.data.source
        super().__init__(Curriculum(config.phases, [{name: 1.0}], lambda *_: n_samples), consumed)
        self._samples, self._seed, self._share = samples, config.seed, share
        self._dtype = np.int64 if widen else np.int32

    def _assemble(self) -> tuple[Step, int]:
        phase, share = self._curriculum.phases[0], self._share
        G, rows, size = phase.global_batch, share.rows(phase), share.micro_batch
        places = sample_positions(self._seed, len(self._samples), self.consumed, G)
        ids = np.arange(self.consumed, self.consumed + G)
        first = share.dp_rank * rows
        parts = [slice(i, i + size) for i in range(first, first + rows, size)]
        batches = [self._samples.batch(places[part], ids[part], self._dtype) for part in parts]
        return Step(batches, int(self._samples.targets[places].sum())), G


class Examples(Source):
    """The examples of a fine-tuning task, split into training and validation by their hash."""

    def __init__(
        self, config: RunConfig, tokens: Tokenizer, examples: Iterable[tuple[str, Example]], what: str
    ) -> None:
        """tokens: of data.tokenizer. examples: each with its place, for errors. what: they are, in the plural.

        One that is longer than a sample loses its end. Raises InputError where nothing learnt is left of one, and
        where a split has none.
        """
        self.config, self.tokenizer, self.tokens, self.what = config, Path(config.data.tokenizer), tokens, what
        digest = hashlib.sha256()
        T, self.cut, splits = config.data.seq_len, 0, {name: list[Example]() for name in SPLITS}
        for place, example in examples:
            hashed = hashlib.sha256(repr(example).encode()).digest()
            digest.update(hashed)
            self.cut += len(example.tokens) > T + 1
            kept = Example(example.tokens[: T + 1], [False, *example.learnt[1 : T + 1]])
            given = next((i for i, is_learnt in enumerate(example.learnt) if is_learnt), len(example.learnt))
            found = f"{place}: {given} tokens are given before the first that is learnt"
            require(any(kept.learnt), f"{found}; a sample has data.seq_len + 1 = {T + 1}: raise it, or leave this out")
            splits[split_of(hashed, config.data.validation_fraction)].append(kept)
        counts = {name: len(found) for name, found in splits.items()}
        advice = f"data.validation_fraction is {config.data.validation_fraction}; use more {what} or another fraction"
        require(all(counts.values()), f"data.source {config.data.source} has {what} in {counts}; {advice}")
        self.digest = digest.hexdigest()
        self.samples = {name: Samples(found, T, self.tokens.eod_id) for name, found in splits.items()}

    def resumed(self, state: dict[str, Any]) -> Source:
        check_settings(self.config, state)
        found = f"data.source {self.config.data.source} or its tokenizer is not what runs/{self.config.name} began with"
        require(state["data"] == self.identity(), f"{found}; restore it, or choose another --name")
        check_steps(self.config, state)
        return self

    def identity(self) -> dict[str, Any]:
        return {"examples": self.digest, "tokenizer": hashlib.sha256(self.tokens.raw).hexdigest()}

    def describe(self) -> str:
        train, validation = (self.samples[name] for name in SPLITS)
        slots, tokens = len(train) * (train.seq_len + 1), len(train.tokens)
        text = (
            f"{self.tokens.vocab_size} tokens; {train.examples:,} {self.what} to learn ({tokens:,} tokens, of which "
            f"{int(train.targets.sum()):,} count) in {len(train):,} samples, {1 - tokens / slots:.0%} padding; "
            f"{validation.examples:,} for validation"
        )
        return text + f"; {self.cut:,} are longer than data.seq_len and lose their ends" * (self.cut > 0)

    def loader(self, *, dp_rank: int, dp_size: int, consumed: int, widen: bool) -> Loader:
        share = Share(dp_rank, dp_size, self.config.train.micro_batch_size)
        return ExampleLoader(self.samples["train"], self.config, share, consumed, widen=widen)

    def validation_batches(self, *, dp_rank: int, dp_size: int) -> Iterator[tuple[Batch, int]]:
        samples, rows = self.samples["validation"], self.config.train.micro_batch_size
        wanted = self.config.data.validation_samples or len(samples)
        if wanted > len(samples):
            raise InputError(f"data.validation_samples is {wanted}; the validation split has {len(samples)} samples")

        def batches() -> Iterator[tuple[Batch, int]]:
            for start in range(0, wanted, rows * dp_size):
                first = start + dp_rank * rows
                numbers = np.minimum(np.arange(first, first + rows), wanted - 1)
                yield samples.batch(numbers, numbers), min(max(wanted - first, 0), rows)

        return batches()

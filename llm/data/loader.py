"""Batches for training. A loader's whole state is the count of consumed samples.

A step takes the next G samples of the global order (G: global batch of the phase). Rank r of D takes the contiguous
slice [r G / D, (r + 1) G / D) of them, micro-batch by micro-batch. Which tokens sample i has:
llm/data/samples/sampler.py.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from llm.config import RunConfig
from llm.data.batch import Batch, Step
from llm.data.corpora import curriculum_of, hashed_files, training_corpora
from llm.data.native import NativeCorpus, NativeLoader, import_native
from llm.data.samples.blend import BlendTable
from llm.data.samples.packing import NumpyPackPlan
from llm.data.samples.sampler import NumpySampler, Rows, Share
from llm.data.samples.schedule import Curriculum, Schedule
from llm.data.tokens.folder import check_vocabulary
from llm.data.tokens.hashes import BackgroundVerifier
from llm.data.tokens.manifest import Manifest
from llm.data.tokens.shards import NumpyCorpus, ShardList
from llm.errors import require

CHECKED_FILES = 64  # of each corpus when it is opened; the others are checked when they are first read


class Loader(Protocol):
    """Training batches of one data-parallel rank."""

    @property
    def consumed(self) -> int:
        """Samples of the global order that all ranks together have taken: the loader's whole state."""
        ...

    @property
    def skipped(self) -> int:
        """Samples of this rank so far that could not be read and were replaced (data.damaged)."""
        ...

    @property
    def wait_seconds(self) -> float:
        """Time spent inside next_step() so far."""
        ...

    def next_step(self) -> Step:
        """The next step on this rank; the one before it must not be used any more.

        Raises InputError (a subclass of it: DamagedFile) when a file is damaged and data.damaged is stop.
        """
        ...

    def epochs(self) -> dict[str, float]:
        """How often the consumed samples have gone through each corpus."""
        ...

    def close(self) -> None:
        """End the threads, if any; next_step() must not be called afterwards."""
        ...


class NumpyLoader:
    """The plain loader: the native one's twin and oracle."""

    def __init__(self, sampler: NumpySampler, curriculum: Curriculum, consumed: int) -> None:
        self._sampler, self._curriculum = sampler, curriculum
        self.consumed = consumed
        self.wait_seconds = 0.0

    @property
    def skipped(self) -> int:
        return self._sampler.skipped

    def next_step(self) -> Step:
        start = time.perf_counter()
        before = self._sampler.replaced_targets
        rows, target_count, global_batch = self._sampler.step(self.consumed)
        step = Step([to_batch(batch) for batch in rows], target_count, self._sampler.replaced_targets - before)
        self.consumed += global_batch
        self.wait_seconds += time.perf_counter() - start
        return step

    def epochs(self) -> dict[str, float]:
        return self._curriculum.epochs(self.consumed)

    def close(self) -> None:
        pass


def to_batch(rows: Rows) -> Batch:
    """The arrays as tensors over the same memory; pinned, by a copy, when there is a GPU."""
    tensors = {name: None if array is None else torch.from_numpy(array) for name, array in vars(rows).items()}
    if torch.cuda.is_available():
        tensors = {name: None if tensor is None else tensor.pin_memory() for name, tensor in tensors.items()}
    return Batch(**tensors)  # pyright: ignore[reportArgumentType]


class VerifiedLoader:
    """A loader whose files are compared with their hashes in the background; a step is the last if one differs."""

    def __init__(self, inner: Loader, verifier: BackgroundVerifier) -> None:
        self._inner, self._verifier = inner, verifier

    def next_step(self) -> Step:
        self._verifier.check()
        return self._inner.next_step()

    def epochs(self) -> dict[str, float]:
        return self._inner.epochs()

    def close(self) -> None:
        self._verifier.close()
        self._inner.close()

    @property
    def consumed(self) -> int:
        return self._inner.consumed

    @property
    def skipped(self) -> int:
        return self._inner.skipped

    @property
    def wait_seconds(self) -> float:
        return self._inner.wait_seconds


def open_loader(
    config: RunConfig, manifest: Manifest, *, dp_rank: int, dp_size: int, consumed: int = 0, widen: bool = False
) -> Loader:
    """The loader that config.data.loader names, `consumed` samples into the global order.

    The ranks of a tensor-parallel group pass the same dp_rank and read the same samples. Tokens have the width of the
    files, which a GPU widens; `widen` makes them int64 as they are read, for training on a CPU. Raises InputError when
    the data does not fit the config or is damaged.
    """
    require(0 <= dp_rank < dp_size, f"data-parallel rank {dp_rank} of {dp_size}")
    require(consumed >= 0, f"{consumed} consumed samples; expected at least 0")
    check_vocabulary(config, manifest)
    share = Share(dp_rank, dp_size, config.train.micro_batch_size)
    for phase in config.phases:
        require(
            phase.global_batch_size % (dp_size * share.micro_batch) == 0,
            f"train.global_batch_size {phase.global_batch_size} is not a multiple of {dp_size} data-parallel ranks x "
            f"train.micro_batch_size {share.micro_batch}",
        )
    corpora = training_corpora(config, manifest)
    if config.data.damaged == "stop":
        for shards in corpora.values():
            check_first_files(open_corpus(config, shards), shards)
    if config.data.verify == "none":
        return _open(config, corpora, share, consumed, widen)
    verifier = BackgroundVerifier(hashed_files(config, manifest), (dp_rank, dp_size))
    return VerifiedLoader(_open(config, corpora, share, consumed, widen), verifier)


def _open(config: RunConfig, corpora: Mapping[str, ShardList], share: Share, consumed: int, widen: bool) -> Loader:
    native = import_native() if config.data.loader == "native" else None
    curriculum = curriculum_of(config, corpora, native.BlendTable if native else BlendTable)
    ordered = [corpora[name] for name in curriculum.names]
    dtype = common_dtype(ordered)
    packed, skip = config.data.packing == "best_fit", config.data.damaged == "skip"
    if native is not None:
        return NativeLoader(
            native,
            ordered,
            curriculum,
            share,
            seed=config.seed,
            consumed=consumed,
            packed=packed,
            document_masks=config.data.document_masks,
            skip_damaged=skip,
            dtype=torch.int64 if widen else getattr(torch, dtype),
        )
    plans = [
        {T: NumpyPackPlan(Path(path), T, shards.n_tokens) for T, path in shards.plans.items()} if packed else {}
        for shards in ordered
    ]
    schedule = Schedule(config.seed, curriculum.phases)
    masks = config.data.document_masks
    sampler = NumpySampler(
        ordered, plans, schedule, curriculum.phases, share, document_masks=masks, skip_damaged=skip, widen=widen
    )
    return NumpyLoader(sampler, curriculum, consumed)


def common_dtype(corpora: Sequence[ShardList]) -> str:
    """The dtype that batches of these corpora have; InputError when their ids take different numbers of bytes.

    Ids of four bytes are int32 whatever their files call them: they lie below 2^31.
    """
    sizes = {shards.name: np.dtype(shards.dtype).itemsize for shards in corpora}
    require(
        len(set(sizes.values())) == 1,
        f"the corpora of a blend must have ids of one size; found bytes per id {sizes}: tokenise them alike",
    )
    return {1: "uint8", 2: "uint16", 4: "int32"}[next(iter(sizes.values()))]


def open_corpus(config: RunConfig, shards: ShardList) -> NativeCorpus | NumpyCorpus:
    """A corpus to be read by rows, in the form of the loader that the config names. Touches no file."""
    if config.data.loader == "native":
        native = import_native()
        return NativeCorpus(native, shards, native.FileCache())
    return NumpyCorpus(shards)


def check_first_files(corpus: NativeCorpus | NumpyCorpus, shards: ShardList) -> None:
    """Read one token of the first files of a corpus: what is wrong with them is said before training starts."""
    corpus.read_rows(np.cumsum((0, *shards.tokens[: CHECKED_FILES - 1]))[: len(shards.tokens)], 1)

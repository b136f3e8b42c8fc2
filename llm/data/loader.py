"""Batches for training and validation. The only state of a training loader is the number of consumed samples.

A step takes the next G samples of the global order (G: global batch of the phase). Rank r of D takes the contiguous
slice [r G / D, (r + 1) G / D) of them, micro-batch by micro-batch. llm/data/samples/sampler.py finds their tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from llm.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from llm.data.batch import Batch, Loader, batch_of
from llm.data.corpora import Corpora
from llm.data.native import NativeCorpus, NativeLoader, import_native
from llm.data.samples.blend import BlendTable
from llm.data.samples.documents import scan_documents
from llm.data.samples.sampler import NumpyLoader, Share
from llm.data.tokens.hashes import CHECKED_FILES
from llm.data.tokens.shards import NumpyCorpus, ShardList
from llm.errors import require


def open_loader(corpora: Corpora, *, dp_rank: int, dp_size: int, consumed: int = 0, widen: bool = False) -> Loader:
    """The loader that data.loader names, `consumed` samples into the global order.

    The ranks of a tensor-parallel group pass the same dp_rank and read the same samples. Tokens have the width of the
    files, which a GPU widens; `widen` makes them int64 as they are read, for training on a CPU. Raises InputError when
    the data does not fit the config or is damaged.
    """
    config = corpora.config
    require(0 <= dp_rank < dp_size, f"data-parallel rank {dp_rank} of {dp_size}")
    require(consumed >= 0, f"{consumed} consumed samples; expected at least 0")
    share = Share(dp_rank, dp_size, config.train.micro_batch_size)
    for phase in config.phases:
        require(
            phase.global_batch_size % (dp_size * share.micro_batch) == 0,
            f"train.global_batch_size {phase.global_batch_size} is not a multiple of {dp_size} data-parallel ranks x "
            f"train.micro_batch_size {share.micro_batch}",
        )
    shards = [corpus.shards for corpus in corpora.training.values()]  # in the order of their numbers
    if config.data.damaged == "stop":
        for corpus in corpora.training.values():
            open_corpus(config, corpus.shards)
            corpus.check_sample()
    native = import_native() if config.data.loader == "native" else None
    curriculum = corpora.curriculum(native.BlendTable if native else BlendTable)
    dtype = getattr(torch, common_dtype(shards))
    policy = {
        "packed": config.data.packing == "best_fit",
        "document_masks": config.data.document_masks,
        "skip_damaged": config.data.damaged == "skip",
    }
    if native is not None:
        dtype = torch.int64 if widen else dtype
        return NativeLoader(native, shards, curriculum, share, config.seed, consumed, dtype=dtype, **policy)
    return NumpyLoader(shards, curriculum, share, config.seed, consumed, widen=widen, **policy)


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
    """A corpus to be read by rows, in the form of the loader that the config names.

    One token of each of its first files is read: what is wrong with them is said before training starts.
    """
    native = import_native() if config.data.loader == "native" else None
    corpus = NativeCorpus(native, shards, native.FileCache()) if native else NumpyCorpus(shards)
    corpus.read_rows(np.cumsum((0, *shards.tokens[: CHECKED_FILES - 1]))[: len(shards.tokens)], 1)
    return corpus


def validation_batches(corpora: Corpora, *, dp_rank: int, dp_size: int) -> Iterator[tuple[Batch, int]]:
    """The first data.validation_samples (null: all) samples of the validation split, in order.

    They are chunks of data.seq_len whatever data.packing and data.phases say, so that losses compare. Yields (batch,
    rows that count). Every rank yields the same number of batches, all of train.micro_batch_size rows; rows beyond
    the last sample repeat it and do not count.
    """
    require(0 <= dp_rank < dp_size, f"data-parallel rank {dp_rank} of {dp_size}")
    config = corpora.config
    shards = corpora.manifest.shard_list(corpora.folder, "validation", sums=config.data.verify != "none")
    corpus = open_corpus(config, shards)
    available, seq_len = (shards.n_tokens - 1) // config.data.seq_len, config.data.seq_len
    require(
        available >= 1,
        f"the validation split has {shards.n_tokens} tokens; a sample of data.seq_len {seq_len} needs {seq_len + 1}; "
        "use more text or shorter samples",
    )
    wanted = config.data.validation_samples or available
    require(
        wanted <= available,
        f"data.validation_samples is {wanted}; the validation split has {available} samples of data.seq_len {seq_len}",
    )

    def batches() -> Iterator[tuple[Batch, int]]:  # apart, so that the checks are made before the first is asked for
        rows = config.train.micro_batch_size
        for start in range(0, wanted, rows * dp_size):
            first = start + dp_rank * rows
            sample_ids = np.minimum(np.arange(first, first + rows), wanted - 1)
            tokens = corpus.read_rows(sample_ids * seq_len, seq_len + 1)
            masks = scan_documents(tokens, shards.eod_id, shards.eod_first) if config.data.document_masks else ()
            yield batch_of(tokens, sample_ids, *masks), min(max(wanted - first, 0), rows)

    return batches()


def token_batches(
    folder: Path | str,
    *,
    batch_size: int,
    seq_len: int,
    split: Literal["train", "validation"] = "train",
    seed: int = RunConfig.seed,
    consumed: int = 0,
    dp_rank: int = 0,
    dp_size: int = 1,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets, int64 [batch_size, seq_len] on the CPU, of a prepared folder: for a loop of your own.

    train: without end, the samples of a run of this seed that takes dp_size * batch_size of them a step, after the
    first `consumed` of all ranks. validation: each of this rank's samples once; the last batch may be smaller.
    Raises InputError at once where the folder holds no prepared data, or none of this length.
    """
    config = RunConfig(
        seed=seed,
        model=ModelConfig(vocab_size=2**31, max_seq_len=seq_len),  # any vocabulary
        data=DataConfig(path=str(folder), seq_len=seq_len),
        train=TrainConfig(global_batch_size=dp_size * batch_size, micro_batch_size=batch_size),
    )
    corpora, ranks = Corpora.open(config), {"dp_rank": dp_rank, "dp_size": dp_size}
    if split == "validation":
        found = validation_batches(corpora, **ranks)
        return (_pair(batch.tokens[:rows].long()) for batch, rows in found if rows)
    loader = open_loader(corpora, **ranks, consumed=consumed, widen=True)

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:  # apart, so that the checks are made before the first is asked for
        try:
            while True:
                yield _pair(loader.next_step().batches[0].tokens)
        finally:
            loader.close()

    return pairs()


def _pair(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and targets with memory of their own: the loader uses its buffers again."""
    return tokens[:, :-1].clone(), tokens[:, 1:].clone()

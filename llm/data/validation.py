"""Batches for validation: the samples of the validation split, in order."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from llm.config import RunConfig
from llm.data.batch import Batch
from llm.data.loader import check_first_files, open_corpus, to_batch
from llm.data.native import NativeCorpus
from llm.data.samples.documents import scan_documents
from llm.data.samples.sampler import Rows
from llm.data.tokens.folder import check_vocabulary, data_folder
from llm.data.tokens.manifest import Manifest
from llm.data.tokens.shards import NumpyCorpus, ShardList
from llm.errors import require


def validation_batches(
    config: RunConfig, manifest: Manifest, *, dp_rank: int, dp_size: int
) -> Iterator[tuple[Batch, int]]:
    """The first data.validation_samples (null: all) samples of the validation split, in order.

    They are chunks of data.seq_len whatever data.packing and data.phases say, so that losses compare. Yields (batch,
    rows that count). Every rank yields the same number of batches, all of train.micro_batch_size rows; rows beyond
    the last sample repeat it and do not count.
    """
    require(0 <= dp_rank < dp_size, f"data-parallel rank {dp_rank} of {dp_size}")
    check_vocabulary(config, manifest)
    shards = manifest.shard_list(data_folder(config), "validation")
    corpus = open_corpus(config, shards)
    check_first_files(corpus, shards)
    available, seq_len = (shards.n_tokens - 1) // config.data.seq_len, config.data.seq_len
    require(
        available >= 1,
        f"the validation split has {shards.n_tokens} tokens; a sample of data.seq_len {seq_len} needs {seq_len + 1}; "
        "use more text or shorter samples",
    )
    wanted = config.data.validation_samples or available
    require(
        wanted <= available,
        f"data.validation_samples is {wanted}; the validation split has {available} samples of "
        f"data.seq_len {config.data.seq_len}",
    )
    return _batches(config, corpus, shards, wanted, dp_rank, dp_size)


def _batches(
    config: RunConfig, corpus: NativeCorpus | NumpyCorpus, shards: ShardList, wanted: int, dp_rank: int, dp_size: int
) -> Iterator[tuple[Batch, int]]:
    rows, seq_len = config.train.micro_batch_size, config.data.seq_len
    for start in range(0, wanted, rows * dp_size):
        first = start + dp_rank * rows
        sample_ids = np.minimum(np.arange(first, first + rows), wanted - 1)
        tokens = corpus.read_rows(sample_ids * seq_len, seq_len + 1)
        position_ids = cu_seqlens = None
        if config.data.document_masks:
            position_ids, cu_seqlens = scan_documents(tokens, shards.eod_id, shards.eod_first)
        yield to_batch(Rows(tokens, sample_ids, position_ids, cu_seqlens, None)), min(max(wanted - first, 0), rows)

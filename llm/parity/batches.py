"""Random batches that every rank can make without a corpus: for layouts, their oracle, benchmarks and tests."""

from __future__ import annotations

import torch
from torch import Tensor

from llm.config import RunConfig
from llm.data.samples.documents import number_documents
from llm.model.layers import IGNORED_TARGET, Documents
from llm.train.engines.base import MicroBatch

DOCUMENTS = 4  # that begin within a row, on average, with data.document_masks


def counted_targets(batch: int, length: int) -> list[int]:
    """How many targets of each sample of a global batch count: all of the first one's, ever fewer, never none.

    So ranks and micro-batches have unequal counts, and a mean of means is not the mean.
    """
    return [length - length * i // batch for i in range(batch)]


def target_count(config: RunConfig, *, ragged: bool = True) -> int:
    """Targets of a global batch that count."""
    G, T = config.train.global_batch_size, config.data.seq_len
    return sum(counted_targets(G, T)) if ragged else G * T


def documents_of(begins: Tensor) -> Documents:
    """The documents of rows of T tokens that begin where `begins`, bool [B, T], says and where a row does."""
    begins = begins.clone()
    begins[:, 0] = True
    position_ids, cu_seqlens = map(torch.from_numpy, number_documents(begins.numpy()))
    return Documents(position_ids.long(), cu_seqlens)


def micro_batches(
    config: RunConfig, step: int, device: torch.device, *, dp_rank: int = 0, dp_size: int = 1, ragged: bool = True
) -> list[MicroBatch]:
    """A data-parallel rank's micro-batches of a step.

    Tokens are uniform over the vocabulary, from a generator keyed by the seed and the step, and so are the places where
    documents begin, with data.document_masks; sample numbers are global. Without `ragged` every target counts.
    """
    G, T, size = config.train.global_batch_size, config.data.seq_len, config.train.micro_batch_size
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    tokens = torch.randint(0, config.model.vocab_size, (G, T + 1), generator=generator)
    targets = tokens[:, 1:].clone()
    if ragged:
        for sample, counted in enumerate(counted_targets(G, T)):
            targets[sample, counted:] = IGNORED_TARGET
    begins = torch.rand(G, T, generator=generator) < DOCUMENTS / T
    samples = torch.arange(step * G, (step + 1) * G)
    positions, share = torch.arange(T, device=device), G // dp_size
    batches = []
    for start in range(dp_rank * share, (dp_rank + 1) * share, size):
        cut = slice(start, start + size)
        batch = MicroBatch(tokens[cut, :-1].to(device), positions, samples[cut].to(device), targets[cut].to(device))
        if config.data.document_masks:
            position_ids, cu_seqlens, _ = documents_of(begins[cut])
            batch = batch._replace(documents=Documents(position_ids.to(device), cu_seqlens.to(device)))
        batches.append(batch)
    return batches

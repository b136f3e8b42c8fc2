"""Made-up batches, the same for a layout and its oracle: no corpus is needed, and every rank can make them."""

from __future__ import annotations

import torch

from llm.config import RunConfig
from llm.model.loss import IGNORED_TARGET
from llm.parallel.mesh import Mesh
from llm.train.engines.base import MicroBatch


def counted_targets(batch: int, length: int) -> list[int]:
    """How many targets of each sample of a global batch count: all of the first one's, ever fewer, never none.

    So ranks and micro-batches have unequal counts, and a mean of means is not the mean.
    """
    return [length - length * i // batch for i in range(batch)]


def target_count(config: RunConfig) -> int:
    """Targets of a global batch that count."""
    return sum(counted_targets(config.train.global_batch_size, config.data.seq_len))


def micro_batches(config: RunConfig, step: int, device: torch.device, mesh: Mesh | None = None) -> list[MicroBatch]:
    """A data-parallel rank's micro-batches of a step; without a mesh those of the whole global batch.

    Tokens are uniform over the vocabulary, from a generator keyed by the seed and the step; sample numbers are global.
    """
    G, T, size = config.train.global_batch_size, config.data.seq_len, config.train.micro_batch_size
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    tokens = torch.randint(0, config.model.vocab_size, (G, T + 1), generator=generator)
    targets = tokens[:, 1:].clone()
    for sample, counted in enumerate(counted_targets(G, T)):
        targets[sample, counted:] = IGNORED_TARGET
    samples = torch.arange(step * G, (step + 1) * G)
    share = G // mesh.dp_size if mesh is not None else G
    first = mesh.dp_rank * share if mesh is not None else 0
    positions = torch.arange(T, device=device)
    return [
        MicroBatch(tokens[cut, :-1].to(device), positions, samples[cut].to(device), targets[cut].to(device))
        for cut in (slice(start, start + size) for start in range(first, first + share, size))
    ]

"""A loader that makes the worst of what it may do: the buffers of a step are overwritten as soon as it may."""

from __future__ import annotations

import torch

from llm.data.batch import Batch, Step
from llm.model.layers import IGNORED_TARGET
from llm.train.engines.base import MicroBatch

B, BATCHES = 2, 3


class OneBuffer:
    """Every step lies in the same buffers, of `T` tokens a row; all that it holds is a function of its number."""

    def __init__(self, T: int, *, pinned: bool = False) -> None:
        self.asked, self.closed = 0, False
        self.consumed, self.wait_seconds = 0, 0.0
        self.batches = []
        for _ in range(BATCHES):
            batch = Batch(
                torch.zeros(B, T + 1, dtype=torch.uint16),
                torch.zeros(B, dtype=torch.int64),
                torch.zeros(B, T, dtype=torch.int32),
                torch.zeros(3, dtype=torch.int32),
                torch.zeros(B, T, dtype=torch.uint8),
            )
            self.batches.append(Batch(*(t.pin_memory() if pinned else t for t in vars(batch).values())))

    def epochs(self) -> dict[str, float]:
        return {"corpus": self.asked / 4}

    def next_step(self) -> Step:
        self.asked += 1
        for i, batch in enumerate(self.batches):
            for mine, wanted in zip(vars(batch).values(), contents(self.asked, i, batch), strict=True):
                mine.copy_(wanted)
        return Step(self.batches, 1000 + self.asked, skipped_samples=10, replaced_targets=-self.asked)

    def close(self) -> None:
        self.closed = True


def contents(step: int, i: int, like: Batch) -> list[torch.Tensor]:
    """The tensors of batch i of a step: each value differs from one step to the next."""
    T = like.tokens.shape[1] - 1
    number = BATCHES * step + i
    return [
        torch.full((B, T + 1), 60000 + number).to(torch.uint16),
        torch.arange(B) + B * number,
        torch.full((B, T), number, dtype=torch.int32),
        torch.tensor([0, number, B * T], dtype=torch.int32),
        torch.full((B, T), step % 2, dtype=torch.uint8),
    ]


def check(found: list[MicroBatch], count: int, step: int, T: int) -> None:
    """Raise unless these are the micro-batches of that step, widened."""
    assert count == 1000 and len(found) == BATCHES
    for i, batch in enumerate(found):
        number = BATCHES * step + i
        assert (batch.tokens == 60000 + number).all() and batch.tokens.shape == (B, T)
        assert (batch.targets == (60000 + number if step % 2 else IGNORED_TARGET)).all()
        assert batch.samples.tolist() == [B * number, B * number + 1]
        assert batch.positions.tolist() == list(range(T))
        assert batch.documents is not None
        assert (batch.documents.position_ids == number).all()
        assert batch.documents.cu_seqlens.tolist() == [0, number, B * T]
        whole = (batch.tokens, batch.targets, batch.samples, batch.positions, batch.documents.position_ids)
        assert {tensor.dtype for tensor in whole} == {torch.int64}
        assert batch.documents.cu_seqlens.dtype == torch.int32

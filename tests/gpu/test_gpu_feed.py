"""Steps are copied to a GPU beside its computation: no buffer is written over too early, on either side."""

from __future__ import annotations

import pytest
import torch

from feed_cases import OneBuffer, check
from llm.data.batch import Step
from llm.train.engines.base import MicroBatch
from llm.train.feed import Feed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
STEPS = 6
LONG = 1 << 22  # tokens of a row: copying a step takes milliseconds
CYCLES = 200_000_000  # of a GPU that is busy for about a tenth of a second


def on_the_cpu(batches: list[MicroBatch]) -> list[MicroBatch]:
    return [
        batch._replace(
            tokens=batch.tokens.cpu(),
            positions=batch.positions.cpu(),
            samples=batch.samples.cpu(),
            targets=batch.targets.cpu(),
            documents=None if batch.documents is None else type(batch.documents)(*(t.cpu() for t in batch.documents)),
        )
        for batch in batches
    ]


@pytest.mark.parametrize("pinned", [True, False])
def test_a_buffer_that_is_being_copied_is_not_overwritten(pinned: bool) -> None:
    """Every step lies in one set of buffers, which the loader fills anew as soon as it is asked."""

    class OnlyTokens(OneBuffer):
        def next_step(self) -> Step:
            self.asked += 1
            for batch in self.batches:
                batch.tokens.view(torch.int16).fill_(self.asked)
            return Step(self.batches, self.asked)

    T = LONG if pinned else LONG >> 4
    loader = OnlyTokens(T, pinned=pinned)
    feed = Feed(loader, torch.device("cuda"), STEPS)
    for step in range(1, STEPS + 1):
        found, count = feed.next_step()
        assert count == step and loader.asked == min(step + 1, STEPS)
        for batch in found:
            assert (batch.tokens == step).all() and batch.tokens.is_cuda
    feed.close()


def test_memory_on_the_gpu_is_not_reused_before_it_is_read() -> None:
    """The computation is far behind: steps are handed out, and their copies freed, before any of them is widened."""
    T = 1 << 12
    loader = OneBuffer(T, pinned=True)
    feed = Feed(loader, torch.device("cuda"), STEPS)
    handed = []
    for _ in range(STEPS):
        torch.cuda._sleep(CYCLES)
        handed.append(feed.next_step())
    for step, (found, count) in enumerate(handed, 1):
        check(on_the_cpu(found), count, step, T)
    feed.close()


def test_the_computation_is_not_waited_for() -> None:
    loader = OneBuffer(1 << 12, pinned=True)
    feed = Feed(loader, torch.device("cuda"), STEPS)
    feed.next_step()
    torch.cuda.synchronize()
    before = feed.wait_seconds
    ended = torch.cuda.Event()
    torch.cuda._sleep(10 * CYCLES)
    ended.record()
    feed.next_step()
    assert not ended.query(), "the copy of a step waited for the computation before it"
    assert feed.wait_seconds - before < 0.5
    feed.close()

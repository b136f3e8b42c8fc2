"""What the loader gives reaches the engine whole: on a CPU as it lies, on a GPU one step ahead."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from feed_cases import BATCHES, OneBuffer, check
from llm.data.batch import Batch, Step
from llm.errors import InputError
from llm.model.layers import IGNORED_TARGET
from llm.train import feed as feeds
from llm.train.engines.base import micro_batch
from llm.train.feed import Feed
from pool import RankPool

CPU, T = torch.device("cpu"), 5


def test_a_cpu_takes_each_step_when_it_is_due_and_copies_nothing() -> None:
    loader = OneBuffer(T)
    feed = Feed(loader, CPU, 4)
    for step in range(1, 5):
        found, count = feed.next_step()
        check(found, count, step, T)
        assert loader.asked == step
        assert feed.record() == {"epochs": {"corpus": step / 4}, "skipped_samples": 10 * step}
        assert [b.samples.data_ptr() for b in found] == [b.sample_ids.data_ptr() for b in loader.batches]
    feed.close()
    assert loader.closed


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int32, torch.uint32])
def test_tokens_of_every_width_are_widened(dtype: torch.dtype) -> None:
    largest = torch.iinfo(dtype).max
    tokens = torch.tensor([[0, largest, 1, largest - 1]], dtype=torch.int64).to(dtype)
    found = micro_batch(Batch(tokens, torch.tensor([7])), CPU)
    assert found.tokens.tolist() == [[0, largest, 1]] and found.targets.tolist() == [[largest, 1, largest - 1]]
    assert found.documents is None


def test_targets_count_where_the_batch_and_the_rows_say() -> None:
    tokens = torch.arange(8).view(2, 4).to(torch.uint16)
    counted = torch.tensor([[1, 0, 1], [0, 1, 1]], dtype=torch.uint8)
    x = IGNORED_TARGET
    batch = Batch(tokens, torch.arange(2), counted=counted)
    assert micro_batch(batch, CPU).targets.tolist() == [[1, x, 3], [x, 6, 7]]
    assert micro_batch(batch, CPU, 1).targets.tolist() == [[1, x, 3], [x, x, x]]
    last = micro_batch(Batch(tokens, torch.arange(2)), CPU, 1)
    assert last.targets.tolist() == [[1, 2, 3], [x, x, x]] and last.tokens.tolist() == [[0, 1, 2], [4, 5, 6]]
    assert tokens.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]], "the loader's buffers are not written to"


class SlowGpu:
    """Stands for torch.cuda: a copy to the device is made no sooner than it is waited for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pending: list[Callable[[], object]] = []
        self.recorded: list[int] = []
        self.waits = 0
        gpu = self

        class Event:
            def record(self) -> None:
                self.before = list(gpu.pending)

            def synchronize(self) -> None:
                gpu.waits += 1
                for copy in self.before:
                    copy()
                gpu.pending = [copy for copy in gpu.pending if copy not in self.before]

        def on_device(batch: Batch, device: torch.device) -> Batch:
            copies = {name: torch.zeros_like(tensor) for name, tensor in feeds.tensors(batch).items()}
            for name, tensor in feeds.tensors(batch).items():
                self.pending.append(lambda there=copies[name], here=tensor: there.copy_(here))
            return Batch(**copies)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: "copies")
        monkeypatch.setattr(torch.cuda, "stream", nullcontext)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "computation")
        monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: self.record_stream(stream))
        monkeypatch.setattr(feeds, "on_device", on_device)
        monkeypatch.setattr(feeds.Feed, "_over_ranks", lambda feed, number: torch.tensor(number))
        monkeypatch.setattr(feeds, "micro_batch", lambda batch, device: micro_batch(batch, CPU))

    def record_stream(self, stream: str) -> None:
        assert stream == "computation"
        self.recorded.append(1)


def test_a_gpu_is_one_step_ahead_and_no_buffer_is_taken_back_while_it_is_copied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = SlowGpu(monkeypatch)
    loader = OneBuffer(T)
    feed = Feed(loader, torch.device("cuda"), 4)
    for step in range(1, 5):
        found, count = feed.next_step()
        check(found, count, step, T)
        assert loader.asked == min(step + 1, 4), "the loader is asked for what is handed out, one step ahead"
        expected = {"epochs": {"corpus": step / 4}, "skipped_samples": 10 * step}
        assert feed.record() == expected, "of the step handed out"
        assert len(gpu.recorded) == 5 * BATCHES * step
    feed.close()
    assert loader.closed


def test_the_loader_outlives_a_copy_from_its_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SlowGpu(monkeypatch)
    loader = OneBuffer(T)
    feed = Feed(loader, torch.device("cuda"), 4)
    feed.next_step()
    assert gpu.pending and not loader.closed
    feed.close()
    assert not gpu.pending and loader.closed


def test_the_time_of_waiting_is_counted() -> None:
    class Slow(OneBuffer):
        def next_step(self) -> Step:
            time.sleep(0.05)
            return super().next_step()

    feed = Feed(Slow(T), CPU, 2)
    feed.next_step()
    time.sleep(0.1)
    feed.next_step()
    assert 0.1 <= feed.wait_seconds < 0.2


def over_ranks(first: int) -> list[Any]:
    """Counts of two steps on this rank of a pool, where rank r replaces r + 1 samples more in each; of all ranks."""
    rank = torch.distributed.get_rank()

    class Replacing(OneBuffer):
        def next_step(self) -> Step:
            return dataclasses.replace(super().next_step(), skipped_samples=rank + 1, replaced_targets=10 * rank)

    feed = Feed(Replacing(T), CPU, 2, torch.distributed.group.WORLD, skipped_samples=first)
    found = [(int(feed.next_step()[1]), feed.skipped_samples()) for _ in range(2)]
    return [*found, feed.record()["skipped_samples"]]


def test_what_is_replaced_counts_over_the_ranks(two_ranks: RankPool) -> None:
    expected = [(1001 + 10, 5 + 3), (1002 + 10, 5 + 6), 5 + 6]
    assert two_ranks.run(over_ranks, 5) == [expected, expected]


def test_what_may_not_be_replaced_is_not_counted() -> None:
    class Stopping(OneBuffer):
        def next_step(self) -> Step:
            return dataclasses.replace(super().next_step(), skipped_samples=None, replaced_targets=None)

    feed = Feed(Stopping(T), CPU, 2, skipped_samples=5)
    assert feed.next_step()[1] == 1001
    assert feed.record() == {"epochs": {"corpus": 0.25}} and feed.skipped_samples() == 5, "what an earlier process did"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_damaged_file_ends_the_run(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Check:
        """Finds a damaged file in the second of its looks."""

        looks, closed = 0, False

        def check(self) -> None:
            self.looks += 1
            if self.looks == 2:
                raise InputError("damaged")

        def close(self) -> None:
            self.closed = True

    SlowGpu(monkeypatch)
    check, loader = Check(), OneBuffer(T)
    feed = Feed(loader, torch.device(device), 4, hash_check=check)  # pyright: ignore[reportArgumentType]
    if device == "cpu":  # a GPU looks when it fetches the second step, ahead
        feed.next_step()
    with pytest.raises(InputError, match="damaged"):
        feed.next_step()
    assert loader.asked == 1
    feed.close()
    assert check.closed and loader.closed

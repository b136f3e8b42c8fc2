"""Bytes held are counted right where the answer is known."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from benchmarks.layout.counters import LiveStorages


def test_live_storages_of_plain_tensors() -> None:
    before = torch.ones(1000)
    with LiveStorages() as storages:
        base = storages.live()
        assert base >= 4000, "what exists before is found"
        x = torch.zeros(100, 10)
        part = x[3]  # shares the storage
        assert storages.live() - base == 4000
        del x
        assert storages.live() - base == 4000
        del part
        assert storages.live() == base and storages.peak - base == 4000
        del before
        assert storages.live() == base - 4000


def test_a_storage_is_as_large_as_it_is_now() -> None:
    with LiveStorages() as storages:
        x = torch.zeros(1000)
        base = storages.live()
        x.untyped_storage().resize_(0)  # how FSDP frees what it has gathered
        assert storages.live() == base - 4000


def test_what_exists_before_can_be_left_out() -> None:
    before = torch.ones(1000)
    with LiveStorages(existing=False) as storages:
        before.add_(1)
        after = before + before[:500].sum()
        assert storages.live() == 4000
        del before
        assert storages.live() == 4000 and len(after)


def test_gradients_from_before_are_found() -> None:
    x = torch.ones(1000, requires_grad=True)
    (2 * x).sum().backward()
    with LiveStorages() as storages:
        base = storages.live()
        x.grad = None
        assert storages.live() == base - 4000


@pytest.mark.parametrize(("recompute", "held"), [(False, 3 * 4000), (True, 0)])
def test_what_only_autograds_graph_holds(recompute: bool, held: int) -> None:
    """exp keeps its result; the two sines keep their inputs, the second of which is the first one's result."""

    def function(x: torch.Tensor) -> torch.Tensor:
        return x.exp().mul(2).sin().sin()

    with LiveStorages() as storages:
        x = torch.ones(1000, requires_grad=True)
        base = storages.live()
        y = checkpoint(function, x, use_reentrant=False) if recompute else function(x)
        assert storages.live() - base == held + 4000
        y.sum().backward()
        assert storages.live() - base == 8000, "the result and the gradient"
        assert storages.peak - base >= 4 * 4000

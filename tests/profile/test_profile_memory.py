"""Whose the memory of a step is, beside a dispatch mode that follows every storage on its own."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from profiled_step import CPU, Data, config, new_engine, ranges, step
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llm.profile.memory import WaitPlaces, analyse_memory, live_blocks
from llm.profile.ranges import mark_range
from llm.profile.trace import load


class Storages(TorchDispatchMode):
    """Bytes of the storages that operations have made and that live, and the most there were."""

    def __init__(self, before: Iterable[Tensor]) -> None:
        super().__init__()
        self.known = dict.fromkeys((tensor.untyped_storage()._cdata for tensor in before), 0)
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.known:
                storage = tensor.untyped_storage()
                self.known[storage._cdata] = storage.nbytes()
                self.live += storage.nbytes()
                weakref.finalize(storage, self.gone, storage._cdata)
        self.peak = max(self.peak, self.live)
        return result

    def gone(self, key: int) -> None:
        self.live -= self.known.pop(key, 0)


def known(engine: Any) -> Any:
    for name in engine.parameters:
        yield "weights", name, engine.local_weight(name)
    for state in engine.optimizer.state.values():
        yield from (("moments", "AdamW", tensor) for tensor in state.values())


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(memory, the engine, bytes by the mode in the same step of a twin)."""
    made, path = config(), tmp_path_factory.mktemp("memory") / "trace.json"
    engine, twin = new_engine(made), new_engine(made)
    for number in range(2):
        step(engine, Data(made), number)
        step(twin, Data(made), number)
    data = Data(made)
    before = live_blocks(known(engine), CPU)
    total = sum(block.bytes for block in before.values())
    with (
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recording,
        ranges(engine, data),
        mark_range("step 3"),
    ):
        step(engine, data, 2)
    recording.export_chrome_trace(str(path))
    memory = analyse_memory(load(path), before, total, CPU)
    storages = Storages(tensor for _, _, tensor in known(twin))
    with storages:
        step(twin, Data(made), 2)
    return memory, engine, total + storages.peak


def test_the_categories_are_the_memory_that_lives_at_the_peak(profiled: Any) -> None:
    memory, engine, independent = profiled
    weights = 4 * sum(p.numel() for p in engine.parameters.values())
    assert sum(memory.categories.values()) == pytest.approx(independent, rel=0.03)
    assert abs(memory.unattributed_bytes) <= 0.03 * memory.peak_bytes
    assert memory.categories["weights"] == weights
    assert memory.categories["moments"] == 2 * weights + 4 * len(engine.parameters)
    assert 0 < memory.categories["gradients"] <= weights + 8  # the loss, in fp64
    assert memory.categories["activations"] > 0 and memory.categories["temporary"] > 0
    assert memory.peak_bytes == max(level for _, level in memory.over_step)
    assert len(memory.owners) == 10 and memory.owners[0].bytes >= memory.owners[-1].bytes


def test_what_lives_is_counted_once_and_what_is_borrowed_is_not() -> None:
    before = live_blocks([], CPU)
    tensor, borrowed = torch.zeros(1_000_000), torch.from_numpy(np.zeros(1_000_000, dtype=np.float32))
    blocks = live_blocks([("weights", "a", tensor), ("weights", "b", tensor[5:])], CPU)
    new = [block for address, block in blocks.items() if address not in before]
    assert [(block.bytes, block.owner) for block in new if block.category == "weights"] == [(4_000_000, "a")]
    assert sum(block.bytes for block in new) < 4_100_000 and borrowed.data_ptr() not in blocks
    assert live_blocks([], CPU)[tensor.data_ptr()].owner == "buffers"


def test_tensors_that_a_compiler_traces_with_are_left_out() -> None:
    traced = torch._to_functional_tensor(torch.zeros(1_000))
    with pytest.raises(RuntimeError, match="invalid python storage"):
        traced.untyped_storage().data_ptr()
    assert live_blocks([], CPU)


def test_a_wait_is_placed_where_a_number_is_read() -> None:
    x = torch.ones(3)
    with WaitPlaces() as found:
        float(x.sum())
        line = sys._getframe().f_lineno - 1
        x.sum()
        bool(x.max() > 2)
    assert found.places == [f"tests/profile/test_profile_memory.py:{line + after}" for after in (0, 3)]

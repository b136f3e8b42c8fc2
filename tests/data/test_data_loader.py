"""Batches: native equals NumPy, no layout changes the stream, the state is one integer."""

from __future__ import annotations

import builtins
import dataclasses
import gc
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MakeData
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm.data.loader import open_loader, validation_batches
from llm.data.manifest import Manifest
from llm.data.order import Order
from llm.errors import InputError


def take(loader, steps: int) -> tuple[list[np.ndarray], list[int]]:
    """Rows and sample ids of the next steps; closes the loader."""
    rows, ids = [], []
    for _ in range(steps):
        for batch in loader.next_step():
            rows += list(batch.tokens.numpy())
            ids += batch.sample_ids.tolist()
    loader.close()
    return rows, ids


def global_stream(config, manifest, dp_size: int, steps: int, consumed: int = 0):
    """Each step's samples over all ranks, joined in rank order."""
    loaders = [open_loader(config, manifest, dp_rank=r, dp_size=dp_size, consumed=consumed) for r in range(dp_size)]
    rows, ids = [], []
    for _ in range(steps):
        for loader in loaders:
            for batch in loader.next_step():
                rows += [batch.tokens.numpy()]
                ids += batch.sample_ids.tolist()
    assert {loader.consumed for loader in loaders} == {consumed + steps * config.train.global_batch_size}
    for loader in loaders:
        loader.close()
    return np.concatenate(rows), ids


def with_loader(config, kind: str):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, loader=kind))


def file_tokens(config, split: str, dtype="<u2") -> np.ndarray:
    return np.fromfile(Path(config.data.path) / f"{split}.bin", dtype)


@pytest.mark.parametrize("kind", ["native", "numpy"])
def test_a_step_is_the_next_samples_of_the_order(make_data: MakeData, kind: str):
    config, manifest = make_data(n_train=1001, loader=kind)  # 100 samples, 8.3 steps an epoch
    rows, ids = global_stream(config, manifest, 1, 20)
    tokens, positions = file_tokens(config, "train"), Order(config.seed, 100).positions(0, 240)
    assert ids == list(range(240))
    for row, position in zip(rows, positions, strict=True):
        assert np.array_equal(row, tokens[position * 10 : position * 10 + 11])
    assert sorted(positions[:100]) == list(range(100)) == sorted(positions[100:200])


@pytest.mark.parametrize("kind", ["native", "numpy"])
@pytest.mark.parametrize(("dp_size", "micro"), [(1, 12), (1, 1), (2, 3), (3, 4), (4, 1), (12, 1)])
def test_no_layout_changes_the_stream(make_data: MakeData, kind: str, dp_size: int, micro: int):
    config, manifest = make_data(loader=kind)
    expected, _ = global_stream(config, manifest, 1, 10, consumed=7)
    train = dataclasses.replace(config.train, micro_batch_size=micro)
    other = dataclasses.replace(config, train=train)
    rows, ids = global_stream(other, manifest, dp_size, 10, consumed=7)
    assert np.array_equal(rows, expected)
    assert ids == list(range(7, 127))
    step = open_loader(other, manifest, dp_rank=dp_size - 1, dp_size=dp_size).next_step()
    assert [tuple(b.tokens.shape) for b in step] == [(micro, 11)] * (12 // dp_size // micro)


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_native_equals_numpy(make_data: MakeData, data: st.DataObject):
    dp_size, micro, accumulation = (data.draw(st.integers(1, 4)) for _ in range(3))
    config, manifest = make_data(
        data.draw(st.sampled_from([12, 101, 350])),
        vocab_size=data.draw(st.sampled_from([300, 70_000])),
        seq_len=data.draw(st.integers(1, 11)),
        seed=data.draw(st.integers(0, 2**32 - 1)),
        global_batch=dp_size * micro * accumulation,
        micro_batch=micro,
    )
    where = {
        "dp_rank": data.draw(st.integers(0, dp_size - 1)),
        "dp_size": dp_size,
        "consumed": data.draw(st.integers(0, 2**40)),
    }
    rows, ids = take(open_loader(with_loader(config, "native"), manifest, **where), 4)
    expected_rows, expected_ids = take(open_loader(config, manifest, **where), 4)
    assert ids == expected_ids
    assert np.array_equal(rows, expected_rows)
    assert rows[0].dtype == expected_rows[0].dtype == manifest.splits["train"].shards.dtype


@pytest.mark.parametrize("kind", ["native", "numpy"])
def test_resumed_equals_uninterrupted(make_data: MakeData, kind: str):
    config, manifest = make_data(loader=kind)
    rows, ids = take(open_loader(config, manifest, dp_rank=1, dp_size=2), 30)
    for step in (1, 8, 9, 17, 29):  # the epoch ends inside steps 8 and 16
        resumed = open_loader(config, manifest, dp_rank=1, dp_size=2, consumed=12 * step)
        tail_rows, tail_ids = take(resumed, 30 - step)
        assert tail_ids == ids[6 * step :]
        assert np.array_equal(tail_rows, rows[6 * step :])


def test_huge_sample_numbers(make_data: MakeData):
    config, manifest = make_data()
    for consumed in (2**32 - 6, 2**53 + 1, 2**63 - 100):
        native = open_loader(with_loader(config, "native"), manifest, dp_rank=0, dp_size=2, consumed=consumed)
        twin = open_loader(config, manifest, dp_rank=0, dp_size=2, consumed=consumed)
        (rows, ids), (expected_rows, expected_ids) = take(native, 3), take(twin, 3)
        assert ids == expected_ids
        assert np.array_equal(rows, expected_rows)


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def test_threads_end_and_batches_stay(make_data: MakeData):
    config, manifest = make_data(loader="native")
    before = threads()
    loader = open_loader(config, manifest, dp_rank=0, dp_size=1)
    assert threads() > before
    kept = [batch for _ in range(30) for batch in loader.next_step()]
    copies = [batch.tokens.clone() for batch in kept]
    loader.close()
    loader.close()
    assert threads() == before
    with pytest.raises(RuntimeError, match="closed"):
        loader.next_step()
    del loader
    gc.collect()
    expected, _ = global_stream(with_loader(config, "numpy"), manifest, 1, 30)
    assert np.array_equal(torch.cat([batch.tokens for batch in kept]).numpy(), expected)
    assert all(torch.equal(batch.tokens, copy) for batch, copy in zip(kept, copies, strict=True))

    unclosed = open_loader(config, manifest, dp_rank=0, dp_size=1)
    del unclosed
    gc.collect()
    assert threads() == before


def test_native_batches_are_not_copied(make_data: MakeData):
    config, manifest = make_data(loader="native")
    loader = open_loader(config, manifest, dp_rank=0, dp_size=1)
    batches = loader.next_step()
    loader.close()
    if not torch.cuda.is_available():
        starts = [batch.tokens.data_ptr() for batch in batches]
        assert starts == [starts[0] + i * 3 * 11 * 2 for i in range(4)]
    assert all(batch.tokens.is_contiguous() for batch in batches)
    assert batches[0].tokens.dtype == torch.uint16
    assert batches[0].sample_ids.dtype == torch.int64


def test_waiting_is_counted(make_data: MakeData):
    for kind in ("native", "numpy"):
        config, manifest = make_data(n_train=1001 + len(kind), loader=kind)
        loader = open_loader(config, manifest, dp_rank=0, dp_size=1)
        assert loader.wait_seconds == 0
        loader.next_step()
        assert loader.wait_seconds > 0
        loader.close()


@pytest.mark.parametrize("kind", ["native", "numpy"])
@pytest.mark.parametrize("wanted", [None, 1, 7, 12, 19])
@pytest.mark.parametrize(("dp_size", "micro"), [(1, 3), (1, 64), (2, 3), (3, 5)])
def test_validation_covers_each_sample_once(
    make_data: MakeData, kind: str, wanted: int | None, dp_size: int, micro: int
):
    config, manifest = make_data(
        n_validation=200, loader=kind, validation_samples=wanted, micro_batch=micro, global_batch=60
    )
    tokens, seen, counts = file_tokens(config, "validation"), [], []
    for rank in range(dp_size):
        batches = list(validation_batches(config, manifest, dp_rank=rank, dp_size=dp_size))
        counts.append(len(batches))
        for batch, valid in batches:
            assert batch.tokens.shape == (micro, 11)
            assert 0 <= valid <= micro
            seen += batch.sample_ids[:valid].tolist()
            for i, row in zip(batch.sample_ids.tolist(), batch.tokens.numpy(), strict=True):
                assert np.array_equal(row, tokens[10 * i : 10 * i + 11])
    assert sorted(seen) == list(range(wanted or 19))
    assert len(set(counts)) == 1


def refused(config, manifest, match: str, **ranks) -> None:
    arguments = {"dp_rank": 0, "dp_size": 1} | ranks
    with pytest.raises(InputError, match=match):
        open_loader(config, manifest, **arguments)


@pytest.mark.parametrize("kind", ["native", "numpy"])
def test_unfit_data_is_refused(make_data: MakeData, kind: str):
    config, manifest = make_data(loader=kind)
    long = dataclasses.replace(config, data=dataclasses.replace(config.data, seq_len=1001))
    refused(long, manifest, "the train split has 1001 tokens.*needs 1002")
    model = dataclasses.replace(config.model, vocab_size=501)
    wider = dataclasses.replace(config, model=model)
    refused(wider, manifest, "vocabulary of 500, model.vocab_size is 501")
    refused(config, manifest, "12 is not a multiple of 5", dp_size=5)
    refused(config, manifest, "rank 2 of 2", dp_rank=2, dp_size=2)
    refused(config, manifest, "-1 consumed", consumed=-1)
    with pytest.raises(InputError, match=r"validation_samples is 20; .* has 19 samples"):
        validation_batches(
            dataclasses.replace(config, data=dataclasses.replace(config.data, validation_samples=20)),
            manifest,
            dp_rank=0,
            dp_size=1,
        )
    splits = manifest.splits | {"train": dataclasses.replace(manifest.splits["train"], documents=2)}
    lying: Manifest = dataclasses.replace(manifest, splits=splits)
    refused(config, lying, "1001, 1\\); the manifest says .*1001, 2")
    path = Path(config.data.path or "") / "train.bin"
    path.write_bytes(path.read_bytes()[:-2])
    refused(config, manifest, "has 2000 bytes, its index says 2002")


def test_a_missing_extension_is_explained(make_data: MakeData, monkeypatch: pytest.MonkeyPatch):
    config, manifest = make_data(loader="native")
    real_import = builtins.__import__

    def without_native(name, globals=None, locals=None, fromlist=(), level=0):
        if name == "llm.data" and "_native" in (fromlist or ()):
            raise ImportError("no extension here")
        return real_import(name, globals, locals, fromlist, level)

    monkeypatch.setattr(builtins, "__import__", without_native)
    refused(config, manifest, "no extension here.*run make setup")

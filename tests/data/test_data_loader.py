"""Batches: native equals NumPy, no layout changes the stream, the state is one integer."""

from __future__ import annotations

import builtins
import dataclasses
import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MakeData, write_shards
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm.config import PhaseChange
from llm.config.phases import consumed_samples
from llm.data.corpora import Corpora
from llm.data.loader import open_loader
from llm.data.samples.order import sample_positions
from llm.data.tokens.manifest import read_manifest
from llm.errors import InputError

FIELDS = ("tokens", "sample_ids", "position_ids", "cu_seqlens", "counted")
KINDS = pytest.mark.parametrize("kind", ["native", "numpy"])


def take(loader, steps: int) -> list[list[dict[str, np.ndarray]]]:
    """Copies of the micro-batches of the next steps; closes the loader."""
    taken = []
    for _ in range(steps):
        fields = [vars(batch).items() for batch in loader.next_step().batches]
        taken.append([{name: value.numpy().copy() for name, value in f if value is not None} for f in fields])
    loader.close()
    return taken


def stream(config, dp_size: int, steps: int, consumed: int = 0) -> tuple[np.ndarray, list[int]]:
    """Tokens and numbers of each step's samples over all ranks, joined in rank order."""
    loaders = [open_loader(Corpora.open(config), dp_rank=r, dp_size=dp_size, consumed=consumed) for r in range(dp_size)]
    taken = [take(loader, steps) for loader in loaders]
    assert len({loader.consumed for loader in loaders}) == 1
    batches = [batch for step in range(steps) for rank in taken for batch in rank[step]]
    ids = np.concatenate([batch["sample_ids"] for batch in batches]).tolist()
    return np.concatenate([batch["tokens"] for batch in batches]), ids


def equal(found: list, expected: list) -> None:
    for step, other in zip(found, expected, strict=True):
        for batch, twin in zip(step, other, strict=True):
            assert batch.keys() == twin.keys()
            for name in batch:
                assert batch[name].dtype == twin[name].dtype, name
                assert np.array_equal(batch[name], twin[name]), name


def with_data(config, **changes):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))


def with_batch(config, **changes):
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))


def file_tokens(config, split: str, dtype="<u2") -> np.ndarray:
    return np.fromfile(Path(config.data.path) / f"{split}.bin", dtype)


@KINDS
def test_a_step_is_the_next_samples_of_the_order(make_data: MakeData, kind: str):
    config = make_data(n_train=1001, loader=kind)  # 100 samples, 8.3 steps an epoch
    rows, ids = stream(config, 1, 20)
    tokens, positions = file_tokens(config, "train"), sample_positions(config.seed, 100, 0, 240)
    assert ids == list(range(240))
    for row, position in zip(rows, positions, strict=True):
        assert np.array_equal(row, tokens[position * 10 : position * 10 + 11])
    assert sorted(positions[:100]) == list(range(100)) == sorted(positions[100:200])


@KINDS
@pytest.mark.parametrize(("dp_size", "micro"), [(1, 12), (1, 1), (2, 3), (3, 4), (4, 1), (12, 1)])
def test_no_layout_changes_the_stream(make_data: MakeData, kind: str, dp_size: int, micro: int):
    config = make_data(loader=kind)
    expected, _ = stream(config, 1, 10, consumed=7)
    other = with_batch(config, micro_batch_size=micro)
    rows, ids = stream(other, dp_size, 10, consumed=7)
    assert np.array_equal(rows, expected)
    assert ids == list(range(7, 127))
    step = open_loader(Corpora.open(other), dp_rank=dp_size - 1, dp_size=dp_size).next_step()
    assert [tuple(b.tokens.shape) for b in step.batches] == [(micro, 11)] * (12 // dp_size // micro)
    assert step.target_count == 12 * 10


def blended(make_data: MakeData, tmp_path: Path, **options):
    """A run of two corpora and three phases, over more than two epochs of the smaller one."""
    config = make_data(n_train=6001, global_batch=576, micro_batch=1, seq_len=10, **options)
    rng = np.random.default_rng(5)
    tokens = {split: rng.integers(0, 500, 4001) for split in ("train", "validation")}
    write_shards(tmp_path / "other", tokens, 500)
    one, other = str(config.data.path), str(tmp_path / "other")
    changes = (
        PhaseChange(576 * 2, seq_len=7),
        PhaseChange(576 * 4, blend={one: 1.0, other: 3.0}, global_batch_size=1152),
    )
    return with_data(config, blend={one: 0.6, other: 0.4}, phases=changes)


def test_a_whole_epoch_has_one_hash_on_any_world(make_data: MakeData, tmp_path: Path):
    config = blended(make_data, tmp_path, loader="native", document_masks=True)
    steps = 8
    hashes = set()
    for dp_size in (1, 2, 3, 8, 64):
        for micro in (1, 3):
            digest = hashlib.sha256()
            other = with_batch(config, micro_batch_size=micro)
            loaders = [open_loader(Corpora.open(other), dp_rank=r, dp_size=dp_size) for r in range(dp_size)]
            taken = [take(loader, steps) for loader in loaders]
            assert {loader.consumed for loader in loaders} == {576 * 4 + 1152 * 4}
            for step in range(steps):
                for rank in taken:
                    for batch in rank[step]:
                        for sample, row, places in zip(*(batch[f] for f in FIELDS[:3]), strict=True):
                            digest.update(sample.tobytes() + row.tobytes() + places.tobytes())
            hashes.add(digest.hexdigest())
    assert len(hashes) == 1
    epochs = loaders[0].epochs()
    assert min(epochs.values()) > 1, epochs


@KINDS
def test_resumed_on_another_world_equals_uninterrupted(make_data: MakeData, tmp_path: Path, kind: str):
    config = blended(make_data, tmp_path, loader=kind, document_masks=True)
    expected = [np.concatenate([b["tokens"] for b in step]) for step in take(
        open_loader(Corpora.open(config), dp_rank=0, dp_size=1), 7)]  # fmt: skip
    rng = np.random.default_rng()
    for dp_size in (1, 2, 3, 8, 64) if kind == "native" else (1, 3):
        done = int(rng.integers(0, 7))
        other = with_batch(config, micro_batch_size=int(rng.choice([1, 3])))
        consumed = consumed_samples(other.phases, done)
        resumed = [
            take(open_loader(Corpora.open(other), dp_rank=r, dp_size=dp_size, consumed=consumed), 7 - done)
            for r in range(dp_size)
        ]
        for i, step in enumerate(expected[done:]):
            found = np.concatenate([batch["tokens"] for rank in resumed for batch in rank[i]])
            assert np.array_equal(found, step), (dp_size, done)


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_native_equals_numpy(make_data: MakeData, data: st.DataObject):
    dp_size, micro, accumulation = (data.draw(st.integers(1, 4)) for _ in range(3))
    config = make_data(
        data.draw(st.sampled_from([12, 101, 350])),
        vocab_size=data.draw(st.sampled_from([3, 300, 70_000])),
        seq_len=data.draw(st.integers(1, 11)),
        seed=data.draw(st.integers(0, 2**32 - 1)),
        global_batch=dp_size * micro * accumulation,
        micro_batch=micro,
        document_masks=data.draw(st.booleans()),
    )
    where = {
        "dp_rank": data.draw(st.integers(0, dp_size - 1)),
        "dp_size": dp_size,
        "consumed": data.draw(st.integers(0, 2**40)),
        "widen": data.draw(st.booleans()),
    }
    native = take(open_loader(Corpora.open(with_data(config, loader="native")), **where), 4)
    equal(native, take(open_loader(Corpora.open(config), **where), 4))


@pytest.mark.slow
@given(data=st.data())
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_native_equals_numpy_in_blends_and_phases(make_data: MakeData, tmp_path: Path, data: st.DataObject):
    config = blended(make_data, tmp_path, document_masks=data.draw(st.booleans()))
    dp_size = data.draw(st.sampled_from([1, 3, 64]))
    where = {"dp_rank": data.draw(st.integers(0, dp_size - 1)), "dp_size": dp_size}
    done = data.draw(st.integers(0, 9))
    where |= {"consumed": consumed_samples(config.phases, done), "widen": data.draw(st.booleans())}
    native = take(open_loader(Corpora.open(with_data(config, loader="native")), **where), 5)
    equal(native, take(open_loader(Corpora.open(config), **where), 5))


@KINDS
@pytest.mark.parametrize("vocab_size", [200, 500, 70_000])
def test_widened_tokens_are_the_same(make_data: MakeData, kind: str, vocab_size: int):
    config = make_data(vocab_size=vocab_size, loader=kind, document_masks=True)
    narrow = take(open_loader(Corpora.open(config), dp_rank=0, dp_size=1), 9)
    wide = take(open_loader(Corpora.open(config), dp_rank=0, dp_size=1, widen=True), 9)
    assert {batch["tokens"].dtype for step in wide for batch in step} == {np.dtype(np.int64)}
    for batch in (batch for step in narrow for batch in step):
        batch["tokens"] = batch["tokens"].astype(np.int64)
    equal(wide, narrow)


def test_huge_sample_numbers(make_data: MakeData):
    config = make_data()
    for consumed in (2**32 - 6, 2**53 + 1, 2**63 - 100):
        where = {"dp_rank": 0, "dp_size": 2, "consumed": consumed}
        native = open_loader(Corpora.open(with_data(config, loader="native")), **where)
        equal(take(native, 3), take(open_loader(Corpora.open(config), **where), 3))


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def test_threads_end(make_data: MakeData):
    config = make_data(loader="native", document_masks=True)
    before = threads()
    loader = open_loader(Corpora.open(config), dp_rank=0, dp_size=1)
    assert threads() > before
    loader.next_step()
    loader.close()
    loader.close()
    assert threads() == before
    with pytest.raises(RuntimeError, match="closed"):
        loader.next_step()
    unclosed = open_loader(Corpora.open(config), dp_rank=0, dp_size=1)
    unclosed.next_step()
    assert threads() > before
    del unclosed
    assert threads() == before, "they end with the loader, not when garbage is collected"


def test_a_step_stays_until_the_next_and_memory_is_reused(make_data: MakeData):
    config = make_data(loader="native", document_masks=True)
    twin = open_loader(Corpora.open(with_data(config, loader="numpy")), dp_rank=0, dp_size=1)
    loader = open_loader(Corpora.open(config), dp_rank=0, dp_size=1)
    places = set()
    for _ in range(100):
        step, expected = loader.next_step(), twin.next_step()
        torch.rand(1000).sum()  # time for the threads to go on
        for batch, other in zip(step.batches, expected.batches, strict=True):
            for name in FIELDS[:4]:
                assert torch.equal(getattr(batch, name), getattr(other, name)), name
        places.add(step.batches[0].tokens.data_ptr())
        starts = [batch.tokens.data_ptr() for batch in step.batches]
        assert starts == [starts[0] + i * 3 * 11 * 2 for i in range(4)]  # one piece of memory
    assert len(places) <= 16
    assert step.batches[0].tokens.dtype == torch.uint16
    assert step.batches[0].sample_ids.dtype == torch.int64
    loader.close()


@KINDS
def test_waiting_is_counted(make_data: MakeData, kind: str):
    config = make_data(loader=kind)
    loader = open_loader(Corpora.open(config), dp_rank=0, dp_size=1)
    assert loader.wait_seconds == 0
    loader.next_step()
    assert loader.wait_seconds > 0
    loader.close()


def refused(config, match: str, **ranks) -> None:
    arguments = {"dp_rank": 0, "dp_size": 1} | ranks
    with pytest.raises(InputError, match=match):
        open_loader(Corpora.open(config), **arguments)


@KINDS
def test_unfit_data_is_refused(make_data: MakeData, kind: str):
    config = make_data(loader=kind)
    refused(with_data(config, seq_len=1001), "has no sample of data.seq_len 1001")
    smaller = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=499))
    refused(smaller, "vocabulary of 500, model.vocab_size is 499")
    refused(config, "12 is not a multiple of 5", dp_size=5)
    refused(config, "rank 2 of 2", dp_rank=2, dp_size=2)
    refused(config, "-1 consumed", consumed=-1)
    folder = Path(config.data.path or "")
    manifest = read_manifest(folder)
    shards = manifest.splits["train"].shards
    shards = dataclasses.replace(shards, tokens=(1000,), bytes=(2000,))
    splits = manifest.splits | {"train": dataclasses.replace(manifest.splits["train"], tokens=1000, shards=shards)}
    dataclasses.replace(manifest, splits=splits).save(folder)
    refused(config, "1001.*1000|1000.*1001")
    manifest.save(folder)
    path = folder / "train.bin"
    path.write_bytes(path.read_bytes()[:-2])
    refused(config, "train.bin.*2000.*2002")


def test_corpora_of_other_widths_are_not_blended(make_data: MakeData, tmp_path: Path):
    config = make_data(vocab_size=500)
    header = np.zeros(256, "<i4")
    header[:3] = 20240801, 7, 100
    with (tmp_path / "wide.bin").open("wb") as file:
        file.write(header.tobytes() + np.arange(100, dtype="<u4").tobytes())
    mixed = with_data(config, blend={str(config.data.path): 1.0, str(tmp_path / "wide.bin"): 1.0})
    refused(mixed, "ids of one size")


def test_a_missing_extension_is_explained(make_data: MakeData, monkeypatch: pytest.MonkeyPatch):
    config = make_data(loader="native")
    real_import = builtins.__import__

    def without_native(name, globals=None, locals=None, fromlist=(), level=0):
        if name == "llm.data" and "_native" in (fromlist or ()):
            raise ImportError("no extension here")
        return real_import(name, globals, locals, fromlist, level)

    monkeypatch.setattr(builtins, "__import__", without_native)
    refused(config, "no extension here.*run make setup")


@KINDS
def test_what_a_loader_says_of_itself(make_data: MakeData, kind: str):
    config = make_data(loader=kind)
    loader = open_loader(Corpora.open(config), dp_rank=0, dp_size=1)
    loader.next_step()
    assert loader.consumed == 12
    assert loader.epochs()[config.data.path] == 0.12
    loader.close()

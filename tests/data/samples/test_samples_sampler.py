"""What steps hold beyond tokens: documents, packed samples, and what is taken for samples that cannot be read."""

from __future__ import annotations

import dataclasses
import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from conftest import MakeData

from llm.data.corpora import Corpora
from llm.data.loader import open_loader
from llm.data.prepare.plans import write_plans
from llm.data.tokens.hashes import file_entry
from llm.data.tokens.manifest import plan_name, read_manifest
from llm.errors import DamagedFile
from test_data_loader import KINDS, equal, file_tokens, take, with_batch, with_data


def step_of(config, dp_size: int = 1, consumed: int = 0):
    return [
        open_loader(Corpora.open(config), dp_rank=r, dp_size=dp_size, consumed=consumed).next_step()
        for r in range(dp_size)
    ]


@KINDS
def test_documents_of_chunks(make_data: MakeData, kind: str):
    config = make_data(vocab_size=5, loader=kind, document_masks=True)  # token 0 ends a document
    (step,) = step_of(config)
    assert step.target_count == 12 * 10
    for batch in step.batches:
        tokens, ids, starts = batch.tokens.numpy(), batch.position_ids.numpy(), batch.cu_seqlens.numpy()
        assert batch.counted is None
        expected = []
        for row in range(3):
            for t in range(10):
                begins = t == 0 or tokens[row, t - 1] == 0
                assert ids[row, t] == (0 if begins else ids[row, t - 1] + 1)
                expected += [row * 10 + t] if begins else []
        assert starts.tolist() == [*expected, 30]


@KINDS
def test_packed_samples_count_each_target_once(make_data: MakeData, kind: str):
    config = make_data(
        n_train=2000, vocab_size=12, loader=kind, document_masks=True, packing="best_fit", micro_batch=1, global_batch=1
    )
    write_plans(config)
    tokens = file_tokens(config, "train")
    ends = np.flatnonzero(tokens == 0) + 1
    documents = np.split(tokens, ends[ends < tokens.size])
    expected = sorted((int(a), int(b)) for d in documents for a, b in pairwise(d))
    loader = open_loader(Corpora.open(config), dp_rank=0, dp_size=1)
    pairs = []
    while loader.epochs()[config.data.path] < 1:
        step = loader.next_step()
        (batch,) = step.batches
        row, counted = batch.tokens.numpy()[0], batch.counted.numpy()[0].astype(bool)
        pairs += [(int(a), int(b)) for a, b in zip(row[:-1][counted], row[1:][counted], strict=True)]
        assert step.target_count == counted.sum()
    loader.close()
    assert sorted(pairs) == expected


@pytest.mark.parametrize(("dp_size", "micro"), [(1, 1), (2, 3), (6, 1)])
def test_packed_native_equals_numpy_on_any_world(make_data: MakeData, dp_size: int, micro: int):
    config = make_data(n_train=3000, vocab_size=20, document_masks=True, packing="best_fit")
    write_plans(config)
    config = with_batch(config, micro_batch_size=micro)
    counts = {step.target_count for step in step_of(config, dp_size)}
    whole = sum(int(batch.counted.sum()) for step in step_of(config, dp_size) for batch in step.batches)
    assert counts == {whole}
    for rank in range(dp_size):
        where = {"dp_rank": rank, "dp_size": dp_size, "consumed": 120, "widen": dp_size == 2}
        native = take(open_loader(Corpora.open(with_data(config, loader="native")), **where), 9)
        equal(native, take(open_loader(Corpora.open(config), **where), 9))


def test_a_missing_or_foreign_plan_is_refused(make_data: MakeData):
    config = make_data(document_masks=True, packing="best_fit")
    with pytest.raises(Exception, match="no packing plan for samples of 10 tokens"):
        step_of(config)
    other = make_data(n_train=900, document_masks=True, packing="best_fit")
    write_plans(other)
    name = plan_name("train", 10)
    os.replace(Path(other.data.path) / name, Path(config.data.path) / name)
    folder = Path(config.data.path)
    manifest = read_manifest(folder)
    dataclasses.replace(manifest, files=manifest.files | {name: file_entry(folder / name)}).save(folder)
    for kind in ("native", "numpy"):
        with pytest.raises(Exception, match="900"):
            step_of(with_data(config, loader=kind))


def run(loader, steps: int) -> None:
    for _ in range(steps):
        loader.next_step()


def damage(config, at: int) -> None:
    """Make the token at a place one that the vocabulary has not."""
    path = Path(config.data.path) / "train.bin"
    tokens = np.fromfile(path, "<u2")
    tokens[at] = 60_000
    tokens.tofile(path)


@KINDS
def test_a_damaged_sample_is_an_error_that_names_file_and_byte(make_data: MakeData, kind: str):
    config = make_data(loader=kind)
    damage(config, 555)
    loader = open_loader(Corpora.open(config), dp_rank=0, dp_size=1)
    with pytest.raises(DamagedFile, match=r"train.bin: the id at byte 1110 is 60000, expected ids below 500"):
        run(loader, 9)
    loader.close()


def test_skipped_samples_are_the_same_on_every_world_and_after_a_restart(make_data: MakeData):
    config = make_data(damaged="skip", micro_batch=1, document_masks=True)
    for at in (555, 707, 3):
        damage(config, at)
    expected = take(open_loader(Corpora.open(config), dp_rank=0, dp_size=1), 20)
    skipped = {}
    for kind in ("native", "numpy"):
        other = with_data(config, loader=kind)
        for dp_size in (1, 3):
            loaders = [open_loader(Corpora.open(other), dp_rank=r, dp_size=dp_size) for r in range(dp_size)]
            taken = [take(loader, 20) for loader in loaders]
            joined = [[batch for rank in taken for batch in rank[i]] for i in range(20)]
            equal(joined, expected)
            loaders = [open_loader(Corpora.open(other), dp_rank=r, dp_size=dp_size) for r in range(dp_size)]
            steps = [loader.next_step() for loader in loaders for _ in range(20)]
            assert {step.replaced_targets for step in steps} == {None}, "chunks have as many targets each"
            skipped[kind, dp_size] = sum(step.skipped_samples for step in steps)
            for loader in loaders:
                loader.close()
        resumed = open_loader(Corpora.open(other), dp_rank=0, dp_size=1, consumed=12 * 7)
        equal(take(resumed, 13), expected[7:])
    # 3 of 100 samples are damaged, each drawn 2 or 3 times in 240.
    assert len(set(skipped.values())) == 1
    assert 6 <= skipped["native", 1] <= 9
    assert max(int(batch["tokens"].max()) for step in expected for batch in step) < 500


def test_skipped_packed_samples_change_the_count_of_targets(make_data: MakeData):
    config = make_data(
        n_train=3000, vocab_size=20, document_masks=True, packing="best_fit", damaged="skip", micro_batch=1
    )
    write_plans(config)
    for at in range(5, 3000, 150):
        damage(config, at)
    expected = take(open_loader(Corpora.open(config), dp_rank=0, dp_size=1), 20)
    changes = set()
    for kind in ("native", "numpy"):
        other = with_data(config, loader=kind)
        for dp_size in (1, 3):
            loaders = [open_loader(Corpora.open(other), dp_rank=r, dp_size=dp_size) for r in range(dp_size)]
            skipped = 0
            for i in range(20):
                steps = [loader.next_step() for loader in loaders]
                batches = [batch for step in steps for batch in step.batches]
                assert all(np.array_equal(a.tokens, b["tokens"]) for a, b in zip(batches, expected[i], strict=True))
                (plan,) = {step.target_count for step in steps}
                change = sum(step.replaced_targets for step in steps)
                assert plan + change == sum(int(batch.counted.sum()) for batch in batches)
                changes.add(change)
                skipped += sum(step.skipped_samples for step in steps)
            assert skipped > 10
            for loader in loaders:
                loader.close()
        equal(take(open_loader(Corpora.open(other), dp_rank=0, dp_size=1, consumed=12 * 7), 13), expected[7:])
    assert min(changes) < 0 < max(changes)


@KINDS
def test_a_corpus_of_damaged_samples_ends(make_data: MakeData, kind: str):
    config = make_data(damaged="skip", loader=kind)
    (Path(config.data.path) / "train.bin").unlink()
    loader = open_loader(Corpora.open(config), dp_rank=0, dp_size=1)
    with pytest.raises(DamagedFile, match=r"train.bin"):
        loader.next_step()
    loader.close()


@KINDS
def test_a_file_cut_while_in_use_is_noticed(make_data: MakeData, kind: str):
    config = make_data(n_train=200_001, loader=kind)
    loader = open_loader(Corpora.open(config), dp_rank=0, dp_size=1)
    loader.next_step()
    os.truncate(Path(config.data.path) / "train.bin", 50_000)
    with pytest.raises(DamagedFile, match=r"train.bin: was cut to 50000 bytes while in use"):
        run(loader, 100)
    loader.close()

"""The loader benchmark: the tokens that it makes, the checks that it trusts, what it counts, how it goes on."""

from __future__ import annotations

import importlib.util
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.loader import runner, server
from benchmarks.loader.cases import FULL, Case, parts
from benchmarks.loader.check import check, documents_of
from benchmarks.loader.gather import Gather
from benchmarks.loader.process import Memory, drop, populate, warm
from benchmarks.loader.runner import Runner
from benchmarks.loader.system import Batch
from benchmarks.loader.systems import NEEDS, SYSTEMS, build, runs
from benchmarks.loader.tokens import TokenSet
from llm.data.tokens.megatron import read_index
from llm.errors import InputError

MACHINE = {"cpu": "a"}


@pytest.fixture(scope="module")
def distinct(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TokenSet]:
    folder = tmp_path_factory.mktemp("tokens")
    sets = {item: TokenSet(folder / item, item, 60_000, kind="distinct") for item in ("uint16", "uint32")}
    for tokens in sets.values():
        tokens.make()
    return sets


@pytest.mark.parametrize("item", ["uint16", "uint32"])
@pytest.mark.parametrize("kind", ["random", "distinct"])
def test_tokens_are_valid_pairs_of_files(tmp_path: Path, item: str, kind: str) -> None:
    tokens = TokenSet(tmp_path / "t", item, 50_003, shards=3, kind=kind)
    tokens.make()
    assert sum(tokens.sizes) == 50_003
    place = 0
    for shard, size in enumerate(tokens.sizes):
        ids, index = tokens.read(shard), read_index(tokens.path(shard).with_suffix(""))
        assert (index.tokens, index.dtype) == (size, {"uint16": "uint16", "uint32": "int32"}[item])
        ends = np.cumsum(index.lengths)
        assert np.array_equal(np.flatnonzero(ids == tokens.eod_id)[: ends.size - 1] + 1, ends[:-1])
        assert ids.size == ends[-1] and ids.max() < tokens.vocab_size
        if kind == "distinct":
            inside = np.setdiff1d(np.arange(size), ends - 1)
            assert np.array_equal(ids[inside] - ids[0], inside)
            assert ids[0] == {"uint16": 1, "uint32": 100_000}[item] + place
        place += size


def test_tokens_of_an_interrupted_run_are_made_again(tmp_path: Path) -> None:
    tokens = TokenSet(tmp_path / "t", "uint16", 1000)
    tokens.make()
    before = tokens.path(0).read_bytes()
    (tmp_path / "t/made").unlink()
    tokens.path(0).write_bytes(b"half")
    tokens.make()
    assert tokens.path(0).read_bytes() == before
    tokens.path(0).write_bytes(b"kept")
    tokens.make()
    assert tokens.path(0).read_bytes() == b"kept"


@pytest.mark.parametrize("item", ["uint16", "uint32"])
@pytest.mark.parametrize("form", ["native", "int64"])
@pytest.mark.parametrize("with_documents", [False, True])
def test_the_c_loop_copies_rows_of_the_corpus(
    distinct: dict[str, TokenSet], item: str, form: str, with_documents: bool
) -> None:
    gather, case, tokens = Gather(form), Case("check", item, 1000, with_documents), distinct[item]
    gather.prepare(tokens, 1000)
    batches = gather.open(tokens, case)
    first = next(batches).inputs.clone()
    assert first.dtype == {"native": getattr(torch, item), "int64": torch.int64}[form]
    second = next(batches).inputs
    assert not torch.equal(first.long(), second.long())
    ids, rows = tokens.read(0).astype(np.int64), first.numpy().astype(np.int64)
    row = rows[0][:1000]
    assert any(np.array_equal(ids[start : start + 1000], row) for start in range(0, 59_000, 1000))
    assert check("random", tokens, case, gather.open(tokens, case)) is None


# tests/benchmarks/loader/test_benchmarks_loader_report.py runs the others
@pytest.mark.parametrize("name", ["nanoGPT", *NEEDS])
def test_every_loader_that_is_installed_gives_right_batches(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name in NEEDS:
        packages = {"torchdata": "torchdata", "MosaicML": "streaming", "litdata": "litdata"}
        if importlib.util.find_spec(packages.get(name, "megatron")) is None:
            pytest.skip(f"not installed: {NEEDS[name]}")
    monkeypatch.setattr(runner, "QUICK_SYSTEMS", tuple(SYSTEMS))
    records = list(Runner(tmp_path, quick=True, only=f"^{name} check uint16 T=1024").run(MACHINE))
    assert records
    assert not [record for record in records if record.keys() & {"wrong", "error", "absent"}]


def documents(inputs: np.ndarray, eod_id: int) -> dict[str, torch.Tensor]:
    position_ids, starts = documents_of(inputs, eod_id)
    return {"position_ids": torch.from_numpy(position_ids), "cu_seqlens": torch.from_numpy(starts)}


def right(tokens: TokenSet, case: Case) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and labels of a shuffled epoch."""
    T, ids = case.seq_len, torch.from_numpy(tokens.read(0).astype(np.int64))
    for places in torch.randperm((tokens.tokens - 1) // T).split(case.rows):
        rows = torch.stack([ids[place * T : place * T + T + 1] for place in places.tolist()])
        yield rows[:, :-1].clone(), rows[:, 1:].clone()


def changed(tokens: TokenSet, case: Case, change) -> str | None:
    """What check() says of right batches after `change(number, inputs, labels)`."""

    def batches():
        for number, (inputs, labels) in enumerate(right(tokens, case)):
            more = documents(inputs.numpy(), tokens.eod_id) if case.documents else {}
            change(number, inputs, labels, more)
            yield Batch(inputs, labels, **more)

    return check("overlap", tokens, case, batches())


def test_what_is_wrong_with_batches_is_seen(distinct: dict[str, TokenSet]) -> None:
    tokens, case = distinct["uint32"], Case("check", "uint32", 500, documents=True)
    assert changed(tokens, case, lambda *_: None) is None

    def labels(number, inputs, labels, more):
        labels[1, 3] += 1

    def repeats(number, inputs, labels, more):
        if number == 2:
            inputs[3], labels[3] = inputs[1], labels[1]
            more |= documents(inputs.numpy(), tokens.eod_id)

    def mixes(number, inputs, labels, more):
        inputs[0, 250:], labels[0, 249:] = inputs[1, 250:], labels[1, 249:]
        more |= documents(inputs.numpy(), tokens.eod_id)

    def foreign(number, inputs, labels, more):
        inputs += 10**6
        labels += 10**6
        more |= documents(inputs.numpy(), tokens.eod_id)

    def positions(number, inputs, labels, more):
        more["position_ids"][2, 7] += 1

    def starts(number, inputs, labels, more):
        more["cu_seqlens"] = more["cu_seqlens"][1:]

    def shapes(number, inputs, labels, more):
        inputs.resize_(2, 1000)

    expected = {
        labels: "the labels are not",
        repeats: "tokens come twice",
        mixes: "not one run",
        foreign: "not of the corpus",
        positions: "position ids",
        starts: "cu_seqlens",
        shapes: "expected (4, 500)",
    }
    for change, words in expected.items():
        assert words in (changed(tokens, case, change) or ""), change.__name__


def test_rows_of_shuffled_documents_are_checked_piece_by_piece(distinct: dict[str, TokenSet]) -> None:
    tokens, case = distinct["uint16"], Case("check", "uint16", 1000)
    ids = tokens.read(0).astype(np.int64)
    ends = np.flatnonzero(ids == 0) + 1
    pieces = np.split(ids, ends[:-1])
    stream = np.concatenate([pieces[i] for i in np.random.default_rng(1).permutation(len(pieces))])

    def said(stream: np.ndarray) -> str | None:
        rows = [torch.from_numpy(stream[i * 1000 : i * 1000 + 1001].copy()) for i in range((stream.size - 1) // 1000)]
        batches = (torch.stack(rows[i : i + 4]) for i in range(0, len(rows), 4))
        return check("documents", tokens, case, (Batch(batch[:, :-1], batch[:, 1:]) for batch in batches))

    assert said(stream) is None
    inside = next(place for place in np.flatnonzero(stream == 0).tolist() if 10 < place % 1000 < 990)
    for place, value, words in (
        (inside + 1, stream[inside + 1] + 1, "no document begins"),
        (inside - 5, stream[inside - 5] + 1, "something else than runs"),
        (inside - 1, 0, "ends early"),
    ):
        wrong = stream.copy()
        wrong[place] = value
        assert words in (said(wrong) or ""), words
    whole = int(np.flatnonzero(stream[:20_000] == 0)[-1]) + 1
    assert "twice" in (said(np.tile(stream[:whole], 3)) or "")


def test_memory_is_counted_from_the_beginning() -> None:
    kept = np.ones(5_000_000)
    memory = Memory()
    assert memory.taken()["peak_mb"] < 5
    block = np.ones(5_000_000)
    assert 38 < memory.taken()["anonymous_mb"] < 60
    del block
    assert memory.taken()["anonymous_mb"] < 5 < 38 < memory.taken()["peak_mb"] and len(kept)


def test_files_are_warmed_and_dropped(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(8 << 20))
    os.sync()
    drop([path])
    with path.open("rb") as file:
        if cached(file.fileno(), 8 << 20):
            pytest.skip("this file system keeps no page cache that can be dropped")
        warm([path])
        assert cached(file.fileno(), 8 << 20)


def cached(file: int, size: int) -> bool:
    """Whether a look every MB finds the file in the page cache."""
    byte = bytearray(1)
    try:
        return all(os.preadv(file, [byte], offset, os.RWF_NOWAIT) for offset in range(0, size, 1 << 20))
    except OSError:  # it would have to wait for the disk
        return False


def test_mapped_files_are_put_into_the_page_table(tmp_path: Path) -> None:
    path = tmp_path / "in/file"
    path.parent.mkdir()
    path.write_bytes(bytes(32 << 20))

    def grown(folder: Path) -> float:
        array = np.memmap(path, "u1", "r")
        memory = Memory()
        populate(folder)
        del array
        return memory.taken()["peak_mb"]

    assert grown(tmp_path / "in") > 30 > 5 > grown(tmp_path / "other")


def test_a_fork_answers_fails_dies_or_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: object) -> dict:
        raise RuntimeError("cannot\nmore")

    actions = {
        "answer": lambda name, case, scale, folder: {"name": name, "T": case.seq_len, "whole": scale is FULL},
        "fail": fail,
        "die": lambda *_: os._exit(3),
        "hang": lambda *_: time.sleep(60),
    }
    monkeypatch.setattr(server, "ACTIONS", actions)
    # Its second descriptor to watch is standard input, on which nothing comes.
    reading, writing = os.pipe()
    kept = os.dup(0)
    os.dup2(reading, 0)
    try:
        request = {"system": "s", "case": asdict(Case("rate", "uint16", 8)), "quick": False, "patience": 0.5}
        found = {action: server.in_fork(request | {"action": action}, tmp_path) for action in actions}
        os.close(writing)  # whoever asked is gone
        began = time.monotonic()
        assert "error" in server.in_fork(request | {"action": "hang", "patience": 50.0}, tmp_path)
        assert time.monotonic() - began < 20
    finally:
        os.dup2(kept, 0)
        os.close(kept)
        os.close(reading)
    assert found["answer"] == {"name": "s", "T": 8, "whole": True}
    assert found["fail"] == {"error": "RuntimeError: cannot"}
    assert found["die"] == {"error": "it ended with status 768"}
    assert found["hang"] == {"error": "it took more than 0 s"}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(loader, label) of every measurement that a Runner asks for; nothing is measured."""
    asked = []

    def ask(self: Runner, name: str, action: str, case: Case, patience: float) -> dict:
        if action == "measure":
            asked.append((name, case.label))
        if name == "nanoGPT" and case.task == "check":
            return {"wrong": "all of it"} if action == "measure" and case.documents else {}
        return {"tokens_s": 1.0}

    monkeypatch.setattr(Runner, "_ask", ask)
    monkeypatch.setattr(TokenSet, "make", lambda self: None)
    monkeypatch.setattr(runner, "QUICK_SYSTEMS", ("Ingot", "C gather", "nanoGPT"))
    return asked


def test_loaders_take_turns_and_wrong_ones_are_left_out(asked: list[tuple[str, str]], tmp_path: Path) -> None:
    list(Runner(tmp_path, quick=True).run(MACHINE))
    plain = [name for name, label in asked if label == "rate uint16 T=1024"]
    assert plain == ["Ingot", "C gather", "nanoGPT", "C gather", "nanoGPT", "Ingot"]
    with_documents = [name for name, label in asked if label == "rate uint16 T=1024 documents"]
    assert sorted(with_documents) == ["C gather", "C gather", "Ingot", "Ingot"]
    assert asked.index(("Ingot", "check uint16 T=1024 documents")) < asked.index(("Ingot", "rate uint16 T=1024"))


def test_a_run_goes_on_where_it_was_stopped(asked: list[tuple[str, str]], tmp_path: Path) -> None:
    records = Runner(tmp_path, quick=True).run(MACHINE)
    for _ in range(12):
        next(records)
    records.close()
    list(Runner(tmp_path, quick=True).run(MACHINE))
    once = list(asked)
    assert sum(count > 1 for count in map(once.count, once)) > 0  # the rounds
    asked.clear()
    again = Runner(tmp_path, quick=True)
    assert not list(again.run(MACHINE))
    assert not asked
    assert len(again.records) == len(once)
    with pytest.raises(InputError, match="another machine or of a quick run"):
        list(Runner(tmp_path, quick=True).run({"cpu": "b"}))
    with pytest.raises(InputError, match="another machine or of a quick run"):
        list(Runner(tmp_path, quick=False).run(MACHINE))
    (tmp_path / "results.jsonl").write_text('{"run": {}}\n{"broken')
    with pytest.raises(InputError, match="is damaged"):
        list(Runner(tmp_path, quick=True).run(MACHINE))


def test_every_part_has_its_rounds(asked: list[tuple[str, str]], tmp_path: Path) -> None:
    list(Runner(tmp_path / "a", quick=True, rounds=1).run(MACHINE))
    assert asked.count(("Ingot", "rate uint16 T=1024")) == 1
    assert len(asked) == len(set(asked))
    assert any("cold" in label for _, label in asked) and any("start" in label for _, label in asked)
    asked.clear()
    list(Runner(tmp_path / "b", quick=True, rounds=4, only="Ingot rate").run(MACHINE))
    assert asked.count(("Ingot", "rate uint16 T=1024")) == 4
    assert all(name == "Ingot" and label.startswith("rate") for name, label in asked)
    with pytest.raises(InputError, match="--only 'nothing' is found in no"):
        list(Runner(tmp_path / "c", quick=True, only="nothing").run(MACHINE))


def test_a_loader_that_is_not_there_is_asked_once(
    asked: list[tuple[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = []
    monkeypatch.setattr(Runner, "_ask", lambda *a: answers.append(a) or {"absent": "ModuleNotFoundError: no"})
    records = list(Runner(tmp_path, quick=True).run(MACHINE))
    assert [record["absent"] for record in records] == ["ModuleNotFoundError: no"] * 3
    assert len(answers) == 3
    monkeypatch.undo()  # installed meanwhile
    monkeypatch.setattr(Runner, "_ask", lambda *a: {"tokens_s": 1.0})
    monkeypatch.setattr(TokenSet, "make", lambda self: None)
    records = list(Runner(tmp_path, quick=True, only="^Ingot check").run(MACHINE))
    assert any("tokens_s" in record for record in records)


def test_what_is_asked_of_whom() -> None:
    def takers(**case: object) -> set[str]:
        return {
            name for name in SYSTEMS if runs(name, Case(**({"task": "rate", "item": "uint16", "seq_len": 1024} | case)))
        }

    assert takers() == set(SYSTEMS)
    assert takers(documents=True) == {"Ingot", "Ingot int64", "C gather", "C gather int64", "Megatron"}
    start = {"Ingot", "Megatron", "torchdata", "MosaicML", "litdata"}
    assert takers(task="start") == start | {"nanoGPT"}
    assert takers(task="start", shards=1000) == takers(task="start", resume=True) == start
    assert takers(task="start", huge=True) == {"Ingot"}
    labels = [case.label for _, cases in parts(FULL) for case in cases]
    assert len(set(labels)) == len(labels)


def test_the_names_are_those_of_classes() -> None:
    for name in SYSTEMS:
        if name not in NEEDS:
            assert build(name)
    assert json.dumps(asdict(Case("rate", "uint16", 8)))

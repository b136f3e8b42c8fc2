"""The corpora of a checkpoint, found again by what they hold: samples stay the same, whatever folders are called."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import write_shards
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.config import DataConfig, PhaseChange, RunConfig, TrainConfig
from llm.data import _native
from llm.data.corpora import Corpora, Known, blends_of
from llm.data.identity import in_saved_order, known_corpora
from llm.data.samples.schedule import corpus_names
from llm.data.tokens import hashes
from llm.data.tokens.hashes import sampled_hash
from llm.data.tokens.manifest import Manifest
from llm.errors import InputError
from llm.typed import read

G, T, PHASE = 4, 8, 40
Blend = dict[str, float]


@dataclass(frozen=True)
class Content:
    """A corpus whose content is a number."""

    number: int
    manifest = None

    @property
    def digest(self) -> str:
        return f"content {self.number}"

    @property
    def shards(self) -> SimpleNamespace:
        return SimpleNamespace(n_tokens=200 + 24 * self.number)

    def is_known_as(self, digest: str) -> bool:
        return digest == self.digest


def opened(blends: list[Blend], contents: dict[str, int]) -> Corpora:
    """The corpora of a run whose phases of 40 samples have these blends, as Corpora.open() leaves them."""
    phases = tuple(PhaseChange(PHASE * i, blend=blend) for i, blend in enumerate(blends) if i)
    data = DataConfig(path="p", seq_len=T, blend=blends[0], phases=phases)
    config = RunConfig(data=data, train=TrainConfig(global_batch_size=G, micro_batch_size=G))
    training = {name: Content(contents[name]) for name in corpus_names(blends_of(config))}
    made: Any = (config, Path("p"), SimpleNamespace(tokenizer_sha256="t"), training, {name: name for name in training})
    return Corpora(*made)


def resumed(before: Corpora, after: Corpora) -> Corpora:
    """`after` in the order of a checkpoint of `before`."""
    state = json.loads(json.dumps(before.identity()))
    return in_saved_order(after, before.config, known_corpora(before.config, state))


def samples(corpora: Corpora) -> tuple[Any, ...]:
    """What every sample of the run follows from: the phases, and what the corpora hold by their numbers."""
    drawn = corpora.curriculum(_native.BlendTable)
    assert list(drawn.names) == list(corpora.training)
    return drawn.phases, [corpora.training[name].digest for name in drawn.names]


@st.composite
def runs(draw: st.DrawFn) -> tuple[list[Blend], dict[str, int]]:
    """The blends of one to three phases, and what each corpus holds: now and then two the same."""
    contents = dict(zip("abcde", draw(st.lists(st.integers(0, 6), min_size=5, max_size=5)), strict=True))
    weights = st.sampled_from([1.0, 2.0, 3.0])
    return draw(
        st.lists(st.dictionaries(st.sampled_from("abcde"), weights, min_size=1), min_size=1, max_size=3)
    ), contents


@given(run=runs(), data=st.data())
@settings(max_examples=150, deadline=None)
def test_no_name_changes_a_sample(run: tuple[list[Blend], dict[str, int]], data: st.DataObject):
    blends, contents = run
    before = opened(blends, contents)
    expected = samples(before)
    for _ in range(2):  # a run may be moved again, and what it was called at first stays
        names = data.draw(st.permutations([*"abcde", "zz", "a/", "/x"]))
        moved = dict(zip(before.training, names, strict=False))
        blends = [{moved[name]: weight for name, weight in blend.items()} for blend in before.blends]
        after = resumed(before, opened(blends, {moved[name]: corpus.number for name, corpus in contained(before)}))
        assert samples(after) == expected
        assert set(after.first_names.values()) == set(before.first_names.values())
        before = after


def contained(corpora: Corpora) -> list[tuple[str, Any]]:
    return list(corpora.training.items())


def test_without_names_the_order_would_be_another():
    before = opened([{"a": 1.0, "b": 2.0}], {"a": 1, "b": 2})
    swapped = opened([{"b": 1.0, "a": 2.0}], {"a": 2, "b": 1})
    assert samples(swapped) != samples(before) == samples(resumed(before, swapped))


def test_a_later_phase_may_bring_corpora_under_names_that_were_taken():
    before = opened([{"a": 1.0, "b": 1.0}], {"a": 1, "b": 2})
    added = [{"z": 1.0, "b": 1.0}, {"a": 1.0, "z": 1.0, "b": 1.0}]  # `a` lies at z now, and another corpus at `a`
    after = resumed(before, opened(added, {"a": 3, "b": 2, "z": 1}))
    assert after.first_names == {"z": "a", "b": "b", "a": "a'"}
    assert samples(after)[0][:1] == samples(before)[0]
    again = resumed(after, opened([{"a": 1.0, "b": 1.0}, {"z": 1.0, "a": 1.0, "b": 1.0}], {"a": 1, "b": 2, "z": 3}))
    assert samples(again) == samples(after)


def test_phases_that_are_added_before_anything_moved_change_no_order():
    blends = [{"b": 1.0, "d": 1.0}, {"a": 1.0, "b": 1.0, "c": 2.0, "d": 1.0}]
    contents = {"a": 1, "b": 2, "c": 3, "d": 4}
    after = resumed(opened(blends[:1], contents), opened(blends, contents))
    assert samples(after) == samples(opened(blends, contents))


def test_copies_keep_the_weights_that_they_had():
    before = opened([{"a": 1.0, "b": 3.0}, {"a": 3.0, "b": 1.0}], {"a": 1, "b": 1})
    after = resumed(before, opened([{"y": 1.0, "x": 3.0}, {"y": 3.0, "x": 1.0}], {"x": 1, "y": 1}))
    assert after.first_names == {"x": "b", "y": "a"}
    later = resumed(before, opened([{"y": 1.0, "x": 3.0}, {"y": 9.0, "x": 1.0}], {"x": 1, "y": 1}))
    assert later.first_names == {"x": "b", "y": "a"}


def test_what_lost_its_content_keeps_its_place_so_that_it_can_be_named():
    before = resumed(opened([{"a": 1.0}], {"a": 1}), opened([{"q": 1.0}], {"q": 1}))
    assert before.first_names == {"q": "a"}
    assert resumed(before, opened([{"q": 1.0}], {"q": 9})).first_names == {"q": "a"}


def test_the_state_of_0_1_0_is_read():
    saved = opened([{"two": 1.0, "p": 1.0}], {"two": 1, "p": 2}).config
    state = {
        "tokenizer": "t",
        "train": "content 2",
        "two": "content 1",
        "train train.8.plan": "x",
        "two train.9.plan": "y",
    }
    assert known_corpora(saved, state) == {
        "p": Known("p", "content 2", {"train.8.plan": "x"}),
        "two": Known("two", "content 1", {}),
    }
    before = opened([{"two": 1.0, "p": 1.0}], {"two": 1, "p": 2})
    after = in_saved_order(opened([{"a": 1.0, "b": 1.0}], {"a": 1, "b": 2}), saved, known_corpora(saved, state))
    assert samples(after) == samples(before)
    with pytest.raises(InputError, match=r"data\.corpora\.a: found 3; expected"):
        known_corpora(saved, {"corpora": {"a": 3}})


def test_files_without_a_manifest_that_0_1_0_knew_by_their_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    tokens = np.arange(300) % 50
    write_shards(Path("one"), {"train": tokens, "validation": tokens}, 50)
    tokens.astype("<u2").tofile("bare.bin")
    config = RunConfig(data=DataConfig(path="one", seq_len=8, blend={"bare.bin": 1.0}))
    config = replace(config, model=replace(config.model, vocab_size=50))
    corpus = Corpora.open(config).training["bare.bin"]
    for tokens, same in ((300, True), (301, False)):
        sizes = "sizes " + hashlib.sha256("\n".join(["raw", "uint16", "0", str(tokens)]).encode()).hexdigest()
        assert corpus.is_known_as(sizes) == same
    one = replace(config, data=replace(config.data, blend=None))
    own, manifest = Corpora.open(one).training["one"], json.loads(Path("one/manifest.json").read_text())
    (sha256,) = read(Manifest, manifest, "").splits["train"].shards.sha256
    assert own.digest == hashlib.sha256("\n".join(["megatron", "uint16", "0", sha256]).encode()).hexdigest()


def test_a_sampled_hash_sees_the_ends_sizes_and_order_and_any_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hashes, "BLOCKS", 4)
    monkeypatch.setattr(hashes, "BLOCK_BYTES", 10)
    content = np.random.default_rng(0).integers(0, 256, 1000).astype(np.uint8)
    path = tmp_path / "a"
    content.tofile(path)
    before = sampled_hash([str(path)])
    read_bytes = {at + i for at in (0, 330, 660, 990) for i in range(10)}
    for byte in sorted(read_bytes | {*range(0, 1000, 9)}):
        changed = content.copy()
        changed[byte] ^= 1
        changed.tofile(path)
        assert (sampled_hash([str(path)]) != before) == (byte in read_bytes), byte
    content[:-1].tofile(path)
    assert sampled_hash([str(path)]) != before
    for n in (1000, 1001):  # of zeros alone the blocks are the same
        np.zeros(n, np.uint8).tofile(tmp_path / f"{n}")
    assert sampled_hash([f"{tmp_path}/1000"]) != sampled_hash([f"{tmp_path}/1001"])
    content[:500].tofile(tmp_path / "b")
    content[500:].tofile(tmp_path / "c")
    both = [str(tmp_path / name) for name in "bc"]
    assert len({before, sampled_hash(both), sampled_hash(both[::-1])}) == 3
    with pytest.raises(InputError, match="d cannot be read"):
        sampled_hash([str(tmp_path / "d")])


@pytest.mark.parametrize(
    ("files", "blocks", "length"), [(1, 64, 65536), (16, 64, 65536), (64, 16, 65536), (2000, 2, 16777)]
)
def test_a_sampled_hash_reads_a_bounded_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files, blocks, length):
    path, found = tmp_path / "a", list[int]()
    with path.open("wb") as file:
        file.truncate(1 << 30)
    monkeypatch.setattr(hashes.os, "pread", lambda descriptor, count, offset: found.append(count) or b"")
    sampled_hash([str(path)] * files)
    assert (len(found), set(found)) == (files * blocks, {length})
    assert sum(found) <= 1 << 26

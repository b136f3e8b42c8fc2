"""The training corpora that a config names: found, fitting together, told apart."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import write_shards

from llm.config import DataConfig, ModelConfig, PhaseChange, RunConfig
from llm.data.corpora import data_identity, hashed_files, packing_plan, training_corpora
from llm.data.tokens.folder import copy_folder, data_folder, load_manifest
from llm.data.tokens.manifest import file_entry, plan_name, read_manifest
from llm.errors import InputError

URL = "memory://somewhere/corpus"


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs beside the prepared folders `one` and `two`, whose tokens differ."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("one", "two")):
        write_tokens(Path(name), seed)


def write_tokens(folder: Path, seed: int, vocab_size: int = 500) -> None:
    tokens = np.random.default_rng(seed).integers(0, vocab_size, 300)
    write_shards(folder, {"train": tokens[:200], "validation": tokens[200:]}, vocab_size)


def make_config(vocab_size: int = 500, **data) -> RunConfig:
    return RunConfig(model=ModelConfig(vocab_size=vocab_size), data=DataConfig(**{"path": "one", "seq_len": 16} | data))


def test_a_folder_alone():
    config = make_config()
    manifest = load_manifest(config)
    assert training_corpora(config, manifest) == {"one": manifest.shard_list(Path("one"), "train")}
    assert list(data_identity(config, manifest)) == ["tokenizer", "train"]


def test_every_corpus_of_every_phase():
    shutil.copytree("two", "three")
    phases = (PhaseChange(samples=32, blend={"three": 1.0, "one": 2.0}),)
    config = make_config(blend={"two": 1.0, "one": 1.0}, phases=phases)
    found = training_corpora(config, load_manifest(config))
    assert list(found) == ["one", "two", "three"]
    for name, shards in found.items():
        assert shards == read_manifest(Path(name)).shard_list(Path(name), "train", name)


def test_token_files_without_a_manifest():
    np.arange(300, dtype="<u2").tofile("a.bin")
    np.arange(200, dtype="<u2").tofile("b.bin")
    config = make_config(blend={"?.bin": 1.0, "one": 1.0})
    manifest = load_manifest(config)
    found = training_corpora(config, manifest)["?.bin"]
    assert (found.format, found.dtype, found.paths, found.tokens) == ("raw", "uint16", ("a.bin", "b.bin"), (300, 200))
    assert (found.vocab_size, found.eod_id) == (500, 0)
    before = data_identity(config, manifest)
    assert before["?.bin"].startswith("sizes ")
    np.arange(201, dtype="<u2").tofile("b.bin")
    assert data_identity(config, manifest)["?.bin"] != before["?.bin"]
    with pytest.raises(InputError, match=r"\?\.bin have no manifest.*register them.*data\.verify=none"):
        hashed_files(config, manifest)


def test_a_remote_corpus_is_read_from_its_copy():
    config = make_config(path=URL, cache="copies")
    with pytest.raises(InputError, match=r"holds no prepared data; run python launch/prepare_data\.py"):
        load_manifest(config)
    shutil.copytree("two", data_folder(config))
    assert data_folder(config).parent == Path("copies")
    shards = training_corpora(config, load_manifest(config))[URL]
    assert (shards.name, shards.paths) == (URL, (f"{data_folder(config)}/train.bin",))

    config = make_config(blend={URL: 1.0}, cache="elsewhere")
    with pytest.raises(InputError, match=f"elsewhere holds no copy of {URL}; run python"):
        training_corpora(config, load_manifest(config))


def test_copies_have_names_of_their_own():
    config = make_config(cache="cache")
    urls = [
        "s3://bucket/a",
        "s3://bucket/b",
        "gs://bucket/a",
        "https://me:secret@host/a?key=secret",
        f"s3://{'x' * 999}",
    ]
    names = [copy_folder(config, url).name for url in urls]
    assert len(set(names)) == len(urls)
    assert all(len(name) < 80 and "secret" not in name and "/" not in name for name in names)
    assert names[0].startswith("s3-bucket-a-")
    assert copy_folder(config, "s3://bucket/a/").name == names[0]


def test_corpora_must_fit_together():
    config = make_config(blend={"one": 1.0, "two": 1.0})
    manifest = load_manifest(config)
    other = read_manifest(Path("two"))
    for changes, message in [
        ({"tokenizer_sha256": "1"}, "two and one were tokenised differently: tokenizer_sha256 1 and"),
        ({"eod_id": 1}, "eod_id 1 and 0; prepare them with the same data.tokenizer"),
    ]:
        dataclasses.replace(other, **changes).save(Path("two"))
        with pytest.raises(InputError, match=message):
            training_corpora(config, manifest)
    shutil.rmtree("two")
    write_tokens(Path("two"), 1, vocab_size=501)
    with pytest.raises(InputError, match="vocab_size 501 and 500"):
        training_corpora(config, manifest)


def test_identity_follows_the_contents_alone():
    config = make_config(blend={"one": 1.0, "two": 1.0})
    manifest = load_manifest(config)
    before = data_identity(config, manifest)
    assert sorted(before) == ["tokenizer", "train", "two"]
    Path("one").rename("moved")
    moved = make_config(path="moved", blend={"moved": 1.0, "two": 1.0})
    assert data_identity(moved, load_manifest(moved)) == before
    write_tokens(Path("two"), 7)
    after = data_identity(moved, load_manifest(moved))
    assert {name for name in before if before[name] != after[name]} == {"two"}

    own = load_manifest(moved)
    read_otherwise = dataclasses.replace(own.splits["train"].shards, format="raw")
    split = dataclasses.replace(own.splits["train"], shards=read_otherwise)
    otherwise = dataclasses.replace(own, splits=own.splits | {"train": split})
    assert data_identity(moved, otherwise)["train"] != after["train"]


def add_plan(folder: Path, seq_len: int, contents: str) -> None:
    manifest, name = read_manifest(folder), plan_name("train", seq_len)
    (folder / name).write_text(contents)
    dataclasses.replace(manifest, files=manifest.files | {name: file_entry(folder / name)}).save(folder)


def test_packing_plans():
    config = make_config(packing="best_fit", document_masks=True)
    shards = training_corpora(config, load_manifest(config))["one"]
    with pytest.raises(InputError, match="one has no packing plan for samples of 16 tokens; run python launch/prepare"):
        packing_plan(shards, 16)
    add_plan(Path("one"), 16, "plan")
    add_plan(Path("one"), 32, "of no phase")
    manifest = load_manifest(config)
    assert packing_plan(training_corpora(config, manifest)["one"], 16) == "one/train.16.plan"
    before = data_identity(config, manifest)
    assert list(before) == ["tokenizer", "train", "train train.16.plan"]
    add_plan(Path("one"), 16, "another")
    assert {key for key, value in data_identity(config, load_manifest(config)).items() if value != before[key]} == {
        "train train.16.plan"
    }
    assert list(hashed_files(config, manifest)) == ["one/train.bin", "one/train.16.plan"]
    assert "train train.16.plan" not in data_identity(make_config(), manifest)


def test_hashed_files_are_those_of_training():
    config = make_config(blend={"one": 1.0, "two": 1.0})
    found = hashed_files(config, load_manifest(config))
    assert found == {path: file_entry(path) for path in ("one/train.bin", "two/train.bin")}

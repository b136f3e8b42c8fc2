"""The training corpora that a config names: found, fitting together, told apart."""

from __future__ import annotations

import dataclasses
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from conftest import write_shards

from llm.config import DataConfig, ModelConfig, PhaseChange, RunConfig
from llm.data.corpora import Corpora
from llm.data.loader import open_loader, validation_batches
from llm.data.tokens.folder import copy_folder, data_folder, load_manifest
from llm.data.tokens.hashes import file_entry, sampled_hash
from llm.data.tokens.manifest import plan_name, read_manifest
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
    corpora = Corpora.open(config)
    assert (corpora.folder, corpora.manifest) == (Path("one"), read_manifest(Path("one")))
    assert corpora.training["one"].shards == corpora.manifest.shard_list(Path("one"), "train")
    assert corpora.identity() == {
        "tokenizer": corpora.manifest.tokenizer_sha256,
        "corpora": {"one": {"name": "one", "digest": corpora.training["one"].digest, "plans": {}}},
    }


def test_every_corpus_of_every_phase():
    shutil.copytree("two", "three")
    phases = (PhaseChange(samples=32, blend={"three": 1.0, "one": 2.0}),)
    config = make_config(blend={"two": 1.0, "one": 1.0}, phases=phases)
    corpora = Corpora.open(config)
    assert list(corpora.training) == ["one", "two", "three"]
    assert list(corpora.identity()["corpora"]) == ["one", "two", "three"]
    for name, corpus in corpora.training.items():
        assert corpus.shards == read_manifest(Path(name)).shard_list(Path(name), "train", name)


def test_token_files_without_a_manifest():
    np.arange(300, dtype="<u2").tofile("a.bin")
    np.arange(200, dtype="<u2").tofile("b.bin")
    config = make_config(blend={"?.bin": 1.0, "one": 1.0})
    corpora = Corpora.open(config)
    found = corpora.training["?.bin"].shards
    assert (found.format, found.dtype, found.paths, found.tokens) == ("raw", "uint16", ("a.bin", "b.bin"), (300, 200))
    assert (found.vocab_size, found.eod_id) == (500, 0)
    before = corpora.training["?.bin"]
    assert before.digest.startswith("sampled ") and before.is_known_as(before.digest)
    for change in (lambda ids: np.append(ids, 1), lambda ids: np.append(ids[:-1], 1)):
        change(np.arange(200)).astype("<u2").tofile("b.bin")
        assert not Corpora.open(config).training["?.bin"].is_known_as(before.digest)
    with pytest.raises(InputError, match=r"\?\.bin have no manifest.*register them.*data\.verify=blocks"):
        corpora.hashed_files()


def test_a_remote_corpus_is_read_from_its_copy():
    config = make_config(path=URL, cache="copies")
    with pytest.raises(InputError, match=r"holds no prepared data; run python launch/prepare_data\.py"):
        Corpora.open(config)
    shutil.copytree("two", data_folder(config))
    assert data_folder(config).parent == Path("copies")
    shards = Corpora.open(config).training[URL].shards
    assert (shards.name, shards.paths) == (URL, (f"{data_folder(config)}/train.bin",))

    config = make_config(blend={URL: 1.0}, cache="elsewhere")
    with pytest.raises(InputError, match=f"elsewhere holds no copy of {URL}; run python"):
        Corpora.open(config)


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
    other = read_manifest(Path("two"))
    own = Path("two/tokenizer.json").read_bytes()
    Path("two/tokenizer.json").write_text("{ }")
    found = file_entry("two/tokenizer.json").sha256
    dataclasses.replace(other, tokenizer_sha256=found).save(Path("two"))
    with pytest.raises(InputError, match=f"two and one were tokenised differently: tokenizer_sha256 {found} and"):
        Corpora.open(config)
    Path("two/tokenizer.json").write_bytes(own)
    for changes, message in [
        ({"eod_id": 1}, "eod_id 1 and 0; prepare them with the same data.tokenizer"),
    ]:
        dataclasses.replace(other, **changes).save(Path("two"))
        with pytest.raises(InputError, match=message):
            Corpora.open(config)
    shutil.rmtree("two")
    write_tokens(Path("two"), 1, vocab_size=501)
    with pytest.raises(InputError, match="vocab_size 501 and 500"):
        Corpora.open(config)


def digests(config: RunConfig) -> dict[str, str]:
    return {name: corpus.digest for name, corpus in Corpora.open(config).training.items()}


def test_digests_follow_the_contents_alone():
    config = make_config(blend={"one": 1.0, "two": 1.0})
    before = digests(config)
    assert before["one"] != before["two"]
    Path("one").rename("moved")
    moved = make_config(path="moved", blend={"moved/": 1.0, "two": 1.0})
    assert digests(moved) == {"moved/": before["one"], "two": before["two"]}
    write_tokens(Path("two"), 7)
    assert digests(moved)["two"] != before["two"]

    own = read_manifest(Path("moved"))
    read_otherwise = dataclasses.replace(own.splits["train"].shards, format="raw")
    split = dataclasses.replace(own.splits["train"], shards=read_otherwise)
    dataclasses.replace(own, splits=own.splits | {"train": split}).save(Path("moved"))
    assert digests(moved)["moved/"] != before["one"]


def add_plan(folder: Path, seq_len: int, contents: str) -> None:
    manifest, name = read_manifest(folder), plan_name("train", seq_len)
    (folder / name).write_text(contents)
    dataclasses.replace(manifest, files=manifest.files | {name: file_entry(folder / name)}).save(folder)


def test_packing_plans():
    config = make_config(packing="best_fit", document_masks=True)
    shards = Corpora.open(config).training["one"].shards
    with pytest.raises(InputError, match="one has no packing plan for samples of 16 tokens; run python launch/prepare"):
        shards.plan(16)
    add_plan(Path("one"), 16, "plan")
    add_plan(Path("one"), 32, "of no phase")
    corpora = Corpora.open(config)
    assert corpora.training["one"].shards.plan(16) == "one/train.16.plan"
    before = corpora.known("one")
    assert before.plans == {"train.16.plan": file_entry("one/train.16.plan").sha256}
    add_plan(Path("one"), 16, "another")
    after = Corpora.open(config).known("one")
    assert after == before._replace(plans={"train.16.plan": file_entry("one/train.16.plan").sha256}) != before
    assert list(corpora.hashed_files()) == ["one/train.bin", "one/train.16.plan"]
    assert not Corpora.open(make_config()).known("one").plans


@pytest.mark.parametrize("loader", ["native", "numpy"])
def test_training_refuses_other_bytes_under_the_same_manifest(loader: str):
    config = make_config(blend={"one": 1.0, "two": 1.0}, loader=loader)
    manifest, path = read_manifest(Path("two")), Path("two/train.bin")
    split = manifest.splits["train"]
    shards = dataclasses.replace(split.shards, sampled=sampled_hash([str(path)]))
    dataclasses.replace(manifest, splits=manifest.splits | {"train": dataclasses.replace(split, shards=shards)}).save(
        Path("two")
    )
    open_loader(Corpora.open(config), dp_rank=0, dp_size=1)
    np.fromfile(path, "<u2")[::-1].tofile(path)
    with pytest.raises(InputError, match="the token files of two changed under their manifest; restore them"):
        open_loader(Corpora.open(config), dp_rank=0, dp_size=1)
    skipping = make_config(blend={"one": 1.0, "two": 1.0}, loader=loader, damaged="skip")
    open_loader(Corpora.open(skipping), dp_rank=0, dp_size=1)
    manifest.save(Path("two"))  # of a version that took no sample
    open_loader(Corpora.open(config), dp_rank=0, dp_size=1)


@pytest.mark.parametrize("folder", ["one", "two"])
@pytest.mark.parametrize("change", ["other", "missing"])
def test_another_tokenizer_is_refused_at_every_open(folder: str, change: str):
    path = Path(folder, "tokenizer.json")
    path.write_text("{ }") if change == "other" else path.unlink()
    match = rf"{folder}/tokenizer\.json" + (": sha256 .* the manifest says" if change == "other" else " cannot be read")
    with pytest.raises(InputError, match=match):
        Corpora.open(make_config(blend={"one": 1.0, "two": 1.0}))
    if folder == "one":
        with pytest.raises(InputError, match=match):
            load_manifest(make_config())


@pytest.mark.parametrize("loader", ["native", "numpy"])
@pytest.mark.parametrize("name", ["train.bin", "train.idx", "validation.bin", "validation.idx"])
def test_a_missing_file_is_named(name: str, loader: str):
    config, opened = make_config(loader=loader), {"train": open_loader, "validation": validation_batches}
    Path("one", name).unlink()
    with pytest.raises(InputError, match=rf"one/{name}: cannot be opened: No such file"):
        opened[name.split(".")[0]](Corpora.open(config), dp_rank=0, dp_size=1)


def test_hashed_files_are_those_of_training():
    config = make_config(blend={"one": 1.0, "two": 1.0})
    found = Corpora.open(config).hashed_files()
    assert found == {path: file_entry(path) for path in ("one/train.bin", "two/train.bin")}


def test_hashes_are_compared_where_the_config_asks():
    assert Corpora.open(make_config()).hash_check(0, 1) is None
    corpora = Corpora.open(make_config(blend={"one": 1.0, "two": 1.0}, verify="background"))
    path = Path("two/train.bin")
    tokens = np.fromfile(path, "<u2")
    tokens[5] ^= 1  # still an id of the vocabulary, in a sample that may come much later
    tokens.tofile(path)
    for rank, damaged in enumerate([False, True]):
        check = corpora.hash_check(rank, 2)
        assert check is not None
        check.thread.join()
        with (
            pytest.raises(InputError, match=r"two/train\.bin: sha256 \w+, the manifest says")
            if damaged
            else nullcontext()
        ):
            check.check()
        check.close()

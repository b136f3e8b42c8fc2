"""manifest.json: what is written is read back; anything else is refused."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeData
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm.data.tokens.hashes import check_hashes
from llm.data.tokens.manifest import (
    FORMAT,
    LARGEST_MANIFEST,
    FileEntry,
    Manifest,
    Shards,
    Split,
    plan_name,
    read_manifest,
)
from llm.data.tokens.shards import ShardList
from llm.errors import InputError


@pytest.fixture
def folder(make_data: MakeData) -> Path:
    config = make_data()
    assert config.data.path is not None
    return Path(config.data.path)


def test_round_trip(make_data: MakeData):
    config = make_data()
    folder = Path(config.data.path or "")
    manifest = read_manifest(folder)
    manifest.save(folder)
    assert read_manifest(folder) == manifest
    check_hashes(folder, manifest)
    assert sorted(os.listdir(folder)) == sorted([*manifest.all_files(), "manifest.json"])


def test_shard_list(make_data: MakeData):
    config = make_data()
    folder = Path(config.data.path or "")
    manifest = read_manifest(folder)
    entry = manifest.files["train.idx"]
    plans = {plan_name("train", 64): entry, "/elsewhere/train.32.plan": entry, plan_name("validation", 16): entry}
    manifest = dataclasses.replace(manifest, files=manifest.files | plans)
    found = manifest.shard_list(folder, "train", "the name")
    assert found == ShardList(
        name="the name",
        format="megatron",
        dtype="uint16",
        paths=(f"{folder}/train.bin",),
        tokens=(1001,),
        vocab_size=500,
        eod_id=0,
        eod_first=False,
        plans={64: f"{folder}/train.64.plan"},
    )
    assert manifest.shard_list(folder, "validation").name == str(folder)
    alone = dataclasses.replace(manifest, splits={"train": manifest.splits["train"]})
    assert alone.bytes_per_token is alone.bits_per_byte(1.0) is None
    with pytest.raises(InputError, match="has no validation split"):
        alone.shard_list(folder, "validation")


def many_shards(n: int) -> Manifest:
    """A corpus of 10^12 tokens in `n` files that lie elsewhere and, but for the manifest, do not exist."""
    tokens, sha256 = 10**12 // n, "ab" * 32
    paths = tuple(f"/of another/disk-{i}.bin" for i in range(n))
    shards = Shards("llm.c", "uint16", paths, (tokens,) * n, (2 * tokens + 1024,) * n, (sha256,) * n)
    split = Split(tokens * n, 10**9, None, shards)
    entries = {f"indexes/{i}.idx": FileEntry(i, sha256) for i in range(n)} | {"tokenizer.json": FileEntry(1, sha256)}
    return Manifest(FORMAT, "x", None, None, "train", "0", 500, 0, {"train": split}, entries, None, None)


def test_many_shards_are_read_without_touching_one(tmp_path: Path):
    manifest = many_shards(10_000)
    manifest.save(tmp_path)
    tracemalloc.start()
    found = read_manifest(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == manifest
    assert peak < 20 << 20
    shards = found.shard_list(tmp_path, "train")
    assert shards.n_tokens == 10**12
    assert shards.eod_first
    assert shards.paths == manifest.splits["train"].shards.paths


def test_bits_per_byte(make_data: MakeData):
    config = make_data(n_validation=200)
    manifest = read_manifest(Path(config.data.path or ""))  # bytes == tokens there
    assert manifest.bits_per_byte(math.log(8)) == pytest.approx(3.0)


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


BAD_NAMES = [
    "../x", "a/../b", "a//b", "a/", "/etc/../passwd", "/etc\n",
    "..", ".", ".x", "a/.x", "", "a\x00b", "a b", "é", "a\n",
    "a\nb",
]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "format is 'other'"),
        ({"format": "ingot-tokens-1"}, "expected 'ingot-tokens-2'; prepare the data again"),
        ({"source": 3}, "source: found 3; expected str"),
        ({"vocab_size": "500"}, "vocab_size: found '500'; expected int"),
        ({"vocab_size": True}, "vocab_size: found True; expected int"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"eod_id": 500}, "eod_id is 500"),
        ({"eod_id": -1}, "eod_id is -1"),
        ({"bigram_nats_per_token": math.inf}, "Infinity is no number of JSON"),
        ({"validation_fraction": "half"}, r"validation_fraction: found 'half'; expected float \| null"),
        ({"surprise": 1}, "surprise"),
        ({"splits": {}}, "splits are"),
        ({"splits": []}, r"splits: found \[\]; expected dict\[str, \{tokens, documents, bytes, shards\}\]"),
        (
            {"splits": {"train": 1, "validation": 1}},
            "splits.train: found 1; expected {tokens, documents",
        ),
        ({"splits": {"test": 1}}, "splits.test: found 1"),
        ({"files": {}}, "files lack tokenizer.json"),
        ({"files": {"tokenizer.json": {"bytes": 1}}}, "found no files.tokenizer.json.sha256; expected {bytes, sha256}"),
        (
            {"files": {"tokenizer.json": {"bytes": 1, "sha256": 1}}},
            "files.tokenizer.json.sha256: found 1; expected",
        ),
        ({"files": {"tokenizer.json": {"bytes": 1, "sha256": "AB" * 32}}}, "is no sha256"),
        ({"files": {"tokenizer.json": {"bytes": -1, "sha256": "ab" * 32}}}, "an impossible size"),
        ({"files": {name: {"bytes": 1, "sha256": "ab" * 32} for name in ("tokenizer.json", "train.bin")}}, "twice"),
    ],
)
def test_what_does_not_belong_is_refused(folder: Path, changes: dict, message: str):
    edit(folder, **changes)
    with pytest.raises(InputError, match=message):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("split", "shards", "message"),
    [
        ({"tokens": 1000}, {}, "splits.train: 1000 tokens; those of its shards are 1001"),
        ({"tokens": -1}, {"tokens": [-1]}, "impossible number of tokens"),
        ({"documents": -1}, {}, "splits.train: impossible counts"),
        ({"bytes": 0}, {}, "splits.train: impossible counts"),
        ({"bytes": 2**62}, {}, "splits.train: impossible counts"),
        ({"shards": []}, {}, r"splits.train.shards: found \[\]; expected {format, dtype, paths"),
        ({}, {"dtype": "float32"}, "splits.train.shards: dtype is 'float32'"),
        ({}, {"format": "parquet"}, "format is 'parquet'"),
        ({}, {"format": "llm.c"}, r"train\.bin: 2002 bytes, 1001 tokens take 3026"),
        ({}, {"paths": []}, "columns of different lengths"),
        ({}, {"paths": [], "tokens": [], "bytes": [], "sha256": []}, "no token files"),
        ({}, {"paths": "train.bin"}, "shards.paths: found 'train.bin'; expected tuple"),
        ({}, {"tokens": [True]}, r"shards.tokens\[0\]: found True; expected int"),
        ({}, {"tokens": [1001.0]}, r"shards.tokens\[0\]: found 1001.0; expected int"),
        ({}, {"tokens": [2**60], "bytes": [2**61]}, "impossible number of tokens"),
        ({}, {"tokens": [2**64], "bytes": [2**65]}, r"shards.tokens\[0\]: found an integer of 65 bits"),
        ({}, {"sha256": ["ab"]}, "'ab' is no sha256"),
        ({}, {"paths": ["../train.bin"]}, "splits.train.shards: file name"),
    ],
)
def test_what_does_not_belong_in_a_split_is_refused(folder: Path, split: dict, shards: dict, message: str):
    splits = json.loads((folder / "manifest.json").read_text())["splits"]
    splits["train"]["shards"] |= shards
    splits["train"] |= split
    edit(folder, splits=splits)
    with pytest.raises(InputError, match=message):
        read_manifest(folder)


@pytest.mark.parametrize("name", ["a", "a-b_c.d", "9/x.bin", "/data/of mine/é.bin"])
def test_file_names_that_are_taken(folder: Path, name: str):
    files = json.loads((folder / "manifest.json").read_text())["files"]
    edit(folder, files=files | {name: {"bytes": 1, "sha256": "ab" * 32}})
    assert name in read_manifest(folder).files


@pytest.mark.parametrize("name", BAD_NAMES)
def test_file_names_stay_inside_the_folder(folder: Path, name: str):
    files = json.loads((folder / "manifest.json").read_text())["files"]
    edit(folder, files=files | {name: {"bytes": 1, "sha256": "ab" * 32}})
    with pytest.raises(InputError, match="file name"):
        read_manifest(folder)


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_damaged_json_is_refused(folder: Path, raw: bytes):
    (folder / "manifest.json").write_bytes(raw)
    with pytest.raises(InputError, match=r"manifest\.json: .*prepare the data again"):
        read_manifest(folder)


def test_a_giant_is_refused_unread(folder: Path):
    os.truncate(folder / "manifest.json", LARGEST_MANIFEST + 1)
    with pytest.raises(InputError, match="is no file of at most 67108864 bytes"):
        read_manifest(folder)


def test_damaged_files_are_found(folder: Path, make_data: MakeData):
    path = folder / "train.bin"
    raw = bytearray(path.read_bytes())
    raw[100] ^= 1
    path.write_bytes(raw)
    manifest = read_manifest(folder)
    with pytest.raises(InputError, match=r"train\.bin: sha256"):
        check_hashes(folder, manifest)
    path.write_bytes(raw[:-1])
    with pytest.raises(InputError, match=r"train\.bin has 2001 bytes; the manifest says 2002"):
        check_hashes(folder, manifest)
    path.unlink()
    with pytest.raises(InputError, match="No such file"):
        check_hashes(folder, manifest)
    assert read_manifest(folder) == manifest  # which touches none of them


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(data=st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_manifest_confuses_the_reader(make_data: MakeData, data: st.DataObject):
    """Any value anywhere gives InputError or a manifest of the right types."""
    config = make_data()
    folder = Path(config.data.path or "")
    values = json.loads((folder / "manifest.json").read_text())
    node, key = values, data.draw(st.sampled_from(sorted(values)))
    while isinstance(node[key], dict | list) and data.draw(st.booleans()):
        keys = sorted(node[key]) if isinstance(node[key], dict) else range(len(node[key]))
        node, key = node[key], data.draw(st.sampled_from(keys))
    node[key] = data.draw(JSON)
    (folder / "manifest.json").write_text(json.dumps(values))
    try:
        manifest = read_manifest(folder)
    except InputError:
        return
    assert isinstance(manifest, Manifest)
    assert all(isinstance(split.tokens, int) for split in manifest.splits.values())
    assert all(isinstance(path, str) for split in manifest.splits.values() for path in split.shards.paths)

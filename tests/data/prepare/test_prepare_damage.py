"""Every kind of damage to the files of a run is found, all at once, and named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from token_files import write_file

from llm.config import DataConfig, ModelConfig, RunConfig
from llm.data.corpora import Corpora
from llm.data.prepare.damage import find_damage
from llm.data.prepare.plans import write_plans
from llm.data.tokens.folder import load_manifest
from llm.files import sha256_of

pytestmark = pytest.mark.usefixtures("two_folders")


def make_config(**data) -> RunConfig:
    fields = {"path": "one", "seq_len": 16} | data
    return RunConfig(model=ModelConfig(vocab_size=50), data=DataConfig(**fields))


def damage_of(config: RunConfig) -> list[str]:
    return find_damage(Corpora.open(config))


def flip(path: str, at: int) -> None:
    raw = bytearray(Path(path).read_bytes())
    raw[at] ^= 1
    Path(path).write_bytes(raw)


def test_whole_corpora_and_the_progress():
    stages = []
    write_file(Path("."), "more", "llm.c", "uint16", [[0, 1], [0, 2]])
    config = make_config(blend={"two": 1.0, "more.bin": 1.0})
    assert find_damage(Corpora.open(config), lambda *stage: stages.append(stage)) == []
    files = [path for name in ("one", "two") for path in Path(name).iterdir() if path.name != "manifest.json"]
    total = sum(path.stat().st_size for path in [*files, Path("more.bin")])
    assert stages[-1] == ("verifying", total, total)


@pytest.mark.parametrize("name", ["train.bin", "train.idx", "validation.bin", "train.16.plan"])
def test_a_flipped_bit_of_any_file_is_found_once(name: str):
    config = make_config(blend={"two": 1.0, "one": 1.0}, packing="best_fit", document_masks=True)
    write_plans(config)
    flip(f"two/{name}" if name != "validation.bin" else "one/validation.bin", -1)
    found = damage_of(config)
    assert len(found) == 1
    assert f"{name}: sha256 " in found[0]


def test_all_damage_is_told_at_once():
    config = make_config(blend={"two": 1.0})
    os.truncate("one/train.bin", 10)
    os.truncate("two/train.bin", 12)
    flip("two/train.idx", 20)
    Path("one/validation.idx").unlink()
    found = damage_of(config)
    assert len(found) == 4
    assert "one/train.bin has 10 bytes; the manifest says 6000" in found[0]
    assert "one/validation.idx cannot be read" in found[1]
    assert "two/train.bin has 12 bytes; the manifest says 6000" in found[2]
    assert "two/train.idx: sha256" in found[3]


def test_files_that_match_a_manifest_must_be_token_files_too():
    """A manifest written by other means may list the hash of what is no index."""
    raw = bytearray(Path("two/train.idx").read_bytes())
    raw[0] ^= 1
    Path("two/train.idx").write_bytes(raw)
    text = Path("two/manifest.json").read_text()
    manifest = load_manifest(make_config(path="two"))
    Path("two/manifest.json").write_text(text.replace(manifest.files["train.idx"].sha256, sha256_of("two/train.idx")))
    found = damage_of(make_config(path="two"))
    assert len(found) == 1
    assert "train.idx: does not begin with MMIDIDX" in found[0]


def test_ids_of_files_without_a_manifest():
    path = write_file(Path("."), "a", "raw", "uint16", [[1, 0], [2, 49, 0]])
    config = make_config(blend={"a.bin": 1.0})
    assert damage_of(config) == []
    write_file(Path("."), "a", "raw", "uint16", [[1, 0], [2, 50, 0]])
    assert damage_of(config) == [f"{path}: the id at byte 6 is 50, expected ids below 50"]

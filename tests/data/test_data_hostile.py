"""Data folders whose links lead out, and files that are none: refused, and nothing is written elsewhere."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import fsspec
import numpy as np
import pytest
from conftest import write_shards
from hostile import bounded, check_count, contents

from llm.data.chat import Chat
from llm.data.prepare.fetch import fetch
from llm.data.tokens.folder import open_folder
from llm.data.tokens.hashes import check_hash, check_hashes, sampled_hash
from llm.data.tokens.manifest import LARGEST_MANIFEST, FileEntry, parse_manifest, read_manifest
from llm.data.tokens.sums import SumsFile
from llm.errors import InputError

TOKENS = np.arange(3000) % 500
NAMES = ("train.bin", "train.idx", "validation.bin", "tokenizer.json")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A prepared folder, beside one of a victim."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/file").write_text("a victim's")
    write_shards(tmp_path / "data", {"train": TOKENS, "validation": TOKENS}, 500)
    return tmp_path / "data"


@pytest.mark.parametrize("target", ["outside", "nothing", "parent", "/etc/passwd", "/dev/zero"])
@pytest.mark.parametrize("name", NAMES)
def test_a_link_that_leads_out_is_refused(name: str, target: str, data: Path) -> None:
    (data / name).rename(data.parent / "outside" / name)
    targets = {"outside": data.parent / "outside" / name, "nothing": data.parent / "nothing", "parent": data.parent}
    (data / name).symlink_to(targets.get(target, target))
    with bounded(), pytest.raises(InputError, match=rf"{name} leads to .*, out of its folder"):
        read_manifest(data).shard_list(data, "train")


def test_a_link_within_the_folder_and_to_it_may_stay(data: Path) -> None:
    (data / "train.bin").rename(data / "0.bin")
    (data / "train.bin").symlink_to("0.bin")
    link = data.with_name("link")
    link.symlink_to(data)
    for folder in (data, link):
        assert read_manifest(folder).shard_list(folder, "train").n_tokens == 3000
        check_hashes(folder, read_manifest(folder))


def test_a_link_that_no_manifest_names_is_not_looked_at(data: Path) -> None:
    (data / "notes").symlink_to("/etc")
    assert read_manifest(data).shard_list(data, "train").n_tokens == 3000


KINDS: dict[str, Callable[[Path], None]] = {
    "a pipe": os.mkfifo,
    "zeros": lambda path: path.symlink_to("/dev/zero"),
    "a folder": Path.mkdir,
    "200 GiB": lambda path: os.close(os.open(path, os.O_CREAT | os.O_WRONLY)) or os.truncate(path, 200 << 30),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_manifest_that_is_none_is_refused(kind: str, data: Path) -> None:
    (data / "manifest.json").unlink()
    KINDS[kind](data / "manifest.json")
    with bounded(), pytest.raises(InputError, match=r"manifest\.json"):
        read_manifest(data)


def test_a_manifest_that_is_too_long_is_not_parsed() -> None:
    raw = b"," * (LARGEST_MANIFEST + 1)
    with bounded(), pytest.raises(InputError, match=f"more than {LARGEST_MANIFEST} bytes"):
        parse_manifest(raw)


@pytest.mark.parametrize("kind", KINDS)
def test_a_shard_that_is_none_is_not_waited_for(kind: str, data: Path) -> None:
    manifest = read_manifest(data)
    (data / "train.bin").unlink()
    KINDS[kind](data / "train.bin")
    with bounded(), pytest.raises(InputError, match=r"train\.bin"):
        check_hashes(data, manifest)
    if kind != "200 GiB":
        with bounded(), pytest.raises(InputError, match=r"train\.bin"):
            sampled_hash([str(data / "train.bin")])


@pytest.mark.parametrize("name", ["train.bin", "train.sums", "tokenizer.json"])
def test_200_gib_that_the_manifest_has_too_are_not_hashed(name: str, data: Path, tmp_path: Path) -> None:
    os.truncate(data / name, 200 << 30) if name != "train.sums" else KINDS["200 GiB"](data / name)
    entry = FileEntry(200 << 30, "0" * 64)
    check: dict[str, Callable[[], object]] = {
        "train.bin": lambda: check_hash(str(data / name), entry),
        "train.sums": SumsFile(str(data / name), "0" * 64).checked,
        "tokenizer.json": lambda: open_folder(data),
    }
    with bounded(), pytest.raises(InputError, match=f"{name}.* most of which were never written"):
        check[name]()


def test_a_template_of_200_gib_is_refused(tmp_path: Path) -> None:
    KINDS["200 GiB"](tmp_path / "chat_template.jinja")
    with bounded(), pytest.raises(InputError, match="no file of at most"):
        Chat.load(tmp_path, None)  # pyright: ignore[reportArgumentType]


URL = "memory://hostile/corpus"


@pytest.fixture
def bucket(data: Path) -> Iterator[None]:
    system = fsspec.filesystem("memory")
    system.put(str(data), "/hostile/corpus", recursive=True)
    yield
    system.rm("/hostile", recursive=True)


@pytest.mark.parametrize("kind", ["link", "link to nothing", "pipe", "folder"])
@pytest.mark.parametrize("name", [f"{name}.part" for name in NAMES])
def test_a_copy_writes_through_no_link(name: str, kind: str, tmp_path: Path, bucket: None) -> None:
    folder, outside = tmp_path / "copy", tmp_path / "outside"
    folder.mkdir()
    make: dict[str, Callable[[Path], None]] = {
        "link": lambda path: path.symlink_to(outside / "file"),
        "link to nothing": lambda path: path.symlink_to(outside / "new"),
        "pipe": os.mkfifo,
        "folder": Path.mkdir,
    }
    make[kind](folder / name)
    with bounded(folder), pytest.raises(InputError, match=f"{name} leads to|cannot be written: .*{name}"):
        fetch(URL, folder)
    assert contents(outside) == {"file": b"a victim's"} and not (folder / "manifest.json").exists()


@pytest.mark.parametrize("name", ["manifest.json", *NAMES])
def test_a_copy_replaces_a_link_or_refuses_it(name: str, tmp_path: Path, bucket: None) -> None:
    folder, outside = tmp_path / "copy", tmp_path / "outside"
    folder.mkdir()
    (folder / name).symlink_to(outside / "new")
    with bounded(folder), suppress(InputError):
        fetch(URL, folder)
    assert contents(outside) == {"file": b"a victim's"}


def test_the_cases_are_counted() -> None:
    check_count(__name__)

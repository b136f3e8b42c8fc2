"""Opens the folder of prepared data that a config asks for."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llm import locks
from llm.config import RunConfig
from llm.data.tokens.manifest import FILE_NAME, Manifest, read_manifest
from llm.errors import InputError, require
from llm.files import sha256_of


def is_url(name: str) -> bool:
    """Whether a corpus is named by a URL (as fsspec knows them), not by a path."""
    return "://" in name


def copy_folder(config: RunConfig, url: str) -> Path:
    """The folder in data.cache that holds, or will hold, the copy of the remote corpus `url`.

    Its name shows the end of the URL without what may be secret (a user's name, a query) and a hash of all of it.
    """
    shown = re.sub(r"[^A-Za-z0-9_-]+", "-", re.split(r"[?#]", url)[0].rsplit("@", 1)[-1])[-60:].strip("-")
    return Path(config.data.cache) / f"{shown}-{hashlib.sha256(url.rstrip('/').encode()).hexdigest()[:16]}"


def data_folder(config: RunConfig) -> Path:
    """The folder of the token shards: data.path (of a URL: its copy), or data/<name of the source>-<vocab_size>."""
    path = config.data.path
    if path is None:
        return Path("data") / f"{source_name(config.data.source)}-{config.model.vocab_size}"
    return copy_folder(config, path) if is_url(path) else Path(path)


def source_name(source: str) -> str:
    """A short name for a source of text: `stdlib`, or the file's or folder's name without its suffixes."""
    name = source if source == "stdlib" else Path(source).resolve().name
    name = re.sub(r"(?i)\.((txt|jsonl|ndjson|json)(\.(gz|bz2|xz|zst))?|parquet|arrow|feather)$", "", name)
    return re.sub(r"[^A-Za-z0-9_.-]", "_", name) or "corpus"


def open_folder(folder: Path) -> Manifest:
    """The manifest in `folder`, whose tokenizer was compared with it; else InputError."""
    manifest, path = read_manifest(folder), folder / "tokenizer.json"
    try:
        found = sha256_of(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}; restore it or prepare the data again") from error
    expected = f"the manifest says {manifest.tokenizer_sha256}"
    require(
        found == manifest.tokenizer_sha256,
        f"{path}: sha256 {found}, {expected}; the file is not the tokenizer of these tokens: restore it or prepare the "
        "data again",
    )
    return manifest


def load_manifest(config: RunConfig) -> Manifest:
    """The manifest of the data that `config` asks for; InputError says what does not fit."""
    folder = data_folder(config)
    require(
        (folder / FILE_NAME).exists(),
        f"{folder} holds no prepared data; run python launch/prepare_data.py --config <the same config>",
    )
    manifest = open_folder(folder)
    require(
        manifest.vocab_size <= config.model.vocab_size,
        f"the data in {folder} has a vocabulary of {manifest.vocab_size}, model.vocab_size is "
        f"{config.model.vocab_size}; set at least as much or prepare other data",
    )
    require(
        "validation" in manifest.splits,
        f"{folder} has no validation split: it can be part of data.blend, not data.path; register it with --validation",
    )
    return manifest


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """One process at a time changes the folder; the lock goes with the process, however that ends."""
    held = locks.lock(folder / ".lock")
    try:
        yield
    finally:
        held.release()

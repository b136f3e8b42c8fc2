"""manifest.json: the contents of a corpus of token files, with the size and hash of every file.

Reading it touches no other file, so a corpus of 10,000 shards opens as fast as one of one. The files themselves are
checked when they are first read (llm/data/tokens/shards.py) and by `prepare_data.py verify`.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llm.data.tokens.headers import DTYPES, header_bytes
from llm.data.tokens.shards import ShardList
from llm.data.tokens.sums import SumsFile, sums_name
from llm.errors import CheckpointError, InputError, require
from llm.files import complete_file, parse_json, read_up_to
from llm.typed import read, shown

FILE_NAME = "manifest.json"
FORMAT = "ingot-tokens-2"
SPLITS = ("train", "validation")
SAFE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*(/[A-Za-z0-9_-][A-Za-z0-9_.-]*)*")
SHA256 = re.compile(r"[0-9a-f]{64}")
LARGEST_MANIFEST = 1 << 26  # bytes; 10,000 shards with an index each take 3 MB


class FileEntry(NamedTuple):
    """One file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Shards:
    """The token files of a split, one after another; one entry of each tuple per file."""

    format: str
    """raw, megatron, llm.c or datatrove."""
    dtype: str
    """Of the ids: uint8, uint16, int32 or uint32."""
    paths: tuple[str, ...]
    """Below the manifest's folder, or absolute."""
    tokens: tuple[int, ...]
    bytes: tuple[int, ...]
    sha256: tuple[str, ...]
    sampled: str | None = None
    """`sampled_hash` of the first CHECKED_FILES files; null: written by a version that took none."""

    def __post_init__(self) -> None:
        known = DTYPES.get(self.format)
        require(known is not None, f"format is {self.format!r}; expected one of {', '.join(DTYPES)}")
        require(self.dtype in (known or ()), f"dtype is {self.dtype!r}; expected {known} in {self.format} files")
        lengths = {name: len(getattr(self, name)) for name in ("paths", "tokens", "bytes", "sha256")}
        require(len(set(lengths.values())) == 1, f"columns of different lengths {lengths}")
        require(len(self.paths) >= 1, "no token files")
        require(min(self.tokens) >= 1 and max(self.tokens) < 2**59, "a shard has an impossible number of tokens")
        check_files(self.paths, self.bytes, self.sha256)
        expected = np.array(self.tokens) * np.dtype(self.dtype).itemsize + header_bytes(self.format)
        wrong = np.flatnonzero(np.array(self.bytes) != expected)
        if wrong.size:
            i = int(wrong[0])
            raise InputError(f"{self.paths[i]}: {self.bytes[i]} bytes, {self.tokens[i]} tokens take {expected[i]}")


@dataclass(frozen=True)
class Split:
    """One split."""

    tokens: int
    """End-of-document tokens included."""
    documents: int
    """0: no end-of-document token tells them apart."""
    bytes: int | None
    """UTF-8 bytes of the text, end-of-document tokens not counted; null: not counted."""
    shards: Shards

    def __post_init__(self) -> None:
        counts = (self.documents, 1 if self.bytes is None else self.bytes)
        possible = 0 <= counts[0] < 2**62 and 1 <= counts[1] < 2**62
        require(possible, f"impossible counts {counts} of documents and bytes")
        found = sum(self.shards.tokens)
        require(self.tokens == found, f"{self.tokens} tokens; those of its shards are {found}")


@dataclass(frozen=True)
class TextCounts:
    """What was met where the text was read."""

    inside: bool = False
    """Too few documents to choose from: each one's end is validation text."""
    empty: int = 0
    """Documents without text, passed over."""
    others: dict[str, int] = field(default_factory=dict)
    """Files of other kinds, passed over, by suffix."""
    cut_words: int = 0
    """Words so long that they were tokenised in parts."""


@dataclass(frozen=True)
class Manifest:
    """What manifest.json says."""

    format: str
    source: str
    """Where the text came from, for people."""
    source_sha256: str | None
    """Of the documents: SHA-256 over the SHA-256 of each, in order; null: the token files were made elsewhere."""
    validation_fraction: float | None
    """Null likewise."""
    tokenizer: str
    """`train` (trained on this corpus) or the sha256 of the tokenizer.json that was given."""
    tokenizer_sha256: str
    """Of the folder's tokenizer.json."""
    vocab_size: int
    eod_id: int
    splits: dict[str, Split]
    """train, and validation where there is one."""
    files: dict[str, FileEntry]
    """The others: tokenizer.json, the indexes of the shards, packing plans (`plan_name`), checksums (`sums_name`)."""
    bigram_nats_per_token: float | None
    """Validation loss of an interpolated bigram model; null on corpora too large for it."""
    bigram_seq_len: int | None
    """data.seq_len whose validation samples that loss was computed on."""
    text: TextCounts | None = None
    """Null: the token files were made elsewhere, or before this was counted."""

    def __post_init__(self) -> None:
        require(self.vocab_size >= 1, f"vocab_size is {self.vocab_size}; expected at least 1")
        possible = 0 <= self.eod_id < self.vocab_size
        require(possible, f"eod_id is {self.eod_id}; expected 0 <= eod_id < {self.vocab_size}")
        known = "train" in self.splits and set(self.splits) <= set(SPLITS)
        require(known, f"splits are {sorted(self.splits)}; expected {SPLITS}, or train alone")
        require("tokenizer.json" in self.files, "files lack tokenizer.json")
        check_files(list(self.files), *zip(*self.files.values(), strict=True))
        names = [*self.files, *chain(*(split.shards.paths for split in self.splits.values()))]
        check_places(names)

    @property
    def bytes_per_token(self) -> float | None:
        """Of the validation split, end-of-document tokens counted as tokens; None where not known."""
        split = self.splits.get("validation")
        return None if split is None or split.bytes is None else split.bytes / split.tokens

    def bits_per_byte(self, nats_per_token: float) -> float | None:
        """A validation loss in nats per token, as bits per UTF-8 byte of the validation text; None where not known."""
        return None if self.bytes_per_token is None else nats_per_token / math.log(2) / self.bytes_per_token

    def all_files(self) -> dict[str, FileEntry]:
        """Every file of the corpus, named as in the manifest: the shards first."""
        shards = [split.shards for split in self.splits.values()]
        rows = chain(*(zip(part.paths, part.bytes, part.sha256, strict=True) for part in shards))
        return {path: FileEntry(size, sha256) for path, size, sha256 in rows} | self.files

    def shard_list(self, folder: Path, split: str, name: str | None = None, *, sums: bool = False) -> ShardList:
        """The token files of a split, the manifest lying in `folder`; `name` (default: the folder) is for messages.

        sums: with their checksums, where there are any.
        """
        require(split in self.splits, f"{folder} has no {split} split")
        shards = self.splits[split].shards
        check_links(folder, self.all_files())
        plan = re.compile(rf"{split}\.([1-9][0-9]{{0,9}})\.plan")  # plan_name()
        planned = filter(None, map(plan.fullmatch, self.files))
        listed = self.files.get(sums_name(split)) if sums else None
        return ShardList(
            name=name or str(folder),
            format=shards.format,
            dtype=shards.dtype,
            paths=tuple(locate(folder, path) for path in shards.paths),
            tokens=shards.tokens,
            vocab_size=self.vocab_size,
            eod_id=self.eod_id,
            eod_first=shards.format == "llm.c",
            plans={int(match[1]): locate(folder, match[0]) for match in planned},
            sums=listed and SumsFile(locate(folder, sums_name(split)), listed.sha256),
        )

    def save(self, folder: Path) -> None:
        """Write manifest.json into `folder`, completely or not at all."""
        plain = asdict(self) | {"files": {name: entry._asdict() for name, entry in self.files.items()}}
        with complete_file(folder / FILE_NAME) as file:
            file.write((json.dumps(plain, indent=2) + "\n").encode())


def plan_name(split: str, seq_len: int) -> str:
    """The name of the packing plan of a split, in its folder and in `Manifest.files`."""
    return f"{split}.{seq_len}.plan"


def locate(folder: Path, name: str) -> str:
    """The path of a file that the manifest in `folder` names."""
    return name if name.startswith("/") else f"{folder}/{name}"


def check_links(folder: Path, names: Collection[str]) -> None:
    """InputError where a link among the files that are named below `folder`, or of their folders, leads out of it.

    Lists each folder once: that is as fast for 10,000 shards as for one.
    """
    listed, root = set(names), os.path.realpath(folder)
    for parent in {os.path.dirname(name) for name in listed if not name.startswith("/")}:
        place = os.path.join(folder, parent)
        links = [entry.path for entry in os.scandir(place) if entry.is_symlink()] if os.path.isdir(place) else []
        for link in [place, *(link for link in links if os.path.relpath(link, folder) in listed)]:
            target = os.path.realpath(link)
            inside = target == root or target.startswith(f"{root}/")
            require(inside, f"{link} leads to {target}, out of its folder; copy that here, or register it by its path")


def check_places(names: Sequence[str]) -> None:
    """InputError unless files of these names can lie in one folder: none twice, and none where another has a folder."""
    require(len(set(names)) == len(names), "a file is listed twice")
    folders = {name[:i] for name in names for i, letter in enumerate(name) if letter == "/"}
    both = sorted(folders.intersection(names))
    require(not both, f"{both[:1]} is listed as a file, and others as lying in it")


def check_files(names: Sequence[str], sizes: Sequence[int], hashes: Sequence[str]) -> None:
    """InputError unless names are safe (they never leave the folder, or are absolute), sizes and hashes possible."""
    for name in names:
        absolute = name.startswith("/") and name.isprintable() and ".." not in name.split("/")
        if not absolute and not SAFE_NAME.fullmatch(name):
            raise InputError(
                f"file name {name!r} is neither of letters, digits, '_', '-', '/' and '.' (not first) nor absolute"
            )
    require(min(sizes) >= 0 and max(sizes) < 2**62, "a file has an impossible size")
    for sha256 in hashes:
        if not SHA256.fullmatch(sha256):
            raise InputError(f"{sha256!r} is no sha256; expected 64 hexadecimal digits")


def read_manifest(folder: Path) -> Manifest:
    """Load and check manifest.json; the files that it lists are not touched.

    Raises InputError saying what is wrong with it.
    """
    path = folder / FILE_NAME
    try:
        return parse_manifest(read_up_to(path, LARGEST_MANIFEST))
    except (InputError, OSError) as error:
        raise InputError(f"{path}: {error}; prepare the data again") from error


def parse_manifest(raw: bytes) -> Manifest:
    """The manifest in the bytes of a manifest.json; InputError says what is wrong with it."""
    require(len(raw) <= LARGEST_MANIFEST, f"has more than {LARGEST_MANIFEST} bytes")
    try:
        values = parse_json(raw, "the manifest")
    except CheckpointError as error:
        raise InputError(str(error)) from error
    found = values.get("format")
    require(found == FORMAT, f"format is {shown(found)}; expected {FORMAT!r}")
    return read(Manifest, values, "")

"""manifest.json: what a folder of token shards holds, with the hash of every file in it."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from llm.data.formats import CODES
from llm.errors import InputError, require

FILE_NAME = "manifest.json"
FORMAT = "ingot-tokens-1"
SPLITS = ("train", "validation")
SAFE_NAME = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9_.-]+")
LARGEST_MANIFEST = 1 << 20  # bytes; ours has less than 4 kB


@dataclass(frozen=True)
class Split:
    """Counts of one split; its tokens lie in <name>.bin and <name>.idx."""

    tokens: int
    """End-of-document tokens included."""
    documents: int
    bytes: int
    """UTF-8 bytes of the text, end-of-document tokens not counted."""


@dataclass(frozen=True)
class FileEntry:
    """One file of the folder."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The whole of manifest.json."""

    format: str
    source: str
    """Where the text came from, for people."""
    source_sha256: str
    """Of the documents: SHA-256 over the SHA-256 of each, in order."""
    validation_fraction: float
    tokenizer: str
    """`train` (trained on this corpus) or the sha256 of the tokenizer.json that was given."""
    tokenizer_sha256: str
    """Of the folder's tokenizer.json."""
    vocab_size: int
    eod_id: int
    dtype: str
    splits: dict[str, Split]
    files: dict[str, FileEntry]
    bigram_nats_per_token: float | None
    """Validation loss of an interpolated bigram model; null on corpora too large for it."""
    bigram_seq_len: int | None
    """data.seq_len whose validation samples that loss was computed on."""

    def __post_init__(self) -> None:
        require(self.format == FORMAT, f"format is {self.format!r}; expected {FORMAT!r}")
        require(self.dtype in CODES, f"dtype is {self.dtype!r}; expected one of {sorted(CODES)}")
        require(self.vocab_size >= 1, f"vocab_size is {self.vocab_size}; expected at least 1")
        require(
            0 <= self.eod_id < self.vocab_size,
            f"eod_id is {self.eod_id}; expected 0 <= eod_id < {self.vocab_size}",
        )
        require(
            sorted(self.splits) == sorted(SPLITS),
            f"splits are {sorted(self.splits)}; expected {SPLITS}",
        )
        for name, split in self.splits.items():
            counts = asdict(split)
            require(
                all(1 <= n < 2**62 for n in counts.values()),
                f"split {name} has impossible counts {counts}",
            )
        needed = {f"{split}.{kind}" for split in SPLITS for kind in ("bin", "idx")} | {"tokenizer.json"}
        require(needed <= set(self.files), f"files lack {sorted(needed - set(self.files))}")
        for name, entry in self.files.items():
            require(
                SAFE_NAME.fullmatch(name) is not None,
                f"file name {name!r} is not made of letters, digits, '_', '.' and '-' alone",
            )
            require(entry.bytes >= 0, f"file {name} has {entry.bytes} bytes")

    @property
    def bytes_per_token(self) -> float:
        """Of the validation split, end-of-document tokens counted as tokens."""
        return self.splits["validation"].bytes / self.splits["validation"].tokens

    def bits_per_byte(self, nats_per_token: float) -> float:
        """A validation loss in nats per token, as bits per UTF-8 byte of the validation text."""
        return nats_per_token / math.log(2) / self.bytes_per_token

    def save(self, folder: Path) -> None:
        """Write manifest.json into `folder`."""
        (folder / FILE_NAME).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def _typed(value: Any, expected: Any, where: str) -> Any:
    """`value` if it is of the type `expected` (a class or `X | None`), else InputError."""
    if expected in (float | None, int | None):
        if value is None:
            return None
        expected = float if expected == float | None else int
    kinds = (int, float) if expected is float else (expected,)
    finite = not isinstance(value, float) or math.isfinite(value)
    require(
        isinstance(value, kinds) and not isinstance(value, bool) and finite,
        f"{where} is {value!r}; expected {expected.__name__}",
    )
    return value


def _build(kind: Any, values: Any, where: str) -> Any:
    """The dataclass `kind` from a JSON object with exactly its fields."""
    values = _typed(values, dict, where)
    names = {field.name for field in fields(kind)}
    require(set(values) == names, f"{where} has fields {sorted(values)}; expected {sorted(names)}")
    parts = {"splits": Split, "files": FileEntry}
    hints = get_type_hints(kind)
    out = {}
    for name, value in values.items():
        if name in parts:
            items = _typed(value, dict, name).items()
            out[name] = {key: _build(parts[name], item, f"{name}.{key}") for key, item in items}
        else:
            out[name] = _typed(value, hints[name], f"{where}.{name}")
    return kind(**out)


def read_manifest(folder: Path) -> Manifest:
    """Load and check manifest.json, and that each file it lists is there with the right size.

    Raises InputError naming the file and what is wrong with it.
    """
    path = folder / FILE_NAME
    try:
        with path.open("rb") as file:
            raw = file.read(LARGEST_MANIFEST + 1)
        require(len(raw) <= LARGEST_MANIFEST, f"is larger than {LARGEST_MANIFEST} bytes")
        manifest = _build(Manifest, json.loads(raw.decode("utf-8")), "manifest")
        for name, entry in manifest.files.items():
            found = (folder / name).stat().st_size
            require(
                found == entry.bytes,
                f"file {name} has {found} bytes; the manifest says {entry.bytes}",
            )
    except (InputError, OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: {error}; prepare the data again") from error
    return manifest


def sha256_file(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def file_entry(path: Path) -> FileEntry:
    """The manifest's entry for an existing file."""
    return FileEntry(path.stat().st_size, sha256_file(path))


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Read every file of the folder and compare its hash; InputError names one that differs."""
    for name, entry in manifest.files.items():
        found = sha256_file(folder / name)
        require(
            found == entry.sha256,
            f"{folder / name}: sha256 {found}, the manifest says {entry.sha256}; "
            "the file is damaged: remove the folder and prepare the data again",
        )

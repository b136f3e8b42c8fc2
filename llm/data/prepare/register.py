"""Writes a manifest for token files that were made elsewhere. The files stay as and where they are."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llm.config import RunConfig
from llm.data.prepare.tokenise import Progress, given_tokenizer
from llm.data.tokenizer import LEARNED, Tokenizer
from llm.data.tokens.folder import data_folder, is_url
from llm.data.tokens.hashes import CHECKED_FILES, file_entry, sampled_hash
from llm.data.tokens.headers import DTYPES, header_bytes, index_path
from llm.data.tokens.manifest import FILE_NAME, FORMAT, SAFE_NAME, FileEntry, Manifest, Shards, Split
from llm.data.tokens.shards import Say, ShardList, check_file, document_lengths, inspect_files
from llm.data.tokens.sums import block_sums, sums_name, write_sums
from llm.errors import DamagedFile, require
from llm.files import sha256_of

BLOCK = 1 << 20  # bytes read at a time


@dataclass
class TokenCounts:
    """What has been found in the tokens of a corpus, in their order."""

    shards: ShardList
    per_id: NDArray[np.int64] | None = None
    """[vocab_size] how often each id was found; None: not counted."""
    done: int = 0
    """Bytes read."""
    sums: list[bytes] = field(default_factory=list)
    """The checksums of the blocks of each part read (`block_sums`)."""
    documents: int = 0
    """End-of-document tokens."""
    open_document: bool = False
    """The last token did not end its document; or, where documents begin with that token, the first did not."""

    def add(self, ids: NDArray[np.unsignedinteger], where: Callable[[int], str]) -> None:
        """Count ids [n]; `where(i)` names the place of the i-th. DamagedFile where one is not below the vocabulary."""
        shards = self.shards
        if int(ids.max()) >= shards.vocab_size:
            i = int(np.argmax(ids >= shards.vocab_size))
            raise DamagedFile(f"{where(i)} is {ids[i]}, expected ids below {shards.vocab_size}")
        if self.done == 0 or not shards.eod_first:
            self.open_document = bool(ids[0 if shards.eod_first else -1] != shards.eod_id)
        self.documents += int(np.count_nonzero(ids == shards.eod_id))
        if self.per_id is not None:
            self.per_id += np.bincount(ids, minlength=shards.vocab_size)


def scan_file(counts: TokenCounts, path: str, progress: Callable[[int], None]) -> str:
    """Read a token file once: its SHA-256, its ids counted into `counts`. DamagedFile as TokenCounts.add()."""
    dtype, digest = np.dtype(f"<u{np.dtype(counts.shards.dtype).itemsize}"), hashlib.sha256()
    at, header = 0, header_bytes(counts.shards.format)
    try:
        with open(path, "rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
                counts.sums.append(block_sums(block))
                start = max(0, header - at)
                ids = np.frombuffer(block, dtype, offset=start)
                counts.add(ids, lambda i, first=at + start: f"{path}: the id at byte {first + i * dtype.itemsize}")
                at += len(block)
                counts.done += len(block)
                progress(len(block))
    except OSError as error:
        raise DamagedFile(f"{path}: cannot be read: {error}") from error
    return digest.hexdigest()


def register(
    config: RunConfig,
    patterns: dict[str, str],
    progress: Progress = lambda stage, done, total: None,
    say: Say = lambda line: None,
    raw_dtype: str | None = None,
) -> Manifest:
    """Check the token files of each split and write a manifest of them into data_folder(config).

    patterns: split -> a file, folder or glob. data.tokenizer is copied beside the manifest. `say` gets what the user
    should know. raw_dtype: of files that say nothing of it (None: as `inspect_files`).

    Raises InputError for a file that is damaged or of another vocabulary, and a folder that has a manifest already.
    """
    folder = data_folder(config)
    _check_folder(config, folder)
    tokenizer = given_tokenizer(config)
    beside = folder / "tokenizer.json"
    require(
        not beside.exists() or beside.read_bytes() == tokenizer.raw,
        f"{beside} is another tokenizer than data.tokenizer {config.data.tokenizer}; set data.path to another folder",
    )
    found = _inspect(patterns, tokenizer, raw_dtype, say)
    sha256 = hashlib.sha256(tokenizer.raw).hexdigest()
    splits, sums, files = {}, {}, {"tokenizer.json": FileEntry(len(tokenizer.raw), sha256)}
    for split, shards in found.items():
        for path, tokens in zip(shards.paths, shards.tokens, strict=True):
            check_file(path, shards.format, shards.dtype, tokens)
        splits[split], sums[sums_name(split)] = _scan_split(split, shards, folder, tokenizer, progress)
        files |= {_manifest_name(folder, path): file_entry(path) for path in _companions(shards)}
        _say_of_documents(split, shards, splits[split].documents, say)
    folder.mkdir(parents=True, exist_ok=True)
    for name, parts in sums.items():
        write_sums(folder / name, parts)
        files[name] = file_entry(folder / name)
    manifest = Manifest(
        format=FORMAT,
        source="token files made elsewhere: " + ", ".join(patterns.values()),
        source_sha256=None,
        validation_fraction=None,
        tokenizer=sha256_of(config.data.tokenizer),
        tokenizer_sha256=sha256,
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id,
        splits=splits,
        files=files,
        bigram_nats_per_token=None,
        bigram_seq_len=None,
    )
    if not beside.exists():
        tokenizer.save(beside)
    manifest.save(folder)
    return manifest


def _inspect(patterns: dict[str, str], tokenizer: Tokenizer, raw_dtype: str | None, say: Say) -> dict[str, ShardList]:
    """The files of each split, by their headers."""
    known = raw_dtype is None or raw_dtype in DTYPES["raw"]
    require(known, f"--dtype is {raw_dtype!r}; expected one of {', '.join(DTYPES['raw'])}")
    options = {"vocab_size": tokenizer.vocab_size, "eod_id": tokenizer.eod_id, "raw_dtype": raw_dtype, "say": say}
    found = {split: inspect_files(f"--{split}", pattern, **options) for split, pattern in patterns.items()}
    twice = set.intersection(*(set(map(os.path.realpath, shards.paths)) for shards in found.values()))
    require(len(found) < 2 or not twice, f"{', '.join(sorted(twice))}: in both splits; expected files of their own")
    return found


def _check_folder(config: RunConfig, folder: Path) -> None:
    require(
        config.data.tokenizer not in LEARNED,
        "registering token files needs the tokenizer that made them; set data.tokenizer to its tokenizer.json",
    )
    require(not is_url(config.data.path or ""), f"data.path is {config.data.path}; expected a folder on this machine")
    registered = (folder / FILE_NAME).exists()
    require(not registered, f"{folder} has a {FILE_NAME} already; remove it or set data.path to another folder")
    above = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    writable = above.is_dir() and os.access(above, os.W_OK | os.X_OK)
    require(writable, f"{folder} cannot be made or written, because of {above}; set data.path to another folder")


def _manifest_name(folder: Path, path: str) -> str:
    """How the manifest in `folder` names a file: by its place in the folder, where it lies there; else absolutely."""
    below = os.path.relpath(path, folder)
    return below if SAFE_NAME.fullmatch(below) else os.path.abspath(path)


def _companions(shards: ShardList) -> list[str]:
    """The files beside the token files that say where their documents lie."""
    indexes = [index for path in shards.paths if (index := index_path(path, shards.format))]
    metadata = [f"{path}.metadata" for path in shards.paths if shards.format == "datatrove"]
    return [*indexes, *filter(os.path.exists, metadata)]


def _scan_split(
    split: str, shards: ShardList, folder: Path, tokenizer: Tokenizer, progress: Progress
) -> tuple[Split, list[bytes]]:
    """Read the tokens of a split, and sum up their blocks; those of validation are counted, for their bytes of text."""
    per_id = np.zeros(tokenizer.vocab_size, np.int64) if split == "validation" else None
    counts = TokenCounts(shards, per_id)
    sizes = [os.stat(path).st_size for path in shards.paths]
    stage, total = f"reading the {split} tokens", sum(sizes)
    hashes = [scan_file(counts, path, lambda _: progress(stage, counts.done, total)) for path in shards.paths]
    documents = counts.documents and counts.documents + counts.open_document
    text_bytes = None if per_id is None else tokenizer.text_bytes(per_id, documents)
    names = tuple(_manifest_name(folder, path) for path in shards.paths)
    columns = (names, shards.tokens, tuple(sizes), tuple(hashes), sampled_hash(shards.paths[:CHECKED_FILES]))
    found = Split(shards.n_tokens, documents, text_bytes, Shards(shards.format, shards.dtype, *columns))
    return found, counts.sums


def _say_of_documents(split: str, shards: ShardList, documents: int, say: Say) -> None:
    if documents == 0:
        say(
            f"note: no token of the {split} files is the end-of-document token {shards.eod_id}: documents cannot be "
            "told apart, and document masks and packing are refused (Megatron writes it when given --append-eod)"
        )
    elif index_path("", shards.format) is not None:
        indexed = sum(int(np.count_nonzero(part)) for part in document_lengths(shards))
        if indexed != documents:
            say(
                f"note: the indexes of the {split} files count {indexed:,} documents, the end-of-document tokens "
                f"{documents:,}; document masks and packing go by the tokens"
            )

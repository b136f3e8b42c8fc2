"""Turns raw text into token shards: a tokenizer, train and validation .bin/.idx, and manifest.json."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llm.config import RunConfig
from llm.data.corpus import describe_source, read_corpus
from llm.data.prepare.bigram import folder_loss
from llm.data.tokenizer import LEARNED, Tokenizer
from llm.data.tokens.folder import data_folder, is_url, load_manifest
from llm.data.tokens.hashes import check_hashes, file_entry
from llm.data.tokens.manifest import FILE_NAME, FORMAT, SPLITS, Manifest, Shards, Split, read_manifest
from llm.data.tokens.megatron import TokenWriter, token_dtype
from llm.errors import require
from llm.files import sha256_of

Progress = Callable[[str, int, int], None]
"""Called with the name of the stage, bytes of text done, and bytes in all (0: not known yet)."""

BATCH_CHARACTERS = 1 << 20  # text tokenised at a time


def split_of(document: str, validation_fraction: float) -> str:
    """`train` or `validation`, by the document's SHA-256: the same text never lies in both."""
    digest = hashlib.sha256(document.encode("utf-8")).digest()
    below = int.from_bytes(digest[:8], "big") < int(validation_fraction * 2**64)
    return "validation" if below else "train"


@dataclass(frozen=True)
class _Scan:
    """A first reading of the corpus."""

    sha256: str
    documents: dict[str, int]
    bytes: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.bytes.values())


def _documents(config: RunConfig, stage: str, total: int, progress: Progress) -> Iterator[tuple[str, str]]:
    """(split, text) of each document."""
    done = 0
    for document in read_corpus(config.data.source):
        done += len(document.encode("utf-8"))
        progress(stage, done, total)
        yield split_of(document, config.data.validation_fraction), document


def _scan(config: RunConfig, progress: Progress) -> _Scan:
    digest = hashlib.sha256()
    counts: dict[str, int] = dict.fromkeys(SPLITS, 0)
    sizes: dict[str, int] = dict.fromkeys(SPLITS, 0)
    for split, document in _documents(config, "reading", 0, progress):
        text = document.encode("utf-8")
        digest.update(hashlib.sha256(text).digest())
        counts[split] += 1
        sizes[split] += len(text)
    for split in SPLITS:
        require(
            counts[split] > 0,
            f"the {split} split is empty: the corpus has {sum(counts.values())} documents, "
            f"data.validation_fraction is {config.data.validation_fraction}; "
            "use more documents (a .txt file is one document) or another fraction",
        )
    return _Scan(digest.hexdigest(), counts, sizes)


def prepare(config: RunConfig, progress: Progress = lambda stage, done, total: None) -> Manifest:
    """Tokenise the corpus into data_folder(config), completely or not at all; return its manifest.

    Does nothing but check the files' hashes when the folder holds the same corpus prepared the same
    way, and nothing at all when it is a copy of a remote corpus or holds files that were registered: there is
    no text to compare with. Raises InputError on a corpus or tokenizer that cannot be used, and on a folder that
    holds anything else: it is never overwritten.
    """
    folder = data_folder(config)
    registered = (folder / FILE_NAME).exists() and read_manifest(folder).source_sha256 is None
    if is_url(config.data.path or "") or registered:
        return load_manifest(config)
    tokenizer = None if config.data.tokenizer in LEARNED else given_tokenizer(config)
    scan = _scan(config, progress)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        return _check_prepared(config, folder, scan, tokenizer)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir()
    try:
        manifest = _write(config, temporary, tokenizer, scan, progress)
        try:
            os.rename(temporary, folder)
        except OSError:
            if not (folder / FILE_NAME).exists():
                raise
            return _check_prepared(config, folder, scan, tokenizer)  # another process was faster
        return manifest
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def given_tokenizer(config: RunConfig) -> Tokenizer:
    """The tokenizer that data.tokenizer names; InputError as Tokenizer.load() and _fitting()."""
    return _fitting(config, Tokenizer.load(Path(config.data.tokenizer), config.data.end_token))


def learned_tokenizer(config: RunConfig, documents: Iterator[tuple[str, str]]) -> Tokenizer:
    """The tokenizer that data.tokenizer asks to make of (split, text) of each document; InputError as _fitting()."""
    if config.data.tokenizer == "char":  # a character of the validation split alone needs a token too
        return _fitting(config, Tokenizer.of_characters(text for _, text in documents))
    return Tokenizer.train((text for split, text in documents if split == "train"), config.model.vocab_size)


def _fitting(config: RunConfig, tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer; InputError where the model has fewer ids."""
    require(
        tokenizer.vocab_size <= config.model.vocab_size,
        f"data.tokenizer {config.data.tokenizer} has {tokenizer.vocab_size} tokens, model.vocab_size is "
        f"{config.model.vocab_size}; set --model.vocab_size={tokenizer.vocab_size}, or more to pad the vocabulary",
    )
    return tokenizer


def _tokenizer_origin(config: RunConfig) -> str:
    """What the manifest says of the tokenizer's origin: `train`, `char` or the given file's hash."""
    name = config.data.tokenizer
    return name if name in LEARNED else sha256_of(name)


def _check_prepared(config: RunConfig, folder: Path, scan: _Scan, tokenizer: Tokenizer | None) -> Manifest:
    """The manifest of an existing folder, which must hold what would be written; tokenizer: the one that is given."""
    remedy = "remove the folder or set data.path to another one"
    require((folder / FILE_NAME).exists(), f"{folder} exists and is no folder of prepared data; {remedy}")
    manifest = read_manifest(folder)
    size = config.model.vocab_size  # others than a trained tokenizer may have fewer tokens
    size = size if config.data.tokenizer == "train" else min(size, manifest.vocab_size)
    wanted = {
        f"text of {config.data.source}, sha256": (manifest.source_sha256, scan.sha256),
        "data.tokenizer": (manifest.tokenizer, _tokenizer_origin(config)),
        "model.vocab_size": (manifest.vocab_size, size),
        "data.end_token": (manifest.eod_id, manifest.eod_id if tokenizer is None else tokenizer.eod_id),
        "data.validation_fraction": (manifest.validation_fraction, config.data.validation_fraction),
    }
    for name, (found, asked) in wanted.items():
        require(
            found == asked,
            f"{folder} was prepared from {manifest.source} with another {name}: "
            f"found {found}, expected {asked}; {remedy}",
        )
    check_hashes(folder, manifest)
    return manifest


def _write(config: RunConfig, folder: Path, tokenizer: Tokenizer | None, scan: _Scan, progress: Progress) -> Manifest:
    """Everything that the folder holds."""
    if tokenizer is None:
        documents = _documents(config, "training the tokenizer", scan.total, progress)
        tokenizer = learned_tokenizer(config, documents)
    tokenizer.save(folder / "tokenizer.json")
    dtype = token_dtype(tokenizer.vocab_size)
    tokens = _tokenise(config, folder, tokenizer, scan, progress)
    shards = {}
    for name in SPLITS:
        entry = file_entry(folder / f"{name}.bin")
        shards[name] = Shards("megatron", dtype, (f"{name}.bin",), (tokens[name],), (entry.bytes,), (entry.sha256,))
    names = ["tokenizer.json", *(f"{split}.idx" for split in SPLITS)]
    entries = {name: file_entry(folder / name) for name in names}
    progress("counting bigrams", scan.total, scan.total)
    bigram = folder_loss(folder, dtype, tokenizer.vocab_size, config.data.seq_len)
    manifest = Manifest(
        format=FORMAT,
        source=describe_source(config.data.source),
        source_sha256=scan.sha256,
        validation_fraction=config.data.validation_fraction,
        tokenizer=_tokenizer_origin(config),
        tokenizer_sha256=entries["tokenizer.json"].sha256,
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id,
        splits={name: Split(tokens[name], scan.documents[name], scan.bytes[name], shards[name]) for name in SPLITS},
        files=entries,
        bigram_nats_per_token=bigram,
        bigram_seq_len=None if bigram is None else config.data.seq_len,
    )
    manifest.save(folder)
    return manifest


def _tokenise(config: RunConfig, folder: Path, tokenizer: Tokenizer, scan: _Scan, progress: Progress) -> dict[str, int]:
    """Write the .bin/.idx pairs; the number of tokens of each split."""
    dtype = token_dtype(tokenizer.vocab_size)
    with ExitStack() as files:
        writers = {name: files.enter_context(TokenWriter.open(folder / name, dtype)) for name in SPLITS}
        for batch in _batches(_documents(config, "tokenising", scan.total, progress)):
            encoded, _ = tokenizer.encode_batch([document for _, document in batch])
            for (split, _), ids in zip(batch, encoded, strict=True):
                writers[split].add(np.array([*ids, tokenizer.eod_id], dtype=np.int64))
    for name, writer in writers.items():
        require(
            writer.documents == scan.documents[name],
            f"{config.data.source} changed while it was read: {writer.documents} {name} documents, "
            f"{scan.documents[name]} at first; run again",
        )
    return {name: writer.tokens for name, writer in writers.items()}


def _batches(documents: Iterator[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    batch, characters = [], 0
    for split, document in documents:
        batch.append((split, document))
        characters += len(document)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch

"""Turns raw text into token shards: a tokenizer, train and validation .bin/.idx, and manifest.json."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import TypeAlias, TypeVar

import numpy as np

from llm.config import RunConfig
from llm.data.corpus import STDLIB, TextCorpus
from llm.data.corpus.pieces import divide
from llm.data.prepare.bigram import folder_loss
from llm.data.tokenizer import LEARNED, Tokenizer
from llm.data.tokens.folder import data_folder, is_url, load_manifest
from llm.data.tokens.hashes import check_hashes, file_entry, sampled_hash
from llm.data.tokens.manifest import FILE_NAME, FORMAT, SPLITS, Manifest, Shards, Split, TextCounts, read_manifest
from llm.data.tokens.megatron import TokenWriter, token_dtype
from llm.data.tokens.sums import sums_name, sums_of, write_sums
from llm.errors import InputError, require
from llm.files import complete_folder, sha256_of

T = TypeVar("T")
Progress = Callable[[str, int, int], None]
"""Called with the name of the stage, bytes of text done, and bytes in all (0: not known yet)."""

BATCH_CHARACTERS = 1 << 20  # text tokenised at a time
FEW = 20  # documents, below which the split goes through each of them


def split_of(digest: bytes, validation_fraction: float) -> str:
    """`train` or `validation`, by the SHA-256 of a document: the same text never lies in both."""
    below = int.from_bytes(digest[:8], "big") < int(validation_fraction * 2**64)
    return "validation" if below else "train"


Piece: TypeAlias = tuple[str, str, bool]
"""The split and text of a part of a document, and whether the document ends with it."""


class _Reading:
    """One pass over the corpus, which is counted and hashed as it goes by."""

    def __init__(self, corpus: TextCorpus, fraction: float, inside: bool) -> None:
        """fraction: for validation. inside: of each document, not of the documents.

        digest: SHA-256 over that of each document, in order. count, total: of documents, and of the bytes in them.
        """
        self.corpus, self._fraction, self._inside = corpus, fraction, inside
        self.digest, self.count, self.total = hashlib.sha256(), 0, 0
        self.documents: dict[str, int] = dict.fromkeys(SPLITS, 0)
        self.bytes: dict[str, int] = dict.fromkeys(SPLITS, 0)

    def pieces(self, stage: str, total: int, progress: Progress) -> Iterator[Piece]:
        """All text in order. InputError at its end where a split is empty."""
        for document in self.corpus.documents():
            parts, digest = [text.encode() for text in document], hashlib.sha256()
            for part in parts:
                digest.update(part)
            self.digest.update(digest.digest())
            self.count += 1
            if self._inside:
                shares = dict(zip(SPLITS, divide(parts, self._fraction), strict=True))
            else:
                shares = {split_of(digest.digest(), self._fraction): parts}
            for split, share in shares.items():
                self.documents[split] += bool(share)
                for i, part in enumerate(share):
                    yield split, part.decode(), i == len(share) - 1
                    self.bytes[split] += len(part)
                    self.total += len(part)
                    progress(stage, self.total, total)
        empty = [split for split in SPLITS if not self.documents[split]]
        require(
            not empty,
            f"the {' and '.join(empty)} split is empty: the corpus has {self.count} documents, "
            f"data.validation_fraction is {self._fraction}; use more text or another fraction",
        )


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
    corpus = TextCorpus(config.data.source, config.data.text_key, config.data.empty == "skip")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        return _check_prepared(config, folder, corpus, tokenizer, progress)
    try:
        with complete_folder(Path(os.path.realpath(folder)), 0o777) as temporary:
            return _write(config, temporary, corpus, tokenizer, progress)
    except OSError as error:
        if (folder / FILE_NAME).exists():  # another process was faster
            return _check_prepared(config, folder, corpus, tokenizer, progress)
        raise InputError(f"{folder} cannot be written: {error}") from error


def given_tokenizer(config: RunConfig) -> Tokenizer:
    """The tokenizer that data.tokenizer names; InputError as Tokenizer.load() and _fitting()."""
    return _fitting(config, Tokenizer.load(Path(config.data.tokenizer), config.data.end_token))


def learned_tokenizer(config: RunConfig, pieces: Iterator[Piece]) -> Tokenizer:
    """The tokenizer that data.tokenizer asks to make of the text; InputError as _fitting()."""
    if config.data.tokenizer == "char":  # a character of the validation split alone needs a token too
        return _fitting(config, Tokenizer.of_characters(text for _, text, _ in pieces))
    return Tokenizer.train((text for split, text, _ in pieces if split == "train"), config.model.vocab_size)


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


def _check_prepared(
    config: RunConfig, folder: Path, corpus: TextCorpus, tokenizer: Tokenizer | None, progress: Progress
) -> Manifest:
    """The manifest of an existing folder, which must hold what would be written; tokenizer: the one that is given."""
    remedy = "remove the folder or set data.path to another one"
    require((folder / FILE_NAME).exists(), f"{folder} exists and is no folder of prepared data; {remedy}")
    manifest, fraction = read_manifest(folder), config.data.validation_fraction

    def compare(name: str, found: object, asked: object) -> None:
        problem = f"{folder} was prepared from {manifest.source} with another {name}"
        require(found == asked, f"{problem}: found {found}, expected {asked}; {remedy}")

    compare("data.tokenizer", manifest.tokenizer, _tokenizer_origin(config))
    size = config.model.vocab_size  # others than a trained tokenizer may have fewer tokens
    size = size if config.data.tokenizer == "train" else min(size, manifest.vocab_size)
    compare("model.vocab_size", manifest.vocab_size, size)
    compare("data.end_token", manifest.eod_id, manifest.eod_id if tokenizer is None else tokenizer.eod_id)
    compare("data.validation_fraction", manifest.validation_fraction, fraction)
    text = _Reading(corpus, fraction, manifest.text is not None and manifest.text.inside)
    for _ in text.pieces("reading", sum(split.bytes or 0 for split in manifest.splits.values()), progress):
        pass
    compare(f"text of {config.data.source}, sha256", manifest.source_sha256, text.digest.hexdigest())
    check_hashes(folder, manifest)
    return manifest


def _write(
    config: RunConfig, folder: Path, corpus: TextCorpus, tokenizer: Tokenizer | None, progress: Progress
) -> Manifest:
    """Everything that the folder holds."""
    inside = sum(1 for _ in islice(corpus.documents(), FEW)) < FEW
    first, text = (_Reading(corpus, config.data.validation_fraction, inside) for _ in range(2))
    if tokenizer is None:
        tokenizer = learned_tokenizer(config, first.pieces("reading", 0, progress))
    tokenizer.save(folder / "tokenizer.json")
    tokens, cut_words = _tokenise(text.pieces("tokenising", first.total, progress), folder, tokenizer)
    same = inside == (text.count < FEW) and (first.count == 0 or first.digest.digest() == text.digest.digest())
    require(same, f"{config.data.source} changed while it was read; run again")
    dtype, shards = token_dtype(tokenizer.vocab_size), {}
    for name in SPLITS:
        path = folder / f"{name}.bin"
        size, sha256 = file_entry(path)
        sampled = sampled_hash([str(path)])
        write_sums(folder / sums_name(name), sums_of(path))
        shards[name] = Shards("megatron", dtype, (path.name,), (tokens[name],), (size,), (sha256,), sampled)
    names = ["tokenizer.json", *(f"{split}.idx" for split in SPLITS), *map(sums_name, SPLITS)]
    entries = {name: file_entry(folder / name) for name in names}
    progress("counting bigrams", text.total, text.total)
    bigram = folder_loss(folder, dtype, tokenizer.vocab_size, config.data.seq_len)
    manifest = Manifest(
        format=FORMAT,
        source="source files of the Python standard library" if config.data.source == STDLIB else config.data.source,
        source_sha256=text.digest.hexdigest(),
        validation_fraction=config.data.validation_fraction,
        tokenizer=_tokenizer_origin(config),
        tokenizer_sha256=entries["tokenizer.json"].sha256,
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id,
        splits={name: Split(tokens[name], text.documents[name], text.bytes[name], shards[name]) for name in SPLITS},
        files=entries,
        bigram_nats_per_token=bigram,
        bigram_seq_len=None if bigram is None else config.data.seq_len,
        text=TextCounts(inside, corpus.empty, corpus.others, cut_words),
    )
    manifest.save(folder)
    return manifest


def _tokenise(pieces: Iterator[Piece], folder: Path, tokenizer: Tokenizer) -> tuple[dict[str, int], int]:
    """Write the .bin/.idx pairs; the number of tokens of each split, and how many words were cut."""
    dtype, cut_words, begins = token_dtype(tokenizer.vocab_size), 0, True
    with ExitStack() as files:
        writers = {name: files.enter_context(TokenWriter.open(folder / name, dtype)) for name in SPLITS}
        for batch in gather(pieces, lambda piece: len(piece[1]), BATCH_CHARACTERS):
            ended = [begins, *(ends for _, _, ends in batch)]
            encoded, cut = tokenizer.encode_batch([text for _, text, _ in batch], ended[:-1])
            begins = ended[-1]
            cut_words += cut
            for (split, _, ends), ids in zip(batch, encoded, strict=True):
                end = [tokenizer.eod_id] * ends
                writers[split].add(np.array([*ids, *end], dtype=np.int64), ends)
    return {name: writer.tokens for name, writer in writers.items()}, cut_words


def gather(items: Iterable[T], size: Callable[[T], int], enough: int) -> Iterator[list[T]]:
    """The items in order, in lists that end where the sizes in them reach `enough`, and what is left."""
    found, total = list[T](), 0
    for item in items:
        found.append(item)
        total += size(item)
        if total >= enough:
            yield found
            found, total = [], 0
    if found:
        yield found

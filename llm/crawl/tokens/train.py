"""Learns a byte-level BPE (Sennrich et al. 2016) from the training split, or from a sample of it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import tokenizers
import xxhash
from tokenizers import decoders, models, pre_tokenizers, trainers

from llm.crawl.counts import Counts
from llm.crawl.dedup.clusters import split_of_cluster
from llm.crawl.documents import opened, tables
from llm.crawl.tokens.encode import imported
from llm.crawl.tokens.settings import TokenizerConfig
from llm.data.tokenizer import END_OF_DOCUMENT, Tokenizer
from llm.data.tokenizer.cuts import LONGEST_WORD, pieces
from llm.data.tokenizer.ranks import ENCODINGS
from llm.data.tokenizer.spelling import BYTES
from llm.errors import require

SEPARATOR = b"\xff"  # which no UTF-8 contains
SEED = 1  # another than that of the split, which depends on the same ids


def train(config: TokenizerConfig, texts: Iterable[str], library: str, folder: Path) -> Tokenizer:
    """The tokenizer of the texts, the same whichever library. folder: for a temporary file.

    Raises InputError where the text is too small for the vocabulary, or gigatoken is missing.
    """
    words = (piece for text in texts for piece in pieces(text, LONGEST_WORD)[0])
    if config.pattern == "gpt2" and library == "gigatoken":
        inner = _merged(_merges(words, config.vocab_size, folder))
    else:  # gigatoken learns by the pattern of GPT-2 alone
        inner = tokenizers.Tokenizer(models.BPE())
        inner.pre_tokenizer = _splitter(config.pattern)
        trainer = trainers.BpeTrainer(
            vocab_size=config.vocab_size,
            special_tokens=[END_OF_DOCUMENT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        inner.train_from_iterator(words, trainer)
    inner.pre_tokenizer, inner.decoder = _splitter(config.pattern), decoders.ByteLevel()
    tokenizer = Tokenizer(inner.to_str(pretty=True).encode())
    require(
        tokenizer.vocab_size == config.vocab_size,
        f"the training split is too small: it gives {tokenizer.vocab_size} tokens, tokenizer.vocab_size is "
        f"{config.vocab_size}; use more text or --tokenizer.vocab_size={tokenizer.vocab_size}",
    )
    return tokenizer


def sample(parts: Sequence[Path], max_bytes: int, validation_fraction: float, counts: Counts) -> Iterator[str]:
    """Texts of the training split, which are counted: all, or about max_bytes, chosen by the hash of their ids."""
    total = sum(map(_text_bytes, parts))
    share = min(1.0, max_bytes / max(1, total))
    for path in parts:
        for table in tables(path, "id", "text"):
            for id, text in zip(table["id"].to_pylist(), table["text"], strict=True):
                chosen = share == 1 or xxhash.xxh3_64_intdigest(id.to_bytes(8, "little"), SEED) < share * 2**64
                if chosen and split_of_cluster(id, validation_fraction) == "train":
                    size = text.as_buffer().size
                    if counts.bytes_in + size <= max_bytes:
                        counts.documents_in, counts.bytes_in = counts.documents_in + 1, counts.bytes_in + size
                        yield text.as_py()


def _text_bytes(path: Path) -> int:
    """The size of the texts of a part, by its metadata: before compression, which is a little more than the text."""
    with opened(path) as file:
        column = file.schema_arrow.names.index("text")
        groups = range(file.num_row_groups)
        return sum(file.metadata.row_group(i).column(column).total_uncompressed_size for i in groups)


def _splitter(pattern: str) -> pre_tokenizers.PreTokenizer:
    if pattern == "gpt2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    split = pre_tokenizers.Split(tokenizers.Regex(ENCODINGS[f"{pattern}_base"][0]), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _merges(words: Iterable[str], vocab_size: int, folder: Path) -> list[tuple[bytes, bytes]]:
    """What gigatoken learns: the merges of `tokenizers`, ties included."""
    gigatoken = imported()
    path = folder / "words.tmp"
    try:
        with path.open("wb") as file:
            for word in words:
                file.write(word.encode() + SEPARATOR)
        with _silence():
            return gigatoken.train_bpe(path, vocab_size, [END_OF_DOCUMENT], separator=SEPARATOR)[1]
    finally:
        path.unlink(missing_ok=True)


def _merged(merges: list[tuple[bytes, bytes]]) -> tokenizers.Tokenizer:
    """The tokenizer of these merges, its ids in the order of `tokenizers`: the end token, bytes, merges."""
    characters = {byte: character for character, byte in BYTES.items()}
    spelled = [("".join(characters[byte] for byte in a), "".join(characters[byte] for byte in b)) for a, b in merges]
    vocabulary = dict.fromkeys([END_OF_DOCUMENT, *BYTES, *(a + b for a, b in spelled)])
    inner = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, spelled))
    inner.add_special_tokens([END_OF_DOCUMENT])
    return inner


@contextmanager
def _silence() -> Iterator[None]:
    """What a library writes to the terminal behind Python's back is lost."""
    kept = {descriptor: os.dup(descriptor) for descriptor in (1, 2)}
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for descriptor in kept:
            os.dup2(nowhere, descriptor)
        yield
    finally:
        for descriptor, copy in kept.items():
            os.dup2(copy, descriptor)
            os.close(copy)
        os.close(nowhere)

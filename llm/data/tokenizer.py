"""Byte-level BPE (Sennrich et al. 2016; Radford et al. 2019) over Hugging Face's `tokenizers`.

Any text is a sequence of bytes and every byte has a token, so no text is unknown. If a text contains the
end-of-document token, it is encoded as ordinary characters: no document can end another.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from llm.errors import InputError, require

END_OF_DOCUMENT = "<|endoftext|>"
SMALLEST_VOCABULARY = 257  # the 256 bytes and the end-of-document token


def _byte_of_character() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable ones stand for themselves, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTES = _byte_of_character()


class Tokenizer:
    """A trained tokenizer. Token ids are 0 .. vocab_size - 1; `eod_id` ends a document."""

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        inner.encode_special_tokens = True
        inner.no_truncation()
        inner.no_padding()
        parts = json.loads(inner.to_str())
        kinds = (parts["model"]["type"], (parts["decoder"] or {}).get("type"))
        require(kinds == ("BPE", "ByteLevel"), f"the tokenizer is {kinds}; expected byte-level BPE")
        vocabulary = inner.get_vocab(with_added_tokens=True)
        require(END_OF_DOCUMENT in vocabulary, f"the tokenizer has no end-of-document token {END_OF_DOCUMENT}")
        self._inner = inner
        self._added = {int(i) for i in inner.get_added_tokens_decoder()}
        self.vocab_size: int = max(vocabulary.values()) + 1
        self.eod_id: int = vocabulary[END_OF_DOCUMENT]

    @classmethod
    def train(cls, documents: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn merges from the documents. InputError when the text is too small for vocab_size."""
        require(
            vocab_size >= SMALLEST_VOCABULARY,
            f"model.vocab_size is {vocab_size}; expected at least {SMALLEST_VOCABULARY} "
            "(every byte and the end-of-document token)",
        )
        inner = tokenizers.Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_DOCUMENT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        inner.train_from_iterator(documents, trainer)
        tokenizer = cls(inner)
        require(
            tokenizer.vocab_size == vocab_size,
            f"the corpus is too small: it gives {tokenizer.vocab_size} tokens, model.vocab_size is "
            f"{vocab_size}; use more text or --model.vocab_size={tokenizer.vocab_size}",
        )
        return tokenizer

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Read a tokenizer.json; InputError when it cannot be read or is not byte-level BPE."""
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise InputError(f"tokenizer {path} cannot be read: {error}") from error
        try:
            inner = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises no narrower class
            raise InputError(f"tokenizer {path} is not a tokenizer.json: {error}") from error
        try:
            return cls(inner)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error

    def save(self, path: Path) -> None:
        """Write tokenizer.json."""
        self._inner.save(str(path))

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; no end-of-document token is added."""
        return self._inner.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> tuple[list[list[int]], int]:
        """Token ids of each text, on all cores, and how many words were too long and have been cut."""
        return [found.ids for found in self._inner.encode_batch_fast(list(texts), add_special_tokens=False)], 0

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; bytes that are no UTF-8 become U+FFFD."""
        stream = self.stream()
        return "".join([stream.push(i) for i in ids]) + stream.finish()

    def stream(self) -> TextStream:
        """A decoder that takes one token at a time."""
        return TextStream(self)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that one token stands for; InputError when there is no such token."""
        spelling = self._inner.id_to_token(token) if token >= 0 else None
        if spelling is None:
            raise InputError(f"token {token} is not among the tokenizer's {self.vocab_size} tokens")
        if token in self._added:
            return spelling.encode()
        try:
            return bytes(BYTES[character] for character in spelling)
        except KeyError as error:
            raise InputError(f"token {token} ({spelling!r}) spells no bytes: {error}") from error


class TextStream:
    """Decodes tokens as they come; a character split over tokens appears with its last byte."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The characters that this token completes, maybe none."""
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def finish(self) -> str:
        """What is left: U+FFFD for a character that was never completed, or nothing."""
        return self._decoder.decode(b"", final=True)

"""Tokenizers of Hugging Face's `tokenizers`; trains byte-level BPE (Sennrich et al. 2016; Radford et al. 2019).

If a text contains a special token, that is encoded as ordinary characters: no document can end another.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import pairwise, repeat
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, models, pre_tokenizers, trainers

from llm.data.tokenizer.cuts import LONGEST_PIECE, LONGEST_WORD, pieces
from llm.data.tokenizer.ranks import SUFFIXES, read_ranks
from llm.data.tokenizer.spelling import BYTE_TOKEN, bytes_of, drop_prefix, keeps_text, prefixes_all, steps
from llm.errors import InputError, require
from llm.files import complete_file, read_up_to

END_OF_DOCUMENT = "<|endoftext|>"
END_TOKENS = (END_OF_DOCUMENT, "</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "<\uff5cend\u2581of\u2581sentence\uff5c>")
"""Where data.end_token is null, the one of these that a tokenizer has ends documents."""
LEARNED = ("train", "char")
"""The values of data.tokenizer that name no file."""
SMALLEST_VOCABULARY = 257  # the 256 bytes and the end-of-document token
BATCH = 1_024  # pieces that the library encodes at a time: what it returns takes far more memory than the ids
LARGEST = 1 << 26  # bytes of a file; the largest public ones have 35 MB
SHOWN = 30  # tokens and characters that an error lists


class Tokenizer:
    """A tokenizer. Ids are below vocab_size; `end_token`, of id `eod_id`, ends a document. None begins one."""

    def __init__(self, raw: bytes, end: str | int | None = None) -> None:
        """raw: a tokenizer.json; end: as data.end_token. InputError where raw is no tokenizer or has no such token."""
        try:
            self._inner = _open(raw)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # panics of the library's Rust code are no Exceptions
            raise InputError(f"is not a tokenizer.json: {error}") from error
        self.raw = raw
        parts, rest = (json.loads(self._inner.to_str()) for _ in range(2))
        vocabulary, added = self._inner.get_vocab(), self._inner.get_added_tokens_decoder()
        special = {token.content: i for i, token in added.items() if token.special}
        self.special: dict[str, int] = special
        """The ids of special tokens, by their spelling: `encode` gives none of them."""
        self.end_token = _end_token(vocabulary, special, end)
        self.eod_id: int = vocabulary[self.end_token]
        self.vocab_size: int = max(vocabulary.values()) + 1
        self._ids, self._added = frozenset(vocabulary.values()), frozenset(added)
        self._decoder = [step["type"] for step in steps(parts["decoder"])]
        fallback = vocabulary.items() if "ByteFallback" in self._decoder else ()
        self.byte_tokens = frozenset(i for token, i in fallback if BYTE_TOKEN.fullmatch(token))
        self.prefixes_all = prefixes_all(parts)
        """Whether text behind a special token begins anew: with the space, if any, that is put before a document."""
        self._keeps_text = keeps_text(parts)
        if self._keeps_text:
            drop_prefix(rest)
        self._rest = self._inner if rest == parts else _open(json.dumps(rest).encode())
        model = parts["model"]
        self._unknown: int | None = model.get("unk_id", vocabulary.get(model.get("unk_token") or ""))
        self._special = frozenset({*special.values(), self.eod_id} - {self._unknown})

    @classmethod
    def train(cls, documents: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn the merges of a byte-level BPE. InputError when the text is too small for vocab_size."""
        least = f"at least {SMALLEST_VOCABULARY} (every byte and the end-of-document token)"
        require(vocab_size >= SMALLEST_VOCABULARY, f"model.vocab_size is {vocab_size}; expected {least}")
        inner = tokenizers.Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_DOCUMENT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        inner.train_from_iterator((piece for text in documents for piece in pieces(text, LONGEST_WORD)[0]), trainer)
        tokenizer = cls(inner.to_str(pretty=True).encode())
        require(
            tokenizer.vocab_size == vocab_size,
            f"the corpus is too small: it gives {tokenizer.vocab_size} tokens, model.vocab_size is "
            f"{vocab_size}; use more text or --model.vocab_size={tokenizer.vocab_size}",
        )
        return tokenizer

    @classmethod
    def of_characters(cls, documents: Iterable[str]) -> Tokenizer:
        """A token for each character of the documents, in the order of Unicode, then the end-of-document token."""
        characters: set[str] = set()
        for text in documents:
            characters.update(text)
        vocabulary = {token: i for i, token in enumerate([*sorted(characters), END_OF_DOCUMENT])}
        inner = tokenizers.Tokenizer(models.WordLevel(vocabulary))
        inner.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
        inner.decoder = decoders.Fuse()
        inner.add_special_tokens([END_OF_DOCUMENT])
        return cls(inner.to_str(pretty=True).encode())

    @classmethod
    def load(cls, path: Path, end: str | int | None = None) -> Tokenizer:
        """Read a tokenizer.json, or the ranks of a tiktoken encoding (.tiktoken, .model).

        end: as data.end_token. InputError when the file cannot be read, and as __init__.
        """
        try:
            raw = read_up_to(path, LARGEST)
            if path.suffix in SUFFIXES:
                raw = read_ranks(path.stem, raw).to_str(pretty=True).encode()
            else:
                _try_apart(raw)
            return cls(raw, end)
        except OSError as error:
            raise InputError(f"tokenizer {path} cannot be read: {error}") from error
        except InputError as error:
            raise InputError(f"tokenizer {path}: {error}") from error

    def save(self, path: Path) -> None:
        """Write tokenizer.json: of one that was loaded from such a file, the same bytes."""
        with complete_file(path) as file:
            file.write(self.raw)

    def unused(self, size: int) -> list[int]:
        """The ids below `size` that no token has."""
        return [i for i in range(size) if i not in self._ids]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; no end-of-document token is added. InputError for text that has no tokens."""
        return self.encode_batch([text])[0][0]

    def encode_batch(self, texts: Sequence[str], begins: Iterable[bool] = repeat(True)) -> tuple[list[list[int]], int]:
        """Token ids of each text, on all cores, and how many cuts were forced (`pieces`). InputError as encode().

        begins: whether each begins a document. If it goes on with one, no space is put before it.
        """
        cut = [pieces(text, LONGEST_PIECE) for text in texts]
        firsts = [parts.pop(0) if first else "" for (parts, _), first in zip(cut, begins, strict=False)]
        found = self._encode(self._inner, firsts)
        rest = iter(self._encode(self._rest, [piece for parts, _ in cut for piece in parts]))
        for ids, (parts, _) in zip(found, cut, strict=True):
            for _ in parts:
                ids += next(rest)
        return found, sum(forced for _, forced in cut)

    def _encode(self, inner: tokenizers.Tokenizer, texts: Sequence[str]) -> list[list[int]]:
        found: list[list[int]] = []
        try:
            for i in range(0, len(texts), BATCH):
                encoded = inner.encode_batch_fast(list(texts[i : i + BATCH]), add_special_tokens=False)
                found += [encoding.ids for encoding in encoded]
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # panics of the library's Rust code are no Exceptions
            unknown = sorted({c for text in texts for c in text if inner.token_to_id(c) is None})[:SHOWN]
            what = f"{error}; characters that are no tokens: {', '.join(map(repr, unknown)) or 'none'}"
            raise InputError(f"the tokenizer cannot encode the text: {what}") from error
        for i, ids in enumerate(found):
            if not self._special.isdisjoint(ids):
                found[i] = self._encode_apart(inner, texts[i])
        return found

    def _encode_apart(self, inner: tokenizers.Tokenizer, text: str) -> list[int]:
        """Ids of a text in which the model took the spelling of special tokens for words: it is cut in two."""
        encoding = inner.encode(text, add_special_tokens=False)
        places = zip(encoding.ids, encoding.offsets, strict=True)
        cuts = [start + 1 for i, (start, stop) in places if i in self._special and stop - start > 1]
        if not cuts:
            problem = f"the text contains the end-of-document token {self.end_token!r}, which is one character"
            require(self.eod_id not in encoding.ids, f"{problem}; set data.end_token to a special token")
            return encoding.ids
        first, *rest = (text[a:b] for a, b in pairwise([0, *cuts, len(text)]))
        return [i for ids in self._encode(inner, [first]) + self._encode(self._rest, rest) for i in ids]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; bytes that are no UTF-8 become U+FFFD. InputError for an id without a token."""
        if unknown := [i for i in ids if i not in self._ids]:
            raise InputError(f"token {unknown[0]} is not among the tokenizer's {len(self._ids)} tokens")
        return self._inner.decode(list(ids), skip_special_tokens=False)

    def stream(self, after: Sequence[int] = ()) -> TextStream:
        """A decoder that takes one token at a time; `after`: the tokens of the text that they go on with."""
        return TextStream(self, after)

    def token_bytes(self, token: int) -> bytes | None:
        """The bytes of text that a token stands for, none for a special one; None where that cannot be told."""
        spelling = self._inner.id_to_token(token)
        if spelling is None or token == self._unknown or not self._keeps_text:
            return None
        if token in self._added:
            return b"" if token in self._special else spelling.encode()
        return b"" if token == self.eod_id else bytes_of(spelling, self._decoder)

    def text_bytes(self, counts: NDArray[np.int64], documents: int) -> int | None:
        """UTF-8 bytes of a text of so many documents in which id i occurs counts[i] times; None as token_bytes()."""
        total = 0 if self._rest is self._inner else -documents  # each began with a space that is not its own
        for i in np.flatnonzero(counts).tolist():
            spelled = self.token_bytes(i)
            if spelled is None:
                return None
            total += int(counts[i]) * len(spelled)
        return total


class TextStream:
    """Decodes tokens as they come; a character split over tokens appears when it is complete.

    Not tokenizers' DecodeStream, which has no end: a character that is cut there would be lost.
    """

    def __init__(self, tokenizer: Tokenizer, after: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(after)
        self._shown = len(after)  # how many of them are: later one, so that no other is taken for the first of a text

    def push(self, token: int) -> str:
        """The characters that this token completes, maybe none."""
        self._tokens.append(token)
        # Whether tokens that are bytes make a character is known when their run is over.
        return "" if token in self._tokenizer.byte_tokens else self._new(unless_ending="\ufffd")

    def finish(self) -> str:
        """What is left: U+FFFD for a character that was never completed, or nothing."""
        return self._new()

    def _new(self, unless_ending: str | None = None) -> str:
        text = self._tokenizer.decode(self._tokens)
        if unless_ending and text.endswith(unless_ending):
            return ""
        before = self._tokenizer.decode(self._tokens[: self._shown])
        self._tokens, self._shown = self._tokens[-1:], 1
        return text[len(before) :]


@lru_cache(2)
def _try_apart(raw: bytes) -> None:
    """InputError unless a process of its own can load a tokenizer.json, and encode with it, in its limits."""
    child = [sys.executable, "-I", str(Path(__file__).with_name("child.py"))]
    done = subprocess.run(child, input=raw, capture_output=True, env={"TOKENIZERS_PARALLELISM": "false"})
    why = f"killed by signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
    limits = "some seconds of the processor, 3 GiB and 100 tokens for a character"
    require(done.returncode == 0, f"cannot be loaded and used as one that does no harm ({why}); expected {limits}")


def _open(raw: bytes) -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer.from_buffer(raw)
    inner.encode_special_tokens = True
    inner.no_truncation()
    inner.no_padding()
    return inner


def _end_token(vocabulary: dict[str, int], special: dict[str, int], end: str | int | None) -> str:
    """The token that `end` (as data.end_token) names."""
    if end is None:
        found = [token for token in END_TOKENS if token in vocabulary]
        problem = f"has {len(found)} of the known end-of-document tokens ({', '.join(found or END_TOKENS)})"
    else:
        by_id = str(end).isdecimal()
        found = [token for token, i in vocabulary.items() if (str(i) == str(end) if by_id else token == end)]
        problem = f"has no token of {'id' if by_id else 'name'} {end}"
    shown = ", ".join(f"{token} ({i})" for token, i in list(special.items())[:SHOWN]) or "none"
    more = f" and {len(special) - SHOWN} more" if len(special) > SHOWN else ""
    remedy = "set data.end_token (of a Hugging Face model: eos_token_id in config.json) to one of its special tokens"
    require(len(found) == 1, f"{problem}; {remedy}: {shown}{more}")
    return found[0]

"""Encodes documents with gigatoken, and compares what it gives with Hugging Face's tokenizers, the reference."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from llm.data.tokenizer import Tokenizer
from llm.data.tokenizer.cuts import LONGEST_PIECE, pieces
from llm.errors import InputError

Ids: TypeAlias = NDArray[np.uint32]
REMEDY = "set tokenize.library=tokenizers"
RENEWED = 1 << 30  # bytes of text after which gigatoken's cache of words begins anew: it only grows
BEFORE_SPACE = re.compile(rb"(?s).+[!-~\xb0-\xbf](?= )")  # a byte with which no white space of Unicode ends
SHOWN = 8  # ids and characters that an error shows
# Marks, joiners, cases, white space, digits, scripts, unassigned characters, and words longer than the longest piece.
UNUSUAL = (
    "\0\x01\x1c\x1d\x85\xa0\u1680\u2028\u2029\u202f\u3000\ufeff\u180e\u200b",
    "a\u0301e\u0308 \u0301\u0301 \u0915\u094d\u0937\u093f \u0e01\u0e33 Z\u0351\u036b\u0343\u036a",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea\U0001f1eb\u2764\ufe0f\U0001f44d\U0001f3fd",
    "can't CAN'T I'M we\u2019ve 'S '\u017f 'LL'll ''re' x'Ve\u0130 \u01c5 \u1e9e \u02b0\u02b1 \u2167",
    "  a   b\t\tc \n d\r\n\r\n  e\n\n\n f \r g\u00a0\u00a0h  \n",
    "1234567 3.14 \u0663\u0664\u0665 \u096a\u096b \u00bd \u2460\u2461 12ab34 \U0001d7d8",
    "\u65e5\u672c\u8a9e\u306e\u6587\u3067\u3059\u3002\uff41 \u1112\u1161\u11ab\ud55c \u05e9\u05dc \u0645\u0631",
    "https://a.b/c?d=e&f#g <p>--==**//\\\\..!!?? {[(_)]} $x_1 @\u20ac\n//\n",
    "\ufffd\ufffe\uffff\ue000\U000f0000\U0010ffff\U000e0001\U0001f9ff\u0378",
    "word" * 5_000,
    " \n\t" * 6_000,
    "\u0e04\u0e33" * 9_000,
)


class Encoder:
    """Token ids of many texts: those of Tokenizer.encode()."""

    def __init__(self, tokenizer: Tokenizer, library: str) -> None:
        """library: as tokenize.library. InputError where gigatoken is missing or gives other ids for UNUSUAL texts."""
        self.tokenizer, self._done = tokenizer, 0
        self._fast: Any = None
        if library == "gigatoken":
            parts = json.loads(tokenizer.raw)
            added = [token["content"] for token in parts["added_tokens"]]
            # Without special tokens, so that a text that contains one is text.
            parts["added_tokens"] = [token for token in parts["added_tokens"] if not token["special"]]
            self._raw = json.dumps(parts | {"post_processor": None, "truncation": None, "padding": None})
            self._fast = _open(self._raw)
            texts = ["", "".join(UNUSUAL), *UNUSUAL, *added, *(f"a{token}b {token} " for token in added)]
            for i, found in enumerate(self.encode(pa.array(texts, pa.large_string()))):
                self.check(texts[i], found, f"text {i} of those that every tokenizer is tried with")

    def encode(self, texts: pa.LargeStringArray) -> list[Ids]:
        """The ids of each text. InputError for a text that has no tokens."""
        if self._fast is None:
            return [np.array(ids, np.uint32) for ids in self.tokenizer.encode_batch(texts.to_pylist())[0]]
        starts = bounds(texts)
        self._done += int(starts[-1] - starts[0])
        if self._done > RENEWED:
            self._fast, self._done = _open(self._raw), 0
        letters = memoryview(texts.buffers()[2] or b"")
        # One by one: for a batch it imports awkward, which takes longer than to encode 15 MB.
        return [self._encode(bytes(letters[start:stop])) for start, stop in pairwise(starts.tolist())]

    def _encode(self, text: bytes) -> Ids:
        if not _has_cuts(text):
            cut, forced = pieces(text.decode(), LONGEST_PIECE)
            if forced:  # the reference gets these pieces, and the cuts show
                return np.concatenate([self._fast.encode(piece) for piece in cut])
        return self._fast.encode(text)

    def check(self, text: str, found: Ids, name: str) -> None:
        """Raise InputError, with the place in the text called `name`, unless `found` are the reference's ids."""
        expected, ids = self.tokenizer.encode(text), found.tolist()
        if ids != expected:
            unequal = (i for i, (a, b) in enumerate(zip(ids, expected, strict=False)) if a != b)
            at = next(unequal, min(len(ids), len(expected)))
            place = len(self.tokenizer.decode(expected[:at]))
            raise InputError(
                f"{name}: from character {place} on ({text[place : place + SHOWN]!r}) gigatoken gives the tokens "
                f"{ids[at : at + SHOWN]}, tokenizers {expected[at : at + SHOWN]}; {REMEDY}"
            )


def _has_cuts(text: bytes) -> bool:
    """Whether `pieces` surely finds a space for each cut: bytes have one as often as the characters should."""
    start = 0
    while len(text) - start > LONGEST_PIECE:
        cut = BEFORE_SPACE.match(text, start, start + LONGEST_PIECE)
        if cut is None:
            return False
        start = cut.end()
    return True


def bounds(texts: pa.LargeStringArray) -> NDArray[np.int64]:
    """The byte of the array's buffer of text at which each text begins, and the last one ends [n + 1]."""
    return np.frombuffer(texts.buffers()[1], np.int64)[texts.offset : texts.offset + len(texts) + 1]


def imported() -> Any:
    """gigatoken; InputError where it is missing."""
    try:
        import gigatoken
    except ImportError as error:
        raise InputError(f"gigatoken cannot be imported ({error}); pip install 'ingot[crawl]', or {REMEDY}") from error
    return gigatoken


def _open(raw: str) -> Any:
    try:
        return imported().Tokenizer.from_json(raw)
    except RuntimeError as error:
        why = str(error).strip().split("\n")[0]
        raise InputError(f"gigatoken cannot read the tokenizer: {why}; {REMEDY}") from error

"""Encodes documents with gigatoken, and holds what comes out against Hugging Face's tokenizers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from llm.data.tokenizer import Tokenizer
from llm.data.tokenizer.cuts import LONGEST_PIECE, pieces
from llm.errors import InputError, require

Library: TypeAlias = Literal["gigatoken", "tokenizers"]
Ids: TypeAlias = NDArray[np.uint32]
REMEDY = "set tokenize.library=tokenizers"
RENEWED = 1 << 30  # bytes of text after which gigatoken's cache of words begins anew: it only grows
SHOWN = 8  # ids that an error shows
# Where splitters and byte-level encoders have been wrong: marks, joiners, cases, white space, digits, and the longest.
UNUSUAL = (
    "",
    " ",
    "\0\x01\x1c\x1d\x85\xa0\u1680\u2028\u2029\u202f\u3000\ufeff\u180e\u200b",
    "a\u0301e\u0308 \u0301\u0301 \u0915\u094d\u0937\u093f \u0e01\u0e33 Z\u0351\u036b\u0343\u036a\u0302\u036b\u033d\u034f",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea\U0001f1eb\u2764\ufe0f\U0001f44d\U0001f3fd",
    "can't CAN'T I'M we\u2019ve 'S 'ſ 'LL'll ''re' x'Ve\u0130 \u01c5 \u1e9e \u02b0\u02b1 Ⅷ",
    "  a   b\t\tc \n d\r\n\r\n  e\n\n\n f \r g\u00a0\u00a0h  \n",
    "1234567 3.14 \u0663\u0664\u0665 \u096a\u096b \u00bd \u2460\u2461 12ab34 \U0001d7d8",
    "\u65e5\u672c\u8a9e\u306e\u6587\u3067\u3059\u3002\uff41\uff22 \u1112\u1161\u11ab\ud55c \u05e9\u05dc\u05d5\u05dd \u0645\u0631",
    "https://a.b/c?d=e&f#g <p>--==**//\\\\..!!?? {[(_)]} $x_1 @\u20ac\n//\n",
    "\ufffd\ufffe\uffff\ue000\U000f0000\U0010ffff\U000e0001\U0001f9ff\u0378",
    "word" * LONGEST_PIECE,
    " \n\t" * 9_000,
    "\u0e04\u0e33" * LONGEST_PIECE,
)


class Encoder:
    """Token ids of many texts: those of Tokenizer.encode(), which is called the reference below."""

    def __init__(self, tokenizer: Tokenizer, library: Library) -> None:
        """Encodes UNUSUAL texts both ways. InputError where they differ, or gigatoken is missing or of no use here."""
        self.tokenizer, self._done = tokenizer, 0
        self._fast = None
        if library == "gigatoken":
            self._raw, added = _ordinary(tokenizer.raw)
            self._fast = open_gigatoken(self._raw)
            texts = [*UNUSUAL, *(text for token in added for text in (token, f"a{token}b", f" {token} "))]
            found = self.encode(pa.array([*texts, "".join(UNUSUAL)], pa.large_string()))
            for i, text in enumerate([*texts, "".join(UNUSUAL)]):
                self.check(text, found[i], f"text {i} of those that every tokenizer is tried with")

    def encode(self, texts: pa.LargeStringArray) -> list[Ids]:
        """The ids of each text. InputError for a text that has no tokens."""
        if self._fast is None:
            return [np.array(ids, np.uint32) for ids in self.tokenizer.encode_batch(texts.to_pylist())[0]]
        bounds = np.frombuffer(texts.buffers()[1], np.int64)[texts.offset : texts.offset + len(texts) + 1]
        self._done += int(bounds[-1] - bounds[0])
        if self._done > RENEWED:
            self._fast, self._done = open_gigatoken(self._raw), 0
        found = self._encode(self._fast, bounds, texts.buffers()[2])
        for i in np.flatnonzero(np.diff(bounds) > LONGEST_PIECE).tolist():
            cut, forced = pieces(texts[i].as_py(), LONGEST_PIECE)
            if forced:  # the reference never sees more at once, and there the pieces show
                found[i] = np.concatenate([self._fast.encode(piece) for piece in cut])
        return found

    def _encode(self, fast: Any, bounds: NDArray[np.int64], text: pa.Buffer | None) -> list[Ids]:
        """The texts lie between `bounds` of `text`, which is not copied."""
        import awkward as ak

        letters = ak.contents.NumpyArray(np.frombuffer(text or b"", np.uint8), parameters={"__array__": "char"})
        rows = ak.contents.ListOffsetArray(ak.index.Index64(bounds), letters, parameters={"__array__": "string"})
        # In this thread: there is a task for each core.
        layout = fast.encode_batch(ak.Array(rows), parallel=False).layout
        ids, ends = np.asarray(layout.content.data), np.asarray(layout.offsets.data).tolist()
        return [ids[start:stop] for start, stop in pairwise(ends)]

    def check(self, text: str, found: Ids, name: str) -> None:
        """Raise InputError, with the place in the text that is called `name`, unless `found` are the reference's ids."""
        expected, ids = self.tokenizer.encode(text), found.tolist()
        if ids != expected:
            equal = (i for i, (a, b) in enumerate(zip(ids, expected, strict=False)) if a != b)
            at = next(equal, min(len(ids), len(expected)))
            place = len(self.tokenizer.decode(expected[:at]))
            raise InputError(
                f"{name}: from character {place} on ({text[place : place + SHOWN]!r}) gigatoken gives the tokens "
                f"{ids[at : at + SHOWN]}, tokenizers {expected[at : at + SHOWN]}; {REMEDY}"
            )


def _ordinary(raw: bytes) -> tuple[str, list[str]]:
    """The tokenizer.json without special tokens, so that a text that contains one is text; and what all are called."""
    parts = json.loads(raw)
    added = parts["added_tokens"]
    parts |= {"added_tokens": [token for token in added if not token["special"]], "post_processor": None}
    return json.dumps(parts | {"truncation": None, "padding": None}), [token["content"] for token in added]


def open_gigatoken(raw: str) -> Any:
    """gigatoken's tokenizer of a tokenizer.json. InputError where it is missing or refuses it."""
    try:
        import gigatoken

        return gigatoken.Tokenizer.from_json(raw)
    except ImportError as error:
        raise InputError(f"gigatoken cannot be imported ({error}); run pip install 'ingot[crawl]', or {REMEDY}") from error
    except RuntimeError as error:
        why = str(error).strip().split("\n")[0]
        raise InputError(f"gigatoken cannot read the tokenizer: {why}; {REMEDY}") from error

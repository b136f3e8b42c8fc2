"""How the steps of a tokenizer.json spell text: which bytes a token stands for, and what they do to the text."""

from __future__ import annotations

import re
from typing import Any

Step = dict[str, Any]

# GPT-2's spelling of bytes: printable ones stand for themselves, the others from U+0100 on.
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = sorted(set(range(256)) - set(_PRINTABLE))
BYTES = {chr(byte): byte for byte in _PRINTABLE} | {chr(0x100 + i): byte for i, byte in enumerate(_OTHERS)}
SPACE = "▁"  # of SentencePiece
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
KEEP_TEXT = ("Prepend", "NFC", "ByteLevel", "Metaspace", "Split", "Digits", "Punctuation")


def steps(part: Step | None) -> list[Step]:
    """The steps of a normalizer, pre-tokenizer or decoder, those of sequences one after another."""
    if part is None or part["type"] != "Sequence":
        return [] if part is None else [part]
    inner = next(value for key, value in part.items() if key != "type")
    return [step for each in inner for step in steps(each)]


def bytes_of(spelling: str, decoder: list[str]) -> bytes | None:
    """The bytes of a token that is spelled so, None where decoders of these types do not tell them."""
    if decoder == ["ByteLevel"]:
        return bytes(BYTES[character] for character in spelling) if set(spelling) <= BYTES.keys() else None
    if not decoder or not set(decoder) <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        return None
    byte = BYTE_TOKEN.fullmatch(spelling) if "ByteFallback" in decoder else None
    return bytes.fromhex(byte[1]) if byte else spelling.replace(SPACE, " ").encode()


def keeps_text(parts: Step) -> bool:
    """Whether the text can be told from the tokens. Unicode's composition (NFC) counts as keeping it."""
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    every = [*steps(parts["normalizer"]), *steps(parts["pre_tokenizer"])]
    return all(s == spaces or (s["type"] in KEEP_TEXT and s.get("behavior") != "Removed") for s in every)


def prefixes_all(parts: Step) -> bool:
    """Whether a space is put before a text behind a special token too, not before the first of a document alone."""
    return any(
        "prepend" in step or step.get("prepend_scheme") == "always" or step.get("add_prefix_space")
        for step in _first_steps(parts)
    )


def drop_prefix(parts: Step) -> None:
    """Make it the tokenizer.json for the rest of a text: no space is put before what it is given."""
    for step in _first_steps(parts):
        for key, nothing in (("prepend", ""), ("prepend_scheme", "never"), ("add_prefix_space", False)):
            if key in step:
                step[key] = nothing


def _first_steps(parts: Step) -> list[Step]:
    """Those that may put a space before a text."""
    return [*steps(parts["normalizer"]), *steps(parts["pre_tokenizer"])[:1]]

"""Reads labelled texts, JSON lines {"text": ..., "label": ...}, and splits them by the hash of the text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from llm.data.prepare.tokenise import split_of
from llm.errors import InputError, require
from llm.typed import shown

EXPECTED = 'expected {"text": "...", "label": "..."}, neither of them empty'


class Labelled(NamedTuple):
    """The texts of a file and their labels."""

    labels: tuple[str, ...]
    """Each once, in the order of the alphabet: their numbers."""
    train: list[tuple[str, int]]
    """Texts with the numbers of their labels."""
    validation: list[tuple[str, int]]
    sha256: str
    """Of the file."""


def read_labelled(path: Path, validation_fraction: float) -> Labelled:
    """Read a file; equal texts come into the same split.

    Raises InputError, naming the line, for what is no labelled text; and where there are fewer than two labels, or a
    split is empty.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"data.source {path} cannot be read: {error.strerror}; {EXPECTED} in each line") from error
    pairs = list(_lines(raw, path))
    labels = tuple(sorted({label for _, label in pairs}))
    found = f"{path} has {len(pairs)} texts of {len(labels)} labels ({', '.join(labels[:3])})"
    require(len(labels) > 1, f"{found}; expected two labels or more, else there is nothing to tell apart")
    numbers = {label: number for number, label in enumerate(labels)}
    splits: dict[str, list[tuple[str, int]]] = {"train": [], "validation": []}
    for text, label in pairs:
        digest = hashlib.sha256(text.encode()).digest()
        splits[split_of(digest, validation_fraction)].append((text, numbers[label]))
    for split, texts in splits.items():
        advice = f"use more of them, or another data.validation_fraction than {validation_fraction}"
        require(bool(texts), f"{path} has {len(pairs)} texts, none of them for {split}; {advice}")
    return Labelled(labels, splits["train"], splits["validation"], hashlib.sha256(raw).hexdigest())


def _lines(raw: bytes, path: Path) -> Iterator[tuple[str, str]]:
    """Text and label of each line that is not empty."""
    for number, line in enumerate(raw.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {number}: not JSON: {error}; {EXPECTED}") from error
        text, label = (value.get("text"), value.get("label")) if isinstance(value, dict) else (None, None)
        if not (isinstance(text, str) and text.strip() and isinstance(label, str) and label.strip()):
            raise InputError(f"{path}, line {number}: found {shown(value)}; {EXPECTED}")
        yield text, label

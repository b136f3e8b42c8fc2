"""A tokenizer.json that hangs, fills the memory or ends the process is refused: it is tried in a process of its own."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hostile import bounded, check_count

from llm.data.tokenizer import LARGEST, Tokenizer
from llm.errors import InputError

GOOD = json.loads(Tokenizer.train(["def f(x): return x\n"] * 50, 261).raw)


def normalizer(*steps: dict[str, Any]) -> dict[str, Any]:
    return GOOD | {"normalizer": {"type": "Sequence", "normalizers": list(steps)}}


def doubled(times: int) -> dict[str, Any]:
    """A text of a's becomes 2^times as long."""
    return normalizer(*[{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * times)


def split(regex: str) -> dict[str, Any]:
    return GOOD | {
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    }


CASES: dict[str, bytes] = {
    "doubled 40 times": json.dumps(doubled(40)).encode(),
    "doubled 200 times": json.dumps(doubled(200)).encode(),
    "doubled 9 times": json.dumps(doubled(9)).encode(),
    "a long replacement": json.dumps(
        normalizer({"type": "Replace", "pattern": {"String": "a"}, "content": "b" * 5_000_000})
    ).encode(),
    "a regex of no end": json.dumps(split("(a")).encode(),
    "nested": b"[" * 1_000_000,
    "nested normalizers": b'{"normalizer":' * 100_000,
    "no JSON": b"\x00" * 1000,
    "empty": b"",
    "a list": b"[]",
    "an id of 2^32": json.dumps(GOOD).replace('"<|endoftext|>": 0', '"<|endoftext|>": 4294967296').encode(),
    "no end token": json.dumps(GOOD).replace("<|endoftext|>", "x").encode(),
}


@pytest.mark.parametrize("case", CASES)
def test_a_hostile_tokenizer_is_refused(case: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(CASES[case])
    with bounded(children=True), pytest.raises(InputError, match=r"tokenizer\.json") as refusal:
        Tokenizer.load(path)
    assert len(str(refusal.value)) < 2000


@pytest.mark.parametrize("kind", ["pipe", "zeros", "too long"])
def test_what_is_no_tokenizer_is_not_read(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "zeros":
        path.symlink_to("/dev/zero")
    else:
        path.touch()
        os.truncate(path, LARGEST + 1)
    with bounded(children=True), pytest.raises(InputError, match=r"tokenizer\.json"):
        Tokenizer.load(path)


def test_the_cases_are_counted() -> None:
    check_count(__name__)

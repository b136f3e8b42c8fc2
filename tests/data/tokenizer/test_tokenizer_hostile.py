"""A tokenizer.json that hangs, fills the memory or ends the process is refused: it is tried in a process of its own."""

from __future__ import annotations

import io
import json
import os
import resource
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from hostile import bounded, check_count

from llm.data.tokenizer import LARGEST, Tokenizer, child
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


def tried(raw: bytes, monkeypatch: pytest.MonkeyPatch) -> tuple[int, dict[int, tuple[int, int]]]:
    """The exit code of the program that tries a file, run in this process, and the limits that it would set."""
    limits: dict[int, tuple[int, int]] = {}
    monkeypatch.setattr(resource, "setrlimit", limits.__setitem__)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
    return child.main(), limits


def test_a_trial_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason of a refusal may be any of the limits: a file that one does not stop meets another."""
    for more, seconds in ((0, 2), (6 << 20, 5)):
        code, limits = tried(json.dumps(GOOD).encode() + b" " * more, monkeypatch)
        assert code == 0
        memory = 3 << 30, 3 << 30
        assert limits == {
            resource.RLIMIT_CPU: (seconds, seconds), resource.RLIMIT_AS: memory, resource.RLIMIT_CORE: (0, 0)
        }  # fmt: skip


@pytest.mark.parametrize("at", ["from_buffer", "to_str", "encode"])
def test_a_trial_that_lacks_memory_fails(at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Python is told of it. Other errors are those of whoever loads the file."""
    for error, code in ((MemoryError, 1), (ValueError, 0)):
        inner = Mock()
        inner.from_buffer.return_value, inner.encode.return_value.ids = inner, []
        getattr(inner, at).side_effect = error
        monkeypatch.setattr(child, "Tokenizer", inner)
        assert tried(b"", monkeypatch)[0] == code


@pytest.mark.parametrize("only", [r"\Aa{30}\x00\z", r"\A!{200}\z", r"\A\n{200}\z"])
def test_a_text_is_tried_alone_too(only: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here nothing else becomes long."""
    long = normalizer({"type": "Replace", "pattern": {"Regex": only}, "content": "b" * 300_000})
    assert tried(json.dumps(long).encode(), monkeypatch)[0] == 1


def test_the_cases_are_counted() -> None:
    check_count(__name__)

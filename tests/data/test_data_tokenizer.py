"""Byte-level BPE: nothing is lost, nothing is mistaken for the end of a document."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llm.data.tokenizer import END_OF_DOCUMENT, Tokenizer
from llm.errors import InputError

TEXT = [
    "def add(a, b):\n    return a + b\n" * 20,
    "The quick brown fox — naïve café 日本語 🎉🎉 " * 20,
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(iter(TEXT), 300)


def test_training_gives_the_size_asked_for(tokenizer: Tokenizer):
    assert tokenizer.vocab_size == 300
    assert tokenizer.eod_id == 0
    assert max(max(tokenizer.encode(text)) for text in TEXT) == 299
    assert {b for i in range(1, 300) for b in tokenizer.token_bytes(i) or b""} == set(range(256))


def test_training_is_repeatable(tokenizer: Tokenizer, tmp_path: Path):
    tokenizer.save(tmp_path / "a.json")
    Tokenizer.train(iter(TEXT), 300).save(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
@settings(max_examples=300, deadline=None)
@example(END_OF_DOCUMENT)
@example(f"x{END_OF_DOCUMENT}\n y")
@example("\r\n\t  \x00 a\u0301 \ufeff\U0010ffff")
def test_round_trip(tokenizer: Tokenizer, text: str):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_batch([text, "", text]) == ([ids, [], ids], 0)
    assert tokenizer.eod_id not in ids


def test_saved_and_loaded_is_the_same(tokenizer: Tokenizer, tmp_path: Path):
    tokenizer.save(tmp_path / "t.json")
    loaded = Tokenizer.load(tmp_path / "t.json")
    text = TEXT[0] + TEXT[1] + END_OF_DOCUMENT
    assert loaded.encode(text) == tokenizer.encode(text)
    assert (loaded.vocab_size, loaded.eod_id) == (300, 0)
    assert loaded.decode(loaded.encode(text)) == text


@given(ids=st.lists(st.integers(1, 299), max_size=40))
@settings(max_examples=300, deadline=None)
def test_streaming_gives_what_decoding_at_once_gives(tokenizer: Tokenizer, ids: list[int]):
    stream = tokenizer.stream()
    streamed = "".join([stream.push(i) for i in ids]) + stream.finish()
    raw = b"".join(tokenizer.token_bytes(i) or b"" for i in ids)
    assert streamed == raw.decode("utf-8", errors="replace") == tokenizer.decode(ids)


def test_a_split_character_appears_with_its_last_byte(tokenizer: Tokenizer):
    ids = tokenizer.encode("\U0001f9ff")  # unseen in training, so spread over tokens
    assert len(ids) >= 3
    stream = tokenizer.stream()
    assert [stream.push(i) for i in ids] == [*[""] * (len(ids) - 1), "\U0001f9ff"]
    assert stream.finish() == ""
    stream.push(ids[0])
    assert stream.finish() == "\ufffd"


def test_too_small_a_corpus_or_vocabulary_is_refused():
    with pytest.raises(InputError, match=r"corpus is too small: it gives \d+ tokens"):
        Tokenizer.train(iter(["tiny"]), 1000)
    with pytest.raises(InputError, match="expected at least 257"):
        Tokenizer.train(iter(TEXT), 256)


def test_a_tokenizer_cannot_cut_or_pad(tokenizer: Tokenizer, tmp_path: Path):
    tokenizer.save(tmp_path / "t.json")
    parts = json.loads((tmp_path / "t.json").read_text())
    parts["truncation"] = {
        "direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0
    }  # fmt: skip
    (tmp_path / "t.json").write_text(json.dumps(parts))
    assert Tokenizer.load(tmp_path / "t.json").encode(TEXT[0]) == tokenizer.encode(TEXT[0])


@pytest.mark.parametrize("change", ["", "[]", '{"model": 3}'])
def test_what_is_no_tokenizer_is_refused(tmp_path: Path, change: str):
    (tmp_path / "t.json").write_text(change)
    with pytest.raises(InputError, match=r"t\.json: is not a tokenizer\.json: "):
        Tokenizer.load(tmp_path / "t.json")


def test_unreadable_tokenizers_are_refused(tmp_path: Path):
    with pytest.raises(InputError, match="cannot be read"):
        Tokenizer.load(tmp_path / "none.json")
    (tmp_path / "t.json").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="is not a tokenizer"):
        Tokenizer.load(tmp_path / "t.json")

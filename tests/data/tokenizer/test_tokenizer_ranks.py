"""Rank files of tiktoken give the ids that tiktoken gives."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
import tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiktoken_ext import openai_public
from tokenizer_kinds import LLAMA3_PATTERN, lines, ranks, real_text

from llm.data.tokenizer import Tokenizer
from llm.data.tokenizer.ranks import ENCODINGS, read_ranks
from llm.errors import InputError

PUBLIC = ("gpt2", "r50k_base", "p50k_base", "cl100k_base", "o200k_base")
NAMES = (*PUBLIC, "tokenizer")


@cache
def oracle(name: str) -> tiktoken.Encoding:
    """tiktoken's own encoding of that name over the small ranks: its public files hold the patterns and tokens."""
    if name == "tokenizer":
        return tiktoken.Encoding(
            name, pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks(), special_tokens=ENCODINGS[name][1]
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: ranks())
        patch.setattr(openai_public, "data_gym_to_mergeable_bpe_ranks", lambda *_, **__: ranks())
        options = getattr(openai_public, name)()
    options.pop("explicit_n_vocab", None)
    return tiktoken.Encoding(**options)


@cache
def ours(name: str) -> Tokenizer:
    return Tokenizer(read_ranks(name, lines(ranks())).to_str().encode())


SPACES = st.text(" \n\r\t\u00a0\u3000\u2028\x85\x1c", min_size=1, max_size=6)
MIXED = st.text(
    "aAzZéÉß\u017f\u212aİ\u0131ǅʰ'sStTlLvVrRmMdDeE 019٣½,.!/-_\n\r\t日本e\u0301न\u093f🎉\u200d\x00", max_size=30
)
WORDS = st.sampled_from(
    [
        "zqzq",
        "unreachable",
        " \n \n \n",
        "'LL",
        "'\u017f",
        "don't",
        "x'S ",
        "12345",
        "<|endoftext|>",
        "\n\n",
        "\n  ",
        "!\n/",
    ]
)
ANY = st.text(st.characters(exclude_categories=["Cs", "Cn", "Co"], max_codepoint=0x2FFF), max_size=20)


@pytest.mark.parametrize("name", NAMES)
@given(parts=st.lists(SPACES | MIXED | WORDS | ANY, max_size=6))
@settings(max_examples=80, deadline=None)
@example(["a\n  "])
@example(["!\n/"])
@example(["a\n\n  \n x", "  "])
def test_ids_are_those_of_tiktoken(name: str, parts: list[str]):
    text = "".join(parts)
    assert ours(name).encode(text) == oracle(name).encode_ordinary(text)
    assert ours(name).decode(ours(name).encode(text)) == text


@pytest.mark.parametrize("name", NAMES)
def test_real_text_gives_the_ids_of_tiktoken(name: str):
    assert ours(name).encode(real_text()) == oracle(name).encode_ordinary(real_text())


@pytest.mark.parametrize("name", NAMES)
def test_special_tokens_have_their_ids(name: str):
    for token in oracle(name).special_tokens_set:
        assert ours(name)._inner.token_to_id(token) == oracle(name).encode_single_token(token)
    assert ours(name).vocab_size == oracle(name).n_vocab
    assert ours(name).end_token == ("<|end_of_text|>" if name == "tokenizer" else "<|endoftext|>")
    assert ours(name).eod_id == {"cl100k_base": 100257, "o200k_base": 199999, "tokenizer": 128001}.get(name, 50256)


def test_llama3_has_256_special_tokens():
    special = ENCODINGS["tokenizer"][1]
    assert sorted(special.values()) == list(range(128000, 128256))
    assert [special[f"<|{name}|>"] for name in ("start_header_id", "eot_id")] == [128006, 128009]
    assert special["<|reserved_special_token_250|>"] == 128255


def test_a_rank_file_is_loaded_by_its_name(tmp_path: Path):
    (tmp_path / "cl100k_base.tiktoken").write_bytes(lines(ranks()).replace(b"\n", b"\r\n") + b"\n")
    loaded = Tokenizer.load(tmp_path / "cl100k_base.tiktoken")
    assert loaded.raw == Tokenizer(read_ranks("cl100k_base", lines(ranks())).to_str(pretty=True).encode()).raw
    loaded.save(tmp_path / "tokenizer.json")
    assert Tokenizer.load(tmp_path / "tokenizer.json").encode(real_text()) == loaded.encode(real_text())
    (tmp_path / "mine.tiktoken").write_bytes(lines(ranks()))
    with pytest.raises(InputError, match=r"mine.tiktoken: the encoding 'mine' is not known; expected gpt2.tiktoken, "):
        Tokenizer.load(tmp_path / "mine.tiktoken")


WITHOUT_A = {token: rank for token, rank in ranks().items() if token != b"a"}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "some bytes have no rank"),
        (lines(WITHOUT_A), "some bytes have no rank"),
        (b"\x0a\x0e\x0a\x05<unk>", "line 1: found"),  # as a SentencePiece model begins
        (b"YQ== 0\nYQ== 1\n", "line 2: found b'YQ== 1'; expected another token"),
        (b"YQ 0\n", "line 1: found"),
        (b" 0\n", "line 1: found"),
        (b"YQ== -1\n", "line 1: found"),
        (lines(ranks() | {b"new": 5}), "two tokens have the same rank"),
        (lines(ranks() | {b"new": 100257}), "or a special token has it"),
    ],
)
def test_what_is_no_rank_file_is_refused(raw: bytes, message: str):
    with pytest.raises(InputError, match=re.escape(message)):
        read_ranks("cl100k_base", raw)


@given(raw=st.binary(max_size=200) | st.text("YQ=0 1\n", max_size=60).map(str.encode))
@settings(max_examples=200, deadline=None)
def test_other_bytes_are_refused(raw: bytes):
    with pytest.raises(InputError):
        read_ranks("gpt2", raw)

"""Cutting documents loses nothing, tears no word where it can be helped, and changes no token then."""

from __future__ import annotations

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, trainers

from llm.data.corpus import pieces as cutting
from llm.data.corpus.pieces import cut_point, divide, pieces

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PROSE = st.text(st.sampled_from("ab1.'é語 \n\r\t\x1c\x85\u00a0\u3000"), max_size=60)
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))
QUICK = settings(deadline=None, max_examples=200, derandomize=True)


@pytest.fixture(scope="module", params=["gpt2", "llama3"])
def tokenizer(request: pytest.FixtureRequest) -> tokenizers.Tokenizer:
    """Byte-level BPE whose merges join much, white space above all."""
    inner = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(LLAMA3), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=request.param == "gpt2")
    inner.pre_tokenizer = level if request.param == "gpt2" else pre_tokenizers.Sequence([split, level])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    text = [
        "a b.\n\nab\r\n\r\n  1 '\t\n \n ab.'\n\n\n 語  語\u3000\u3000",
        "   \n\n   a\n a\n\n\n",
        " a",
        ".\n",
        "\n\n",
    ]
    inner.train_from_iterator(text * 9, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet))
    return inner


@given(text=PROSE, high=st.integers(0, 60))
@QUICK
def test_a_cut_changes_no_token(tokenizer: tokenizers.Tokenizer, text: str, high: int):
    at = cut_point(text, 0, min(high, len(text)))
    if 0 < at < min(high, len(text)):
        assert tokenizer.encode(text[:at]).ids + tokenizer.encode(text[at:]).ids == tokenizer.encode(text).ids


def test_the_place_of_a_cut():
    assert cut_point("one two\nthree four", 0, 16) == 8  # after a line, rather than before the last space
    assert cut_point("one two three", 0, 9) == 7
    assert cut_point("one two three", 4, 7) == 7
    assert cut_point("abcdefgh", -5, 5) == 5
    assert cut_point("a\n\nb\n c", 0, 7) == 7  # white space stays together


@given(chunks=st.lists(ANY_TEXT | PROSE, max_size=9), piece=st.integers(6, 20))
@QUICK
def test_pieces_are_the_text(chunks: list[str], piece: int):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cutting, "PIECE", piece)
        patch.setattr(cutting, "WINDOW", 5)
        found = list(pieces(chunks))
    assert "".join(found) == "".join(chunks)
    assert all(0 < len(part) <= piece for part in found)


@given(parts=st.lists((ANY_TEXT | PROSE).filter(bool), min_size=1, max_size=5), share=st.floats(0.001, 0.999))
@QUICK
def test_each_document_is_divided(parts: list[str], share: float):
    text = "".join(parts)
    head, tail = divide([part.encode() for part in parts], share)
    assert b"".join([*head, *tail]) == text.encode()
    assert all([*head, *tail])
    assert head
    assert bool(tail) == (len(text) > 1)
    total, size = len(text.encode()), sum(map(len, tail))
    expected = min(total - 1, round(total * share))
    last = len(text[-1].encode())
    assert expected - 3 <= size <= max(2 * expected + 7, last)  # a character has 4 bytes, at most
    for part in [*head, *tail]:
        part.decode()


def test_a_document_is_divided_after_a_line():
    lines = [f"line {i}\n".encode() for i in range(100)]
    _, tail = divide([b"".join(lines[:95]), b"".join(lines[95:])], 0.1)
    assert b"".join(tail) == b"".join(lines[90:])  # 80 bytes, where 79 of 790 are asked for
    _, tail = divide([b"one line\n" + b"x" * 91], 0.1)  # and a line that is no nearer than twice as far
    assert len(b"".join(tail)) == 10

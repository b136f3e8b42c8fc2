"""Long words and texts are cut: training and encoding end, nothing is lost, and ordinary text is not changed."""

from __future__ import annotations

import random
import string
import unicodedata
from collections.abc import Callable
from itertools import pairwise

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizer_kinds import KINDS, real_text, tokenizer_json
from tokenizers import decoders, models, pre_tokenizers, trainers

from llm.data.tokenizer import END_OF_DOCUMENT, Tokenizer
from llm.data.tokenizer.cuts import LONGEST_PIECE, LONGEST_WORD, pieces

MB = 1_000_000
CJK = "".join(map(chr, range(0x4E00, 0x9000)))


def drawn(alphabet: str) -> Callable[[int], str]:
    return lambda size: "".join(random.Random(1).choices(alphabet, k=size))


WORDS = {
    "letters": drawn(string.ascii_lowercase),
    "DNA": drawn("ACGT"),
    "base64": drawn(string.ascii_letters + string.digits + "+/"),
    "punctuation": drawn(string.punctuation),
    "CJK": drawn(CJK),
    "digits": drawn(string.digits),
    "one letter": lambda size: "a" * size,
    "spaces": lambda size: " " * size,
    "newlines": lambda size: "\n" * size,
}


def encoder(kind: str) -> Tokenizer:
    return Tokenizer(tokenizer_json(kind).encode(), "[SEP]" if kind == "bert" else None)


@given(text=st.text(alphabet="ab \n.é\u0301日", max_size=80), limit=st.integers(2, 20))
@settings(max_examples=200, deadline=None)
@example("a b", 2)
@example("aa b", 2)
@example("   ", 2)
def test_pieces_are_the_text(text: str, limit: int):
    found, forced = pieces(text, limit)
    assert "".join(found) == text
    assert all(0 < len(piece) <= limit for piece in found) or found == [text] == [""]
    wrong = [a + b for a, b in pairwise(found) if not (b[0] == " " and not a[-1].isspace())]
    assert len(wrong) <= forced < len(found)


def test_a_cut_is_made_as_late_and_as_softly_as_can_be():
    assert pieces("one two three", 8) == (["one two", " three"], 0)
    assert pieces("one two three", 7) == (["one two", " three"], 0)
    assert pieces("one two three", 13) == (["one two three"], 0)
    assert pieces("日本語。日本語", 5) == (["日本語", "。日本語"], 1)
    assert pieces("e\u0301" * 4, 3) == (["e\u0301"] * 3 + ["e\u0301"], 3)
    assert pieces("\u0301" * 100, 60)[0] == ["\u0301" * 60, "\u0301" * 40]  # a text of marks alone ends too


QUICK = ("letters", "one letter", "spaces")  # the others show the same again
BY_SLOWNESS = [pytest.param(word, marks=[] if word in QUICK else pytest.mark.slow) for word in WORDS]


@pytest.mark.parametrize("word", BY_SLOWNESS)
def test_training_on_a_word_of_a_megabyte_ends(word: str):
    texts = [f"an ordinary document, number {i}" for i in range(40)]
    tokenizer = Tokenizer.train([*texts, WORDS[word](MB)], 280)
    text = WORDS[word](50_000)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("word", BY_SLOWNESS)
def test_long_words_are_encoded(word: str, kind: str):
    size = MB // 5 if word in QUICK else MB
    text, tokenizer = WORDS[word](size), encoder(kind)
    found, cuts = tokenizer.encode_batch([text, "short"])
    assert cuts == size // LONGEST_PIECE or (word == "punctuation" and cuts > size // LONGEST_PIECE)
    assert found[1] == tokenizer.encode("short")
    if kind == "llama2" or (kind == "mistral" and word != "spaces") or kind == "llama3":
        assert tokenizer.decode(found[0]) == text


@pytest.mark.slow
@pytest.mark.parametrize("word", WORDS)
def test_words_of_five_megabytes(word: str):
    text = "before " + WORDS[word](5 * MB) + " after"
    tokenizer = Tokenizer.train([text, real_text()], 400)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_ordinary_text_trains_the_librarys_tokenizer():
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": [END_OF_DOCUMENT], "initial_alphabet": alphabet, "show_progress": False}
    inner.train_from_iterator([real_text()], trainers.BpeTrainer(vocab_size=900, **options))
    assert len(real_text()) > 20 * LONGEST_WORD
    assert Tokenizer.train([real_text()], 900).raw == inner.to_str(pretty=True).encode()


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_cuts_at_spaces_change_no_id(kind: str, data: st.DataObject):
    """With pieces of 40 characters: a text of words that are shorter is as the library encodes it whole."""
    word = st.text(st.characters(exclude_categories=["Cs", "Z"], exclude_characters="▁"), min_size=1, max_size=15)
    space = st.sampled_from([" ", " ", "  ", "\n", " \n", "\t"])
    parts = data.draw(st.lists(st.tuples(word, space), min_size=5, max_size=12))
    text = "".join(part for pair in parts for part in pair)
    tokenizer = encoder(kind)
    library = tokenizers.Tokenizer.from_str(tokenizer_json(kind))
    library.encode_special_tokens = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llm.data.tokenizer.LONGEST_PIECE", 40)
        found, cuts = tokenizer.encode_batch([text])
    if cuts == 0:
        assert found == [library.encode(text, add_special_tokens=False).ids]


@pytest.mark.parametrize("kind", ["mistral", "llama2"])
def test_no_space_is_put_into_a_word_that_is_cut(kind: str):
    tokenizer = encoder(kind)
    text = "x" * (2 * LONGEST_PIECE)
    space = tokenizer._inner.token_to_id("▁")
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert space not in tokenizer.encode(text)[1:]


def test_a_letter_keeps_its_marks():
    for text in ("e\u0301" * 20_000, "न\u093f" * 20_000):
        found, _ = pieces(text, LONGEST_PIECE - 1)
        assert not [piece for piece in found if unicodedata.category(piece[0])[0] == "M"]

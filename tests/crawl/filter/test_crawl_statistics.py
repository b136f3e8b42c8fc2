# ruff: noqa: RUF001
"""Words and counts of csrc/crawl against plain Python, over any Unicode."""

from __future__ import annotations

import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from slow_statistics import ENDS, SYMBOLS, slow_statistics

from llm.crawl import _native
from llm.crawl.filter.page import Statistics

STOP_WORDS, SHORT = ("the", "be", "to"), 12
# Few different pieces, so that they repeat; and what is odd: several spaces and line breaks, bullets, marks, digits of
# other scripts, combining marks, a code point of four bytes, one whose small letter has two.
PIECES = (
    "the", "be", "a", "don't", "can’t", "John's", "x-y", "e.g.", "...", "…", "....", "#", "•", "-", "•  ", ".", "!",
    "?", "。", " ", "  ", "\n", "\n\n", "\n \n", "\r\n", "\r", "\x0b", "\x1c", "\x85", "\u2028", "\u3000", "\u00a0",
    "é", "e\u0301", "İ", "日本語", "３", "½", "١", "😀", "\U00020000", "\x00", "\ufeff", "http://a.b/c-d", "(", ")",
    '"', "“", "$5", "10%", "a/b", "A.B",
)  # fmt: skip
TEXTS = st.one_of(st.lists(st.sampled_from(PIECES), max_size=40).map("".join), st.text(max_size=40))


def counted(text: str, words: list[str] | None) -> Statistics:
    return Statistics.of(*_native.statistics(text, words, STOP_WORDS, SHORT, True))


@settings(max_examples=200, deadline=None)
@given(TEXTS)
def test_words_are_all_of_a_text_but_its_space(text: str) -> None:
    words = _native.words(text)
    assert "".join(words) == "".join(text.split())
    assert all(words) and not any(word.split() != [word] for word in words)


@settings(max_examples=200, deadline=None)
@given(TEXTS)
@example("a\x00...a/b...")  # a word that ends with the zeros by which others are filled up
def test_counts_equal_those_of_plain_python(text: str) -> None:
    words = _native.words(text)
    expected = slow_statistics(text, words, STOP_WORDS, SHORT)
    assert counted(text, None) == expected
    assert counted(text, words) == expected


@settings(max_examples=100, deadline=None)
@given(TEXTS, st.lists(st.sampled_from(PIECES), max_size=30))
def test_words_of_another_tokenizer_are_counted_as_they_are(text: str, words: list[str]) -> None:
    assert counted(text, words) == slow_statistics(text, words, STOP_WORDS, SHORT)


@pytest.mark.parametrize("points", [range(0x3100), range(0xFE00, 0x10000)], ids=["first", "full width"])
def test_kinds_of_code_points(points: range) -> None:
    characters = [chr(point) for point in points if not 0xD800 <= point < 0xE000 and not chr(point).isspace()]
    for character in characters:
        found = counted(character + "\n", [character])
        assert found.plain_words == (character not in SYMBOLS), hex(ord(character))
        assert found.ended_lines == (character in ENDS), hex(ord(character))
        assert found.letter_words == character.isalpha(), hex(ord(character))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Hello, (big) world.", "Hello , ( big ) world ."),
        ("It's John’s; they don't, can’t, we'll, I'd.", "It 's John ’s ; they don 't , can ’t , we 'll , I 'd ."),
        ("well-known and/or 10-20, x=y, 2020-A", "well - known and / or 10 - 20 , x = y , 2020 - A"),
        ("e.g. the U.S. on p. 3. J. Doe", "e.g. the U.S. on p. 3 . J. Doe"),
        ("so... what…!", "so ... what … !"),
        ("3.14 1,000 $5 5% +1 C++", "3.14 1,000 $ 5 5 % +1 C++"),
        ("see http://a.org/b-c?d=e. “End.Now”", "see http://a.org/b-c?d=e . “ End . Now ”"),
        ("日本語、テスト。한국어", "日本語 、 テスト 。 한국어"),
        ("", ""),
    ],
)
def test_words_by_example(text: str, words: str) -> None:
    """As spaCy's English tokenizer does, but for `do n't` and for signs of other scripts, which it leaves in words."""
    assert _native.words(text) == words.split()


@pytest.mark.parametrize(
    ("text", "count"),
    [("", 1), ("One. Two! Three?", 3), ("One (see 1.2). Two", 2), ('He said "no." And went.', 2), ("Dots... go on", 1)],
)
def test_sentences(text: str, count: int) -> None:
    assert _native.sentences(text) == count


def test_ngrams_know_neither_capitals_nor_signs() -> None:
    assert list(_native.ngrams("The cat, the CAT!", 2)) == list(_native.ngrams("the -- cat the cat", 2))
    first, second, third = _native.ngrams("the cat the cat", 2)
    assert first == third != second
    assert len(_native.ngrams("too short", 3)) == 0


@pytest.mark.parametrize("piece", ["a", "-", ".", "'", "a-", "n't", "é", "\u0301", "a.B", "://", " ", "\n", "…"])
def test_a_word_of_megabytes_takes_a_moment(piece: str) -> None:
    text = piece * (500_000 // len(piece))
    assert counted(text, None).characters == len(text)


def test_half_a_pair_of_utf16_is_refused() -> None:
    with pytest.raises(UnicodeEncodeError):
        _native.words("a\ud800")


def test_every_code_point_is_read() -> None:
    text = " ".join(map(chr, (*range(0x20, 0xD800), *range(0xE000, sys.maxunicode + 1, 7))))
    assert "".join(_native.words(text)) == "".join(text.split())

"""From bytes to text: character sets, main content, normalisation, and pages that would cost too much."""

from __future__ import annotations

import unicodedata
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from resiliparse.extract.html2text import extract_plain_text

from llm.crawl._native import html_cost
from llm.crawl.extract.settings import ExtractConfig
from llm.crawl.extract.text import NODES, VISITS, Unreadable, decode, normalise, to_text

RUSSIAN = "Съешь же ещё этих мягких французских булок, да выпей чаю. " * 5
JAPANESE = "日本語の文字コードを判定するための文章です。よろしくお願いします。" * 5
KOREAN = "문자 집합을 알아내기 위한 문장입니다. 잘 부탁드립니다. " * 5
GERMAN = "Größere Äpfel fallen früher über die Mauer, heißt es. " * 5


@pytest.mark.parametrize(
    ("text", "charset"),
    [
        (GERMAN, "utf-8"), (GERMAN, "windows-1252"), (RUSSIAN, "windows-1251"), (RUSSIAN, "koi8-r"),
        (JAPANESE, "shift_jis"), (JAPANESE, "euc-jp"), (JAPANESE, "iso-2022-jp"), (JAPANESE, "utf-16"),
        (KOREAN, "euc-kr"), (KOREAN, "cp949"),
    ],
)  # fmt: skip
def test_character_sets(text: str, charset: str) -> None:
    body = text.encode(charset)
    assert decode(body, charset, False)[::2] == (text, True)
    meta = f"<html><head><meta charset={charset}><p>".encode() + body
    if charset not in ("utf-16",):  # which has its byte-order mark first
        assert decode(meta, "", True)[0].endswith(text)
    assert decode(body, "", False)[0] == text, "found from the bytes alone"


@pytest.mark.parametrize("declared", ["iso-8859-1", "windows-1251", "shift_jis", "no-such-set", ""])
def test_valid_utf8_is_utf8_whatever_is_declared(declared: str) -> None:
    assert decode(GERMAN.encode(), declared, False) == (GERMAN, "utf-8", True)


def test_other_bytes_declared_as_utf8_are_looked_at() -> None:
    assert decode(JAPANESE.encode("iso-2022-jp"), "utf-8", False) == (JAPANESE, "iso2022_jp", True)
    assert decode(RUSSIAN.encode("cp1251"), "utf-8", False) == (RUSSIAN, "cp1251", True)


def test_invalid_bytes_are_replaced_and_told() -> None:
    for declared in ("utf-8", "windows-1252", ""):
        found = decode(b"\xff " + GERMAN.encode() + b"\xfe end", declared, False)
        assert found == ("\ufffd " + GERMAN + "\ufffd end", "utf-8", False)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=60), st.sampled_from(["", "utf-8", "iso-2022-jp", "gbk", "euc-kr", "x-x"]), st.booleans())
def test_any_bytes_are_decoded(body: bytes, declared: str, is_html: bool) -> None:
    text, _, valid = decode(body, declared, is_html)
    text.encode()
    if valid and not {0, 0x1B} & set(body) and not body.startswith((b"\xfe\xff", b"\xff\xfe", b"\xef\xbb\xbf")):
        assert "\ufffd" not in text or "\ufffd".encode() in body or declared


@pytest.mark.parametrize("how", ["nfc", "ftfy"])
def test_marks_without_end_are_cut_before_they_are_sorted(how: Literal["nfc", "ftfy"]) -> None:
    marks = "\u0323\u0301" * 15
    assert normalise(f"a{marks}b", how) == unicodedata.normalize("NFC", f"a{marks}b"), "30 are left"
    assert normalise(f"a{marks * 100_000}b", how) == unicodedata.normalize("NFC", f"a{marks}b")  # else an hour
    assert normalise(f"a{marks}\u0301b", how) == unicodedata.normalize("NFC", f"a{marks}b"), "and not 31"


def test_the_main_content_alone() -> None:
    body = "<p>" + "A long sentence of the article itself. " * 20
    menu = "<nav class=navbar><a href=/>Home</a> <a href=/x>More</a></nav>"
    html = f"<body>{menu}<article>{body}</article><footer>Imprint</footer>"
    text = to_text(html, ExtractConfig())
    assert text.strip() == body[3:].strip()
    assert "Imprint" in to_text(html, ExtractConfig(main_content=False))


def test_trafilatura() -> None:
    pytest.importorskip("trafilatura")
    body = "<p>" + "A long sentence of the article itself. " * 20 + "</p>"
    text = to_text(f"<body><nav>Home</nav><article>{body}</article></body>", ExtractConfig(extractor="trafilatura"))
    assert text.strip() == body[3:-4].strip()


def test_normalisation() -> None:
    apart = unicodedata.normalize("NFD", "Größe")
    assert normalise(apart, "nfc") == "Größe" and normalise(apart, "none") == apart
    assert normalise("schÃ¶n “so”\0", "ftfy") == "schön “so”"
    assert normalise("schÃ¶n\r\n\0", "nfc") == "schÃ¶n\n"


@st.composite
def trees(draw: st.DrawFn) -> tuple[str, int, int]:
    """HTML without damage, and its cost, counted while it is written."""
    parts, nodes, visits = list[str](), 0, 0

    def element(depth: int, formatting: int, blocks: int) -> None:
        nonlocal nodes, visits
        name = draw(st.sampled_from(["div", "b", "p", "FONT", "article", "bdi", "code-x"]))
        attributes = draw(st.integers(0, 9))
        quote = draw(st.sampled_from(["", "'", '"']))
        value = f"={quote}{'a>b' if quote else 'a'}{quote}"
        parts.append(f"<{name}" + "".join(f" a{i}{value}" for i in range(attributes)) + ">")
        nodes, visits = nodes + 1 + formatting, visits + 1 + blocks + attributes**2 // 16
        parts.append(draw(st.sampled_from(["", "text < 1", "<!-- <div><b> -->", "</q>"])))
        if draw(st.booleans()):
            parts.append("<script>'<div>' </b</script >")
            nodes, visits = (
                nodes + 1 + formatting + (name in ("b", "FONT")),
                visits + 1 + blocks + (name in ("div", "article")),
            )
        for _ in range(draw(st.integers(0, 2)) if depth < 4 else 0):
            element(depth + 1, formatting + (name in ("b", "FONT")), blocks + (name in ("div", "article")))
        parts.append(f"</{name}>")

    element(0, 0, 0)
    return "".join(parts), nodes, visits


@settings(max_examples=40, deadline=None)
@given(trees())
def test_the_cost_of_a_page(tree: tuple[str, int, int]) -> None:
    html, nodes, visits = tree
    assert html_cost(html) == (nodes, visits)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from(["<", "</", "b", "div", " ", "=", "'", '"', ">", "<!--", "-->", "script", "a"])).map(
        "".join
    )
)
def test_any_markup_is_scanned_and_extracted(html: str) -> None:
    nodes, visits = html_cost(html)
    assert 0 <= nodes <= html.count("<") ** 2 and 0 <= visits <= (len(html) + 1) ** 2
    assert to_text(html, ExtractConfig()) == extract_plain_text(
        html, main_content=True, alt_texts=False, comments=False
    )


@pytest.mark.parametrize(
    "html",
    [
        "<div>" * 10**6, "<div>" * 10**6 + "</div>" * 10**6, "".join(f"<font color={i}><p>x" for i in range(2000)),
        "<p " + "a=1 " * 30_000 + ">", "<ARTICLE\n>" * 10_000, "<optgroup>" * 10**5,
        "<span>" * 10**5 + "</a>" * 10**5, "<div><object></div>" * 10**4,
    ],
    ids=["div", "closed", "font", "attributes", "article", "optgroup", "not open", "fence"],
)  # fmt: skip
def test_pages_that_would_take_minutes_are_refused(html: str) -> None:
    with pytest.raises(Unreadable, match="would cost too much"):
        to_text(html + "text", ExtractConfig())


def test_long_and_flat_pages_are_not() -> None:
    flat = (
        "<p>" + "a" * 5_000_000, "<div><p>x</p></div>" * 100_000, f"<img src='data:{'A ' * 10**6}'>",
        "<ul>" + "<li><a>x</a><br></i>" * 5_000, "<table><tr><td><div>x</div><td></b></table>" * 20_000,
    )  # fmt: skip
    for html in flat:
        nodes, visits = html_cost(html)
        assert nodes < NODES / 4 and visits < VISITS / 40
    assert len(to_text("<p>" + "a" * 5_000_000, ExtractConfig())) == 5_000_000

"""From a page's bytes to its text: character set, main content, Unicode normalisation."""

from __future__ import annotations

import codecs
import re
import unicodedata
from collections.abc import Iterator

import numpy as np
from resiliparse.extract.html2text import extract_plain_text
from resiliparse.parse.encoding import detect_encoding, map_encoding_to_html5
from resiliparse.parse.html import HTMLTree

from llm.crawl._native import html_cost
from llm.crawl.extract.settings import ExtractConfig

BOMS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
# Python's supersets of character sets that pages name, as browsers read them.
WIDER = {"big5": "big5hkscs", "euc_kr": "cp949", "gbk": "gb18030", "shift_jis": "cp932"}
# What a page may cost, about a second and 400 MB each (docs/corpus.md); real pages need a hundredth of it.
NODES, VISITS = 1_000_000, 30_000_000
# Python's normalisation takes the square of the number of marks on a letter; Unicode's Stream-Safe Text Format has 30.
MOST_MARKS = 30
IS_MARK = np.array([unicodedata.combining(chr(point)) > 0 for point in range(0x1F000)])
FIRST_MARK = int(IS_MARK.argmax())
_MARK = "".join(map(chr, np.flatnonzero(IS_MARK).tolist()))
MARKS = re.compile(f"([{_MARK}]{{{MOST_MARKS}}})[{_MARK}]+")


class Unreadable(ValueError):
    """A page that is not worth its cost, or breaks the parser."""


def decode(body: bytes, declared: str, is_html: bool) -> tuple[str, str, bool]:
    """The characters of a body, its character set, and whether all of its bytes are valid in it.

    A byte-order mark decides, then whether the bytes are UTF-8, which no other character set looks like, then what the
    server or the page declares, then what uchardet finds.
    """
    for mark, name in BOMS.items():
        if body.startswith(mark):
            return _decode(body[len(mark) :], name)
    if b"\0" not in body and b"\x1b" not in body:  # UTF-16 and ISO-2022-JP look like ASCII else
        text, _, valid = found = _decode(body, "utf-8")
        if valid or len(body) - len(text) > text.count("\ufffd"):  # more is valid than is not, ASCII apart
            return found
    first = None
    for name in _names(body, declared, is_html):
        found = _decode(body, name)
        if found[2]:
            return found
        first = first or found
    assert first
    return first


def _names(body: bytes, declared: str, is_html: bool) -> Iterator[str]:
    """Character sets to try, in their order, as Python calls them."""
    if b"\x1b$" in body:
        yield "iso2022_jp"  # else those who declare UTF-8 are believed: it is ASCII
    if named := map_encoding_to_html5(declared, fallback_utf8=False):
        yield named
    if is_html:
        yield detect_encoding(body, from_html_meta=True) or "utf-8"
    found = detect_encoding(body, html5_compatible=False) or "utf-8"  # Korean has no name in HTML 5 else
    yield map_encoding_to_html5(found, fallback_utf8=False) or found


def _decode(body: bytes, name: str) -> tuple[str, str, bool]:
    wide = WIDER.get(name, name)
    try:
        return body.decode(wide), name, True
    except UnicodeDecodeError:
        return body.decode(wide, errors="replace"), name, False


def to_text(html: str, settings: ExtractConfig) -> str:
    """The text of a page. Raises Unreadable where it is nested so deeply that it would take minutes or gigabytes."""
    nodes, visits = html_cost(html)
    if nodes > NODES or visits > VISITS:
        raise Unreadable(f"the page would cost too much: {nodes} elements, {visits} visits of them")
    if settings.extractor == "trafilatura":
        return _trafilatura(html)
    tree = HTMLTree.parse(html)
    return extract_plain_text(tree, main_content=settings.main_content, alt_texts=False, comments=False)


def _trafilatura(html: str) -> str:
    import trafilatura  # an extra of its own  # pyright: ignore[reportMissingImports]

    return trafilatura.extract(html, favor_precision=True, include_comments=False) or ""


def normalise(text: str, how: str) -> str:
    """The text in Unicode's form NFC, repaired by ftfy before where `how` says so.

    Lines end in LF; NULs, and what marks a letter has beyond 30, are gone.
    """
    text = text.replace("\0", "").replace("\r\n", "\n")
    if how != "none" and not text.isascii() and _has_many_marks(text):
        text = MARKS.sub(r"\1", text)
    if how == "ftfy":
        import ftfy  # half a second, which the others can save

        kept = ftfy.TextFixerConfig(uncurl_quotes=False, fix_latin_ligatures=False, fix_character_width=False)
        return ftfy.fix_text(text, kept)
    return unicodedata.normalize("NFC", text) if how == "nfc" else text


def _has_many_marks(text: str) -> bool:
    """Whether more than MOST_MARKS follow one another: hundreds of times as fast as MARKS, which few texts need."""
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    places = np.flatnonzero(points >= FIRST_MARK)
    places = places[IS_MARK[np.minimum(points[places], len(IS_MARK) - 1)]]
    return bool((places[MOST_MARKS:] - places[:-MOST_MARKS] == MOST_MARKS).any())

"""WARC and WET files: every record comes out once, and damage costs the record that it is in."""

from __future__ import annotations

import gzip
import tempfile
import zlib
from functools import partial
from itertools import accumulate
from pathlib import Path

import pytest
from fastwarc.warc import ArchiveIterator
from hypothesis import given, settings
from hypothesis import strategies as st
from warc_files import KINDS, extract, html, page, record

from llm.crawl.extract.warc import read_warc
from llm.data.corpus.texts import zstd

URLS = [f"http://example.org/{i}" for i in range(5)]
PAGES = [page(url, html(i)) for i, url in enumerate(URLS)]
LIMIT = 1 << 20


def fail(place: int, what: str) -> None:
    raise AssertionError(f"{place}: {what}")


def places(parts: list[bytes]) -> list[int]:
    return [0, *accumulate(map(len, parts))][:-1]


def damaged_at(path: Path) -> list[int]:
    return [int(one["offset"]) for one in extract(path)[1].damage]


@pytest.mark.parametrize("kind", KINDS)
def test_every_page_with_its_url_place_and_date(kind: str, tmp_path: Path) -> None:
    others = [record("warcinfo", b"software: x\r\n"), record("request", b"GET / HTTP/1.1\r\n\r\n")]
    parts = [KINDS[kind](part) for part in [*others, *PAGES]]
    path = tmp_path / f"a{kind}"
    path.write_bytes(b"".join(parts))
    documents, counts = extract(path)
    assert [d.url for d in documents] == URLS
    assert [d.offset for d in documents] == places(parts)[2:]
    assert [d.id for d in documents] == [7 << 32 | i for i in range(5)]
    assert all(d.text.startswith(f"Page {i} says: word{i}x0 ") for i, d in enumerate(documents))
    assert documents[0].metadata == {"date": "2026-01-02T03:04:05Z", "charset": "utf-8", "mime": "text/html"}
    assert (counts.documents_in, counts.bytes_in, counts.damage_count) == (5, path.stat().st_size, 0)
    # The same records as the library gives, with its own view of HTTP.
    found = [r.reader.read() for r in ArchiveIterator(str(path)) if r.is_http and r.http_content_type == "text/html"]
    assert found == [r.body for r in read_warc(path, LIMIT, fail)]


def test_all_records_in_one_member(tmp_path: Path) -> None:
    path = tmp_path / "a.warc.gz"
    path.write_bytes(gzip.compress(b"".join(PAGES)))
    documents, counts = extract(path)
    assert [d.url for d in documents] == URLS and not counts.damage


def test_a_wet_file(tmp_path: Path) -> None:
    path = tmp_path / "a.warc.wet.gz"
    text = "Grüße <b> & so.\r\nZeile\r\n"
    path.write_bytes(
        gzip.compress(record("conversion", text.encode(), "text/plain", more="WARC-Target-URI: <http://a.de/>\r\n"))
    )
    ((document,), _) = extract(path)
    assert (document.text, document.url) == (text.replace("\r\n", "\n"), "http://a.de/")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", ["cut", "end", "junk", "length too great", "length too small"])
def test_damage_costs_its_record_alone(kind: str, damage: str, tmp_path: Path) -> None:
    parts, at = list(map(KINDS[kind], PAGES)), 4 if damage == "end" else 2
    number = str(PAGES[at].split(b"Content-Length: ")[1][:4], "ascii").strip()
    if damage.startswith("length"):
        wrong = str(int(number) + (300 if "great" in damage else -300))
        parts[at] = KINDS[kind](
            PAGES[at].replace(f"Content-Length: {number}".encode(), f"Content-Length: {wrong}".encode())
        )
    else:
        parts[at] = bytes(range(256)) * 4 if damage == "junk" else parts[at][: len(parts[at]) // 2]
    path = tmp_path / f"a{kind}"
    path.write_bytes(b"".join(parts))
    documents, counts = extract(path)
    kept = [url for i, url in enumerate(URLS) if i != at]
    if (kind, damage) == (".warc", "junk"):  # in a plain file it is not known where the record before it ends
        kept.remove(URLS[at - 1])
        at -= 1
    assert [d.url for d in documents] == kept
    assert counts.damage_count == 1 and counts.damage[0]["offset"] == places(parts)[at]


def test_a_checksum_is_looked_at(tmp_path: Path) -> None:
    parts = list(map(gzip.compress, PAGES))
    parts[3] = parts[3][:-8] + b"abcd" + parts[3][-4:]
    (tmp_path / "a.warc.gz").write_bytes(b"".join(parts))
    assert damaged_at(tmp_path / "a.warc.gz") == [places(parts)[3]]


def test_a_great_record_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.warc.gz"
    great = page("http://great.org", b"a" * 3_000_000)
    for content in (
        b"".join(map(gzip.compress, [PAGES[0], great, PAGES[1]])),
        gzip.compress(PAGES[0] + 2 * great + PAGES[1]),
    ):
        path.write_bytes(content)
        documents, counts = extract(path, max_bytes=LIMIT)
        assert [d.url for d in documents] == URLS[:2]
        assert "extract.max_bytes is 1048576" in str(counts.damage[0]["what"])
    assert counts.damage_count == 2


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_great_record_holds_is_no_record(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{kind}"
    great = page("http://great.org", (bytes(9) + gzip.compress(PAGES[3], 0) + b"\r\n\r\n" + PAGES[2]) * 3000)
    stored = {".warc.gz": partial(gzip.compress, compresslevel=0), ".warc.zst": partial(zstd.compress, level=-50)}
    path.write_bytes(b"".join([KINDS[kind](PAGES[0]), stored.get(kind, bytes)(great), KINDS[kind](PAGES[1])]))
    documents, counts = extract(path, max_bytes=LIMIT)
    assert [d.url for d in documents] == URLS[:2] and counts.damage_count == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_great_record_that_does_not_end_costs_no_other(kind: str, tmp_path: Path) -> None:
    path, great = tmp_path / f"a{kind}", page("http://great.org", b"a" * 3_000_000)
    cut = KINDS[kind](great)[: 1000 if kind == ".warc" else -20].replace(b": 3000070", b": 9000000")
    path.write_bytes(b"".join([KINDS[kind](PAGES[0]), cut, KINDS[kind](PAGES[1])]))
    documents, counts = extract(path, max_bytes=LIMIT)
    assert [d.url for d in documents] == URLS[:2] and counts.damage_count == 1


def test_codings_of_http(tmp_path: Path) -> None:
    body, path = html(0), tmp_path / "a.warc"
    zipped = gzip.compress(body)
    chunked = b"%x\r\n" % len(zipped) + zipped + b"\r\n0\r\n\r\n"
    cases = {
        "Content-Encoding: gzip\r\n": zipped,
        "Content-Encoding: GZIP\r\nTransfer-Encoding: chunked\r\n": chunked,
        "Content-Encoding: deflate\r\n": zlib.compress(body),
        "Content-Encoding: gzip\r\nX-Note: undone by the crawler\r\n": body,
    }
    path.write_bytes(b"".join(page("http://a", content, more=more) for more, content in cases.items()))
    assert [r.body for r in read_warc(path, LIMIT, fail)] == [body] * 4
    bomb = page("http://bomb.org", gzip.compress(bytes(5_000_000)), more="Content-Encoding: gzip\r\n")
    torn = page("http://torn.org", b"\x1f\x8b\x08" + bytes(50), more="Content-Encoding: gzip\r\n")
    path.write_bytes(PAGES[0] + bomb + torn + PAGES[1])
    documents, counts = extract(path, max_bytes=LIMIT)
    assert [d.url for d in documents] == URLS[:2] and counts.damage_count == 2


def test_what_is_no_page_is_removed_with_its_reason(tmp_path: Path) -> None:
    path = tmp_path / "a.warc"
    path.write_bytes(
        PAGES[0]
        + page("http://a/gone", html(1), status="404 Not Found")
        + page("http://a/cat.png", b"\x89PNG", mime="image/png")
        + page("http://a/nothing", b"<html><body><script>x()</script></body></html>")
        + record("response", b"HTTP/1.1 200 OK\r\nContent-Type: text/html", more="WARC-Target-URI: http://a\r\n")
    )
    documents, counts = extract(path)
    assert len(documents) == 1
    assert counts.removed == {"extract.status": 1, "extract.mime": 1, "extract.empty": 1}
    assert counts.samples["extract.status"] == ["http://a/gone"]
    assert counts.documents_in == 4 and counts.damage_count == 1


def test_a_limit_of_records(tmp_path: Path) -> None:
    path = tmp_path / "a.warc"
    path.write_bytes(b"".join(PAGES))
    documents, counts = extract(path, limit=2)
    assert [d.url for d in documents] == URLS[:2] and counts.documents_in == 2


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from([".warc.gz", ".warc.zst"]),
    sizes=st.lists(st.integers(0, 3000), min_size=1, max_size=5),
    at=st.integers(0, 4),
    edit=st.tuples(st.floats(0, 1), st.integers(0, 40), st.binary(max_size=40)),
)
def test_any_edit_of_a_member_leaves_the_others(kind: str, sizes: list[int], at: int, edit: tuple) -> None:
    bodies = [b"<p>%d " % i + bytes(i % 251 for i in range(size)) for i, size in enumerate(sizes)]
    parts = [KINDS[kind](page(f"http://a/{i}", body)) for i, body in enumerate(bodies)]
    at = min(at, len(parts) - 1)
    where, removed, put = edit
    cut = max(int(at == 0) * 4, int(where * len(parts[at])))  # by its first bytes the file is known
    parts[at] = parts[at][:cut] + put + parts[at][cut + removed :]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"a{kind}")
        path.write_bytes(b"".join(parts))
        told = []
        found = [r.body for r in read_warc(path, LIMIT, lambda place, what: told.append((place, what)))]
    assert [body for body in found if body in bodies and bodies.index(body) != at] == bodies[:at] + bodies[at + 1 :]


@settings(max_examples=40, deadline=None)
@given(
    content=st.lists(
        st.sampled_from([b"WARC/1.0\r\n", b"WARC-Type: response\r\n", b"Content-Length: 5\r\n", b"\r\n", PAGES[0]])
        | st.binary(max_size=30),
        min_size=1, max_size=12,
    ).map(b"".join),
    kind=st.sampled_from(list(KINDS)),
)  # fmt: skip
def test_any_bytes_are_read_to_their_end(content: bytes, kind: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"a{kind}")
        path.write_bytes(content)
        documents, counts = extract(path)
    assert documents or counts.damage or counts.removed or not content or b"WARC/1" in content

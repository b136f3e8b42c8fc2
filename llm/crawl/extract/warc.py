"""Reads WARC and WET files, plain or compressed, and goes on behind what is damaged."""

from __future__ import annotations

import mmap
import re
import zlib
from collections.abc import Generator, Iterator
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from fastwarc.stream_io import BrotliReader, ChunkedReader, GzipReader, ZstdReader
from fastwarc.warc import ArchiveIterator, WarcRecord, WarcRecordType

from llm.crawl.extract.records import Damaged, Record
from llm.data.corpus.texts import zstd

GZIP, ZSTD, PLAIN = b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", b"WARC/"  # what a member, or a record, begins with
RECORD = re.compile(rb"WARC/1\.\d\r?\n[!-9;-~]+:")  # stands behind whatever a record before it was cut at
HEAD = 132 << 10  # compressed bytes that surely hold the first five of a member: a block of zstd has up to 128 KiB
SKIPPED = 64  # times the limit: up to that a compressed record is read through to its end
PAGES = WarcRecordType.response | WarcRecordType.resource | WarcRecordType.conversion
HTML, TEXT = {"", "text/html", "application/xhtml+xml"}, {"text/plain"}
HEADERS_END = re.compile(rb"\r?\n\r?\n")
CODINGS = {
    "br": BrotliReader, "chunked": ChunkedReader, "deflate": lambda body: GzipReader(body, zlib=True),
    "gzip": GzipReader, "x-gzip": GzipReader,
}  # fmt: skip


def read_warc(path: Path, limit: int, damaged: Damaged) -> Iterator[Record]:
    """The pages of a file in their order.

    A record that is damaged or has more than `limit` bytes is told of and left out. Reading goes on at the next member
    of a compressed file, or the next record of a plain one.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        magic = next((magic for magic in (GZIP, ZSTD) if content[:4].startswith(magic)), None)
        magic = magic or {".gz": GZIP, ".zst": ZSTD}.get(path.suffix.lower(), PLAIN)
        told = set[int]()
        start: int | None = 0
        while start is not None:
            file.seek(start)
            start = yield from _read_on(file, start, content, magic, limit, damaged, told)


def _read_on(
    file: BinaryIO, start: int, content: mmap.mmap, magic: bytes, limit: int, damaged: Damaged, told: set[int]
) -> Generator[Record, None, int | None]:
    """The pages from byte `start` to the first damage; returns where to go on, None at the end.

    A page is given once the next record has begun where it should: else the page's length may be wrong. told: where
    damage has been met. A member meets it twice: behind the one before it, and when it is tried on its own.
    """
    members = {GZIP: GzipReader, ZSTD: ZstdReader}[magic](file) if magic != PLAIN else None

    def member() -> int:
        """Where the member begins that is being read: in a plain file always the same."""
        return (members.frame_start_position() or 0) if members else start

    held: Record | None = None
    record: WarcRecord | None = None
    offset = begin = end = start  # of the last record, and the members in which it begins and ends
    try:
        for record in ArchiveIterator(members or file, parse_http=False):
            if held:
                yield held
            held, begin = None, member()
            end, offset = begin, begin if members else record.stream_pos
            size = record.content_length
            if size > limit:
                damaged(offset, f"the record has {size} bytes; extract.max_bytes is {limit}")
                told.add(offset)
                end = -1  # nobody knows whether it is whole
                # What it holds is skipped, which may look like records; a length that is wrong would skip others.
                if size > (SKIPPED * limit if members else len(content) - offset):
                    following = _next(content, offset + 1, magic)
                    if following is not None:
                        return following
            elif record.record_type & PAGES:
                body = record.reader.read(size)
                if len(body) < size:
                    damaged(offset, f"the record ends after {len(body)} of {size} bytes")
                    return _next(content, offset + 1, magic)
                end = member()
                held = _page(record, body, offset, limit, damaged)
                if held:
                    held.end = file.tell()
    except OSError as error:
        at = member()
        is_whole = members and at != begin == end  # the last record
        if held and is_whole:
            yield held
        where = at if is_whole else offset
        if where not in told:
            told.add(where)
            damaged(where, f"no record can be read from here on: {error}")
        return _next(content, offset + 1, magic)
    if held:
        yield held
    if record is None and start == 0:
        damaged(0, "the file holds no record")
    return None


def _next(content: mmap.mmap, at: int, magic: bytes) -> int | None:
    """Where the first record or member begins at byte `at` or after it that can be read; None if there is none."""
    if magic == PLAIN:
        found = RECORD.search(content, at)
        return found and found.start()
    while (at := content.find(magic, at)) >= 0:
        try:
            # Not a copy: a hostile file may hold the magic number millions of times.
            with memoryview(content) as whole, whole[at : at + HEAD] as head:
                if magic == GZIP:
                    text = zlib.decompressobj(31).decompress(head, 5)
                else:
                    text = zstd.ZstdDecompressor().decompress(head, 5)
            if text == PLAIN:
                return at
        except (zlib.error, zstd.ZstdError):
            pass
        at += 1
    return None


def _page(record: WarcRecord, body: bytes, offset: int, limit: int, damaged: Damaged) -> Record | None:
    """The page in a record; None where it cannot be decoded, which is told."""

    def header(name: bytes) -> str:
        return (record.headers.get_bytes(name) or b"").decode(errors="replace").strip()

    url, date = header(b"WARC-Target-URI").strip("<>"), header(b"WARC-Date")
    kind, status = header(b"Content-Type"), "200"
    if record.is_http:
        parts = HEADERS_END.split(body, 1)
        if len(parts) < 2:
            damaged(offset, "the HTTP headers have no end")
            return None
        first, *lines = parts[0].decode("latin-1").splitlines() or [""]
        fields = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        kind, status = fields.get("content-type", ""), first.partition(" ")[2][:3]
        codings = f"{fields.get('content-encoding', '')},{fields.get('transfer-encoding', '')}"
        try:
            body = _decoded(parts[1], codings.lower(), limit)
        except ValueError as error:
            damaged(offset, str(error))
            return None
    mime, _, parameters = kind.partition(";")
    mime = (header(b"WARC-Identified-Payload-Type") or mime).strip().lower()
    charset = parameters.lower().partition("charset=")[2].partition(";")[0].strip(" \"'")
    left_out = "" if mime in HTML | TEXT else "mime"
    return Record(offset, body, mime in HTML, url, date, charset, left_out if status[:1] == "2" else "status")


def _decoded(body: bytes, codings: str, limit: int) -> bytes:
    """The body of an HTTP message without its codings, the last of which is undone first.

    Raises ValueError where it is damaged or has more than `limit` bytes. Some crawlers undo a coding and keep its name:
    then the body is as it was.
    """
    for coding in reversed(codings.replace(" ", "").split(",")):
        if coding not in CODINGS:
            continue
        try:
            decoded = CODINGS[coding](BytesIO(body)).read(limit + 1)
        except OSError as error:
            if b"\0" in body[:1024]:
                raise ValueError(f"the {coding} coding is damaged: {error}") from error
            continue
        if len(decoded) > limit:
            raise ValueError(f"the {coding} coding holds more bytes than extract.max_bytes, {limit}")
        body = decoded
    return body

"""Which reader reads a file, by its name; and the readers of HTML, text and JSON."""

from __future__ import annotations

import json
import lzma
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from llm.crawl.extract.records import Damaged, Record
from llm.crawl.extract.settings import ExtractConfig
from llm.crawl.extract.tables import read_rows
from llm.data.corpus.texts import OPENERS, zstd

WARC = re.compile(r"(?i).+\.(?:warc|wet)(?:\.wet)?(?:\.gz|\.zst)?")
OTHER = re.compile(r"(?i).+\.(?:(html?|xhtml|txt|jsonl?|ndjson)(?:\.(?:gz|bz2|xz|zst))?|(parquet|arrow|feather))")


def kind_of(name: str) -> str | None:
    """warc, html, text, json (of one value), lines (of JSON) or table, by a file's name; None: it is passed over."""
    if WARC.fullmatch(name):
        return "warc"
    match = OTHER.fullmatch(name)
    if not match:
        return None
    kinds = {"htm": "html", "xhtml": "html", "txt": "text", "jsonl": "lines", "ndjson": "lines"}
    found = (match[1] or "table").lower()
    return kinds.get(found, found)


def records(path: Path, settings: ExtractConfig, damaged: Damaged) -> Iterator[Record]:
    """The pages or texts of a file, in order; none of a file of another kind. What is damaged is told, never raised."""
    kind = kind_of(path.name)
    if kind is None:
        return
    if path.stat().st_size == 0:
        damaged(0, "the file is empty")
    elif kind == "warc":
        from llm.crawl.extract.warc import read_warc

        yield from read_warc(path, settings.max_bytes, damaged)
    elif kind == "table":
        yield from read_rows(path, settings, damaged)
    elif kind == "lines":
        yield from _json_lines(path, settings, damaged)
    elif kind == "json":
        yield from _json_values(path, settings, damaged)
    else:
        yield from _whole(path, kind == "html", settings.max_bytes, damaged)


@contextmanager
def _opened(path: Path, damaged: Damaged, place: list[int]) -> Iterator[BufferedIOBase]:
    """The file's bytes, decompressed; where they cannot be read further is told, and ends the block."""
    try:
        with OPENERS.get(path.suffix.lower(), partial(open, mode="rb"))(path) as file:
            yield file
    except (OSError, EOFError, zlib.error, lzma.LZMAError, zstd.ZstdError) as error:
        damaged(place[0], f"the file cannot be read further: {error}")


def _whole(path: Path, is_html: bool, limit: int, damaged: Damaged) -> Iterator[Record]:
    with _opened(path, damaged, [1]) as file:
        body = file.read(limit + 1)
        if len(body) > limit:
            damaged(1, f"the file has more bytes than extract.max_bytes, {limit}")
        else:
            yield Record(1, body, is_html)


def _json_lines(path: Path, settings: ExtractConfig, damaged: Damaged) -> Iterator[Record]:
    limit, place = settings.max_bytes, [1]
    with _opened(path, damaged, place) as file:
        while line := file.readline(limit + 1):
            number = place[0]
            if len(line) > limit and not line.endswith(b"\n"):
                damaged(number, f"the line has more bytes than extract.max_bytes, {limit}")
                while line and not line.endswith(b"\n"):
                    line = file.readline(limit)
            elif line.strip():
                try:
                    yield _json_record(_parsed(line), number, settings)
                except (ValueError, RecursionError) as error:
                    damaged(number, f"the line cannot be used: {error}")
            place[0] += 1


def _json_values(path: Path, settings: ExtractConfig, damaged: Damaged) -> Iterator[Record]:
    """The object that a file holds, or those of its array; what is neither, or too long, is read line by line."""
    with _opened(path, lambda place, what: None, [1]) as file:
        body = file.read(settings.max_bytes + 1)
        try:
            found = _parsed(body) if len(body) <= settings.max_bytes else None
        except (ValueError, RecursionError):
            found = None
        if found is not None:
            for number, value in enumerate(found if isinstance(found, list) else [found], 1):
                try:
                    yield _json_record(value, number, settings)
                except ValueError as error:
                    damaged(number, f"the value cannot be used: {error}")
            return
    yield from _json_lines(path, settings, damaged)


def _parsed(text: bytes) -> Any:
    return json.loads(text.decode("utf-8-sig"), parse_int=float)  # int() refuses long numbers, which no one reads


def _json_record(found: object, number: int, settings: ExtractConfig) -> Record:
    """The text and URL of a value; ValueError where it has no text."""
    if not isinstance(found, dict):
        raise ValueError("it is no JSON object")
    text, url = _field(found, settings.text_key), _field(found, settings.url_key)
    if not isinstance(text, str):
        raise ValueError(f"its field `{settings.text_key}` is {type(text).__name__}; expected text")
    text.encode()  # half of a surrogate pair, which JSON can spell, is a ValueError
    return Record(number, text, False, url.encode(errors="replace").decode() if isinstance(url, str) else "")


def _field(record: object, key: str) -> object:
    """What is at `key` in a record (`a.b`: b in a, unless there is a field a.b); None where there is nothing."""
    for name in [key] if isinstance(record, dict) and key in record else key.split("."):
        record = record.get(name) if isinstance(record, dict) else None
    return record

"""WARC files, written here byte by byte."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

from llm.crawl.counts import Counts
from llm.crawl.documents import Document
from llm.crawl.extract.settings import ExtractConfig
from llm.crawl.extract.stage import Extract
from llm.crawl.tasks import Task
from llm.data.corpus.texts import zstd

KINDS: dict[str, Callable[[bytes], bytes]] = {".warc.gz": gzip.compress, ".warc.zst": zstd.compress, ".warc": bytes}


def record(kind: str, block: bytes, mime: str = "application/http; msgtype=response", more: str = "") -> bytes:
    """A record of WARC 1.0; `more` are header lines."""
    head = f"WARC/1.0\r\nWARC-Type: {kind}\r\nContent-Type: {mime}\r\n{more}Content-Length: {len(block)}\r\n\r\n"
    return head.encode() + block + b"\r\n\r\n"


def page(
    url: str, body: bytes, mime: str = "text/html; charset=utf-8", more: str = "", status: str = "200 OK"
) -> bytes:
    """A response of a server; `more` are HTTP header lines."""
    block = f"HTTP/1.1 {status}\r\nContent-Type: {mime}\r\n{more}\r\n".encode() + body
    return record("response", block, more=f"WARC-Target-URI: {url}\r\nWARC-Date: 2026-01-02T03:04:05Z\r\n")


def html(number: int) -> bytes:
    """A page with some text."""
    words = " ".join(f"word{number}x{i}" for i in range(80))
    return f"<html><body><p>Page {number} says: {words}.</p></body></html>".encode()


def extract(path: Path, limit: int | None = None, **settings: object) -> tuple[list[Document], Counts]:
    """What the stage makes of a file."""
    counts = Counts()
    task = Task(7, (path,), path.parent, source=path.name, limit=limit)
    return list(Extract(ExtractConfig(**settings)).run(task, counts)), counts  # pyright: ignore

"""Readers of text: .txt (a document each) and .jsonl, .jsonl.gz, .jsonl.zst (`text` field)."""

from __future__ import annotations

import gzip
import io
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from llm.errors import InputError, require

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst")
CHUNK = 1 << 16


def list_files(source: Path) -> list[Path]:
    """The text files of a file or folder, folders searched through, sorted by path.

    Hidden files are left out. Any other file of a folder that is no text file is an InputError.
    """
    if source.is_file():
        require(_is_text(source), f"data.source {source}: expected a name that ends in one of {SUFFIXES}")
        return [source]
    require(source.is_dir(), f"data.source {source} does not exist; expected `stdlib`, a file or a folder")
    files = sorted(_walk(source), key=lambda path: path.relative_to(source).as_posix())
    others = [str(path) for path in files if not (_is_text(path) and path.is_file())]
    require(not others, f"data.source {source} holds {others[:3]}; expected only files in {SUFFIXES}")
    require(bool(files), f"data.source {source} is empty; expected files in {SUFFIXES}")
    return files


def _walk(folder: Path) -> Iterator[Path]:
    """Everything below a folder but what is hidden; links to folders are given, not followed."""
    try:
        entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
    except OSError as error:
        raise InputError(f"data.source: folder {folder} cannot be read: {error}") from error
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path))
        else:
            yield Path(entry.path)


def _is_text(path: Path) -> bool:
    return path.name.endswith(SUFFIXES)


def read_documents(paths: Iterable[Path]) -> Iterator[str]:
    """The documents of the files, in order; InputError names the file and line that is unfit."""
    for path in paths:
        try:
            if path.name.endswith(SUFFIXES[1:]):
                yield from _read_jsonl(path)
            else:
                yield _text(path.read_bytes(), str(path))
        except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
            raise InputError(f"{path} cannot be read: {error}") from error


def _text(raw: bytes, where: str) -> str:
    require(bool(raw), f"{where} is empty; expected text")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8: {error}") from error


def _read_jsonl(path: Path) -> Iterator[str]:
    """The `text` field of every line; lines of white space alone are passed over."""
    count = 0
    with _open(path) as file:
        for number, raw in enumerate(file, start=1):
            where = f"{path}, line {number}"
            line = _text(raw, where).strip()
            if line:
                yield _text_field(line, where)
                count += 1
    require(count > 0, f"{path} is empty; expected one JSON object a line")


def _text_field(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON: {error}") from error
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str) or not text:
        raise InputError(f"{where}: expected a JSON object whose `text` is a string that is not empty")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can spell
        raise InputError(f"{where}: `text` is not Unicode text: {error}") from error
    return text


def _open(path: Path) -> BinaryIO:
    if path.name.endswith(".gz"):
        return gzip.open(path, "rb")  # pyright: ignore[reportReturnType]
    if path.name.endswith(".zst"):
        return io.BufferedReader(_ZstdReader(path))
    return path.open("rb")


class _ZstdReader(io.RawIOBase):
    """Decompresses zstd. The library's own reader takes a file that was cut short for a complete one."""

    def __init__(self, path: Path) -> None:
        self._parts, self._ready = _decompress_zstd(path), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        self._ready = self._ready or next(self._parts, b"")
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


def _decompress_zstd(path: Path) -> Iterator[bytes]:
    """The parts, none empty, of what the frames of a file hold."""
    frame = None
    with path.open("rb") as file:
        while raw := file.read(CHUNK):
            while raw:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                if part := frame.decompress(raw):
                    yield part
                raw, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame is not None:
        raise EOFError("the compressed file ends in the middle of a frame")

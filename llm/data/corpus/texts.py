"""Readers of plain text and of JSON, compressed or not."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TypeAlias

import pyarrow as pa
import pyarrow.json as pj

from llm.data.corpus.files import kind_of
from llm.data.corpus.pieces import PIECE, pieces
from llm.errors import InputError, require

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

Document: TypeAlias = tuple[str, Iterable[str]]
"""The place of a document, for messages, and the pieces of its text, none empty; () stands for no text."""

OPENERS: dict[str, Callable[[Path], io.BufferedIOBase]] = {
    ".gz": gzip.GzipFile,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": partial(zstd.ZstdFile, options={int(zstd.DecompressionParameter.window_log_max): 31}),  # zstd --long=31
}

BETWEEN = re.compile(r"[ \t\r\n,]*")  # values of a .json file
DECODER = json.JSONDecoder(parse_int=float)  # int() refuses long numbers, which may stand in fields that no one reads


@contextmanager
def _opened(path: Path) -> Iterator[io.BufferedIOBase]:
    """The file's bytes; InputError names it where it cannot be read."""
    try:
        with OPENERS.get(path.suffix.lower(), partial(open, mode="rb"))(path) as raw:
            yield raw
    except (OSError, EOFError, zlib.error, lzma.LZMAError, zstd.ZstdError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def _not_utf8(where: str, error: UnicodeDecodeError, offset: int = 0) -> InputError:
    """offset: the place of the bytes that were decoded in the file or line."""
    at, found = offset + error.start, error.object[error.start]
    advice = "; if it is UTF-16: iconv -f UTF-16 -t UTF-8" if at == 0 and found >= 0xFE else ""
    return InputError(f"{where} is not UTF-8: byte 0x{found:02x} at position {at}: {error.reason}{advice}")


def _chunks(path: Path) -> Iterator[str]:
    """The text of a file, PIECE bytes at a time, without a byte-order mark."""
    with _opened(path) as raw:
        try:
            yield from codecs.iterdecode(iter(partial(raw.read, PIECE), b""), "utf-8-sig")
        except UnicodeDecodeError as error:
            raise _not_utf8(str(path), error, raw.tell() - len(error.object)) from error


def read_txt(path: Path) -> Iterator[Document]:
    """One document."""
    found = pieces(_chunks(path))
    first = next(found, None)
    yield str(path), () if first is None else chain([first], found)


def read_json(path: Path, key: str) -> Iterator[Document]:
    """A document of each object: one a line; or, in a .json file or an array, wherever they begin and end."""
    for where, record in records(path, key):
        text = _field(record, key, where)
        yield where, pieces([text]) if len(text) > PIECE else (text,) if text else ()


def records(path: Path, key: str) -> Iterator[tuple[str, object]]:
    """(place, value) of each JSON value of a file; key: the field that is wanted of it. Raises InputError."""
    with _opened(path) as raw:
        is_array = raw.read(64).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
    return _values(path) if is_array or kind_of(path) == "json" else _lines(path, key)


def _lines(path: Path, key: str) -> Iterator[tuple[str, object]]:
    """(place, value) of each line that is not white space alone."""
    with _opened(path) as lines:
        for number, raw in enumerate(lines, start=1):
            where = f"{path}, line {number}"
            try:
                line = raw.removeprefix(codecs.BOM_UTF8).decode("utf-8").strip()
                if line:
                    yield where, DECODER.decode(line)
            except RecursionError:
                yield where, _deep_record(raw, key, where)
            except UnicodeDecodeError as error:
                raise _not_utf8(where, error) from error
            except ValueError as error:
                raise InputError(f"{where} is not JSON: {error}") from error


def _deep_record(line: bytes, key: str, where: str) -> object:
    """A record that is nested more deeply than Python's parser goes: its text alone, null where there is none."""
    kind = pa.string()
    for name in reversed(key.split(".")):
        kind = pa.struct([(name, kind)])
    options = pj.ParseOptions(pa.schema(kind), newlines_in_values=True, unexpected_field_behavior="ignore")
    try:
        return pj.read_json(pa.BufferReader(line), pj.ReadOptions(False, len(line) + 1), options).to_pylist()[0]
    except pa.ArrowInvalid as error:
        raise InputError(f"{where} is not JSON: {error}") from error


def _values(path: Path) -> Iterator[tuple[str, object]]:
    """(place, value) of each value in an array, or of values that follow one another."""
    chunks, text, at, in_array, number = _chunks(path), "", 0, None, 1
    while True:
        at = BETWEEN.match(text, at).end()  # pyright: ignore
        if in_array is None and at < len(text):
            in_array = text[at] == "["
            at += in_array
            continue
        where = f"{path}, record {number}"
        if in_array and text.startswith("]", at):
            require(not (text[at + 1 :] + next(chunks, "")).strip(), f"{path}: found more behind the array")
            return
        try:
            value, at = DECODER.raw_decode(text, at)
        except RecursionError as error:
            raise InputError(f"{where} is nested too deeply; write one object a line, in a .jsonl file") from error
        except json.JSONDecodeError as error:
            # Wrong, or the text ends within the value, which is noticed in a string or at its last word (-Infinity).
            # Then twice as much is read, so that the work on a value is linear in its size.
            is_cut = error.msg.startswith("Unterminated") or error.pos > len(text) - 16
            more = "".join(islice(chunks, 1 + (len(text) - at) // PIECE)) if is_cut else ""
            if not more and at == len(text) and not in_array:
                return
            require(bool(more), f"{where} is not JSON: {error.msg}" + is_cut * ", where the file ends")
            text, at = text[at:] + more, 0
        else:
            yield where, value
            number += 1


def _field(record: object, key: str, where: str) -> str:
    """The text at `key` in a record (`a.b`: b in a, unless there is a field a.b); nothing where it is null."""
    found = record
    if not isinstance(record, dict):
        raise InputError(f"{where}: found {type(record).__name__}; expected a JSON object with a field `{key}`")
    for name in [key] if key in record else key.split("."):
        if not isinstance(found, dict) or name not in found:
            raise no_field(where, key, record)
        found = found[name]
        if found is None:
            return ""
    if not isinstance(found, str):
        raise InputError(f"{where}: `{key}` is {type(found).__name__}; expected text")
    check_unicode(found, f"{where}: `{key}`")
    return found


def check_unicode(text: str, what: str) -> None:
    """Raise InputError for half of a surrogate pair, which JSON can spell."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{what} is not Unicode text: {error}") from error


def no_field(where: str, key: str, fields: Iterable[str]) -> InputError:
    """The error of a record or table without the field."""
    found = ", ".join(islice(fields, 20)) or "none"
    return InputError(f"{where}: found no field `{key}`, but {found[:400]}; set data.text_key to the field of the text")

"""The same documents written in every form that the readers know."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import sys
from collections.abc import Callable

import pyarrow as pa
import pyarrow.parquet as pq

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

Write = Callable[[list[str]], bytes]
SKIPPABLE = (0x184D2A50).to_bytes(4, "little") + (16).to_bytes(4, "little") + bytes(16)
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd.compress,
}
COLUMNS = {
    "string": pa.string(),
    "large": pa.large_string(),
    "view": pa.string_view(),
    "binary": pa.binary(),
    "dictionary": pa.dictionary(pa.int32(), pa.string()),
}


def jsonl(documents: list[str]) -> bytes:
    return "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in documents).encode()


def raw_jsonl(documents: list[str]) -> bytes:
    lines = (json.dumps({"text": text, "n": {"text": "no"}}, ensure_ascii=False) + "\r\n\n" for text in documents)
    return b"\xef\xbb\xbf" + "".join(lines).encode().rstrip()


def array(documents: list[str]) -> bytes:
    return json.dumps([{"text": text} for text in documents], indent="\t").replace("\n", "\r\n").encode()


def pretty(documents: list[str]) -> bytes:
    return b"\r\n\t ".join(json.dumps({"text": text}, indent=4, ensure_ascii=False).encode() for text in documents)


def table(documents: list[str], kind: str) -> pa.Table:
    """Some columns beside the text; of kind `nested` it is field `text` of a column `meta`."""
    n = len(documents)
    if kind == "nested":
        return pa.table({"n": list(range(n)), "meta": pa.array([{"k": 1, "text": text} for text in documents])})
    column = pa.array(documents, pa.string())
    column = column.dictionary_encode() if kind == "dictionary" else column.cast(COLUMNS[kind])
    return pa.table({"n": list(range(n)), "text": column, "text2": ["no"] * n})


def parquet(documents: list[str], kind: str = "string", **options) -> bytes:
    file = io.BytesIO()
    pq.write_table(table(documents, kind), file, row_group_size=max(1, len(documents) // 3), **options)
    return file.getvalue()


def arrow(documents: list[str], kind: str = "string", stream: bool = False, compression: str | None = None) -> bytes:
    found, file, options = table(documents, kind), io.BytesIO(), pa.ipc.IpcWriteOptions(compression=compression)
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(file, found.schema, options=options) as writer:
        writer.write_table(found, max_chunksize=max(1, len(documents) // 3))
    return file.getvalue()


def _compressed(write: Write, compress: Callable[[bytes], bytes]) -> Write:
    """Two frames or members, which decompress as one."""

    def parts(documents: list[str]) -> bytes:
        raw = write(documents)
        half = len(raw) // 2
        return compress(raw[:half]) + compress(raw[half:])

    return parts


FORMS: dict[str, Write] = {"a.jsonl": jsonl, "b.JSONL": raw_jsonl, "c.ndjson": array, "d.json": array, "e.json": pretty}
FORMS |= {"f.json": jsonl}
FORMS |= {f"a.jsonl{suffix}": _compressed(jsonl, compress) for suffix, compress in COMPRESSIONS.items()}
FORMS |= {f"a.json{suffix}": _compressed(array, compress) for suffix, compress in COMPRESSIONS.items()}
FORMS |= {
    "skip.jsonl.zst": lambda documents: (
        SKIPPABLE + zstd.compress(jsonl(documents[:1])) + SKIPPABLE + zstd.compress(jsonl(documents[1:])) + SKIPPABLE
    ),
    "a.parquet": parquet,
    "b.Parquet": lambda documents: parquet(documents, "large", compression="zstd", use_dictionary=False),
    "c.parquet": lambda documents: parquet(documents, "nested", write_page_checksum=True),
    "d.parquet": lambda documents: parquet(documents, "binary", compression="none", data_page_version="2.0"),
    "a.arrow": arrow,
    "b.arrow": lambda documents: arrow(documents, "dictionary", stream=True),
    "c.arrow": lambda documents: arrow(documents, "view"),
    "d.arrow": lambda documents: arrow(documents, "nested", stream=True),
    "e.arrow": lambda documents: arrow(documents, "binary", stream=True, compression="zstd"),
    "a.feather": lambda documents: arrow(documents, "large", compression="lz4"),
}
"""File name -> how its content is written from at least one document. In those of NESTED the text is `meta.text`."""
NESTED = {"c.parquet", "d.arrow"}


def text_key(name: str) -> str:
    return "meta.text" if name in NESTED else "text"

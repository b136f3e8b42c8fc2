"""Readers of one column of text: Parquet, and Arrow's files and streams (what Hugging Face's `datasets` saves)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from llm.data.corpus.files import kind_of
from llm.data.corpus.pieces import pieces
from llm.data.corpus.texts import Document, no_field
from llm.errors import InputError, require

ROWS = 128  # texts that are Python objects at a time
BUFFER = 1 << 20  # bytes of a Parquet column read at a time
TEXT = (pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.null())


def read_table(path: Path, key: str) -> Iterator[Document]:
    """A document of each row: the column `key` (`a.b`: field b of column a, unless there is a column a.b)."""
    row = 0
    try:
        for column, names in _parquet(path, key) if kind_of(path) == "parquet" else _arrow(path, key):
            column.validate(full=True)  # a damaged file must not lead outside its memory
            for start in range(0, len(column), ROWS):
                part = column.slice(start, ROWS)
                for name in names[1:]:
                    part = part.flatten()[part.type.get_field_index(name)]
                for text in part.cast(pa.large_string()).to_pylist():
                    row += 1
                    yield f"{path}, row {row}", pieces([text]) if text else ()
    except (OSError, ValueError, pa.ArrowException) as error:
        raise InputError(f"{path} cannot be read, after {row} rows: {error}") from error


def _parquet(path: Path, key: str) -> Iterator[tuple[pa.Array, list[str]]]:
    """The column in small parts, read from one row group at a time, and the names that lead to its text."""
    with pq.ParquetFile(path, buffer_size=BUFFER, page_checksum_verification=True) as file:
        names = _resolve(file.schema_arrow, key, path)
        for batch in file.iter_batches(ROWS, columns=[".".join(names)], use_threads=False):
            yield batch.column(names[0]), names


def _arrow(path: Path, key: str) -> Iterator[tuple[pa.Array, list[str]]]:
    """The column as the batches of an Arrow file or stream have it, mapped into memory, and the names likewise."""
    with pa.memory_map(str(path)) as mapped:
        is_file = mapped.read(6) == b"ARROW1"
        mapped.seek(0)
        reader = pa.ipc.open_file(mapped) if is_file else pa.ipc.open_stream(mapped)
        names = _resolve(reader.schema, key, path)
        for batch in map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader:
            yield batch.column(names[0]), names


def _resolve(schema: pa.Schema, key: str, path: Path) -> list[str]:
    """The names that lead to the column; InputError where there is none or it holds no text."""
    kind = pa.struct(list(schema))
    names = [key] if key in schema.names else key.split(".")
    for name in names:
        if not pa.types.is_struct(kind) or kind.get_field_index(name) < 0:
            raise no_field(str(path), key, schema.names)
        kind = kind.field(name).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    require(kind in TEXT, f"{path}: `{key}` is {kind}; expected text")
    return names

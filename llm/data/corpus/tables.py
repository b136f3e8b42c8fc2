"""Readers of one column of text: Parquet, and Arrow's files and streams (what Hugging Face's `datasets` saves)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
        for column in _parquet_texts(path, key) if kind_of(path) == "parquet" else arrow_texts(path, key):
            for start in range(0, len(column), ROWS):
                for text in column.slice(start, ROWS).cast(pa.large_string()).to_pylist():
                    row += 1
                    yield f"{path}, row {row}", pieces([text]) if text else ()
    except (OSError, ValueError, pa.ArrowException) as error:
        raise InputError(f"{path} cannot be read, after {row} rows: {error}") from error


def _parquet_texts(path: Path, key: str) -> Iterator[pa.Array]:
    """The texts in small parts, read from one row group at a time."""
    with open_parquet(path) as file:
        way = way_to(file.schema_arrow, key, path)
        for batch in file.iter_batches(ROWS, columns=[".".join(way)], use_threads=False):
            yield text_of(batch.column(way[0]), way)


def open_parquet(path: Path) -> pq.ParquetFile:
    """A Parquet file, of whose columns little is in memory at a time."""
    return pq.ParquetFile(path, buffer_size=BUFFER, pre_buffer=False, page_checksum_verification=True)


def arrow_texts(path: Path, key: str) -> Iterator[pa.Array]:
    """The texts as the batches of an Arrow file or stream have them, mapped into memory."""
    with pa.memory_map(str(path)) as mapped:
        is_file = mapped.read(6) == b"ARROW1"
        mapped.seek(0)
        reader = pa.ipc.open_file(mapped) if is_file else pa.ipc.open_stream(mapped)
        way = way_to(reader.schema, key, path)
        for batch in map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader:
            yield text_of(batch.column(way[0]), way)


def way_to(schema: pa.Schema, key: str, path: Path) -> list[str]:
    """The names that lead to the text; InputError where there is none or it is no text."""
    kind = pa.struct(list(schema))
    names = [key] if key in schema.names else key.split(".")
    for name in names:
        if not pa.types.is_struct(kind) or kind.get_field_index(name) < 0:
            raise no_field(str(path), key, schema.names)
        kind = kind.field(name).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    require(kind in TEXT, f"{path}: `{key}` is {kind}; expected text")
    return names


def text_of(column: pa.Array, way: Sequence[str]) -> pa.Array:
    """The texts in the column that is the first on the way to them. Raises pa.ArrowInvalid where it is damaged."""
    column.validate(full=True)  # a damaged file must not lead outside its memory
    for name in way[1:]:
        column = column.flatten()[column.type.get_field_index(name)]
    return column

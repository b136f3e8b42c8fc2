"""The memory that pages of a Parquet file take, from their headers, before any of them is decompressed.

The footer has the sizes of whole columns of a row group alone, and may be wrong. Arrow takes a page's from its header,
which is written in Thrift's compact protocol.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from mmap import mmap
from typing import Any

import pyarrow.parquet as pq

VALUE = 16  # bytes that Arrow has for each value of a page, at most: of a dictionary, or the lengths of two parts
DEEPEST = 8  # structures within one another
BOOLS, BYTE, INTEGERS, I32, DOUBLE, BINARY, LISTS, STRUCT = (1, 2), 3, (4, 5, 6), 5, 7, 8, (9, 10), 12
SIZE, STORED = (2, I32), (3, I32)  # fields of a page's header: their numbers and types
# Its header as a data page, as a dictionary, and as a data page of version 2, each with the field of the encoding.
HEADERS = {(5, STRUCT): (2, I32), (7, STRUCT): (2, I32), (8, STRUCT): (4, I32)}
VALUES = (1, I32)
# PLAIN and dictionaries. Of differences (DELTA_BYTE_ARRAY) 30 bytes can claim 2^31 lengths, which Arrow makes room for.
BOUNDED = {0, 2, 8}


@dataclass(frozen=True, slots=True)
class Page:
    """What a page's header says."""

    size: int
    """Bytes, decompressed, without the header."""
    values: int
    begin: int
    """The byte of the file behind the header."""
    end: int


def chunks(group: pq.RowGroupMetaData, columns: Sequence[str]) -> list[tuple[int, int]]:
    """The first byte and the end of each part of a row group that is read for `columns`, or for fields of theirs."""
    found = list[tuple[int, int]]()
    for number in range(group.num_columns):
        column = group.column(number)
        if any(f"{column.path_in_schema}.".startswith(f"{name}.") for name in columns):
            start = min(column.data_page_offset, column.dictionary_page_offset or column.data_page_offset)
            found.append((start, start + column.total_compressed_size))
    return found


def memory_of(content: bytes | mmap, start: int, stop: int) -> int:
    """Bytes of memory that the largest page between two bytes of a file takes. Raises ValueError as `pages`."""
    return max((max(page.size, VALUE * page.values) for page in pages(content, start, stop)), default=0)


def pages(content: bytes | mmap, start: int, stop: int) -> Iterator[Page]:
    """What the headers of the pages say that begin between two bytes of a file; ValueError where one is damaged."""
    if start < 0:
        raise ValueError(f"its pages begin at byte {start}")
    while start < stop:
        reader = _Reader(content, start)
        try:
            found = reader.fields()
        except IndexError as error:
            raise ValueError(f"the header of the page at byte {start} has no end") from error
        size, stored = found.get(SIZE, -1), found.get(STORED, -1)
        heads = [(found[key], encoding) for key, encoding in HEADERS.items() if key in found]
        values = max((head.get(VALUES, -1) for head, _ in heads), default=0)
        end = reader.at + stored
        if min(size, stored, values) < 0 or end > len(content):
            raise ValueError(f"the page at byte {start} is said to have {stored} bytes, {size} and {values} values")
        if unbounded := {head.get(encoding) for head, encoding in heads} - BOUNDED:
            raise ValueError(f"the page at byte {start} has the encoding {unbounded}; expected PLAIN or a dictionary")
        yield Page(size, values, reader.at, end)
        start = end


class _Reader:
    """Reads a structure from byte `at` on. IndexError where the content ends, ValueError where it is no structure."""

    def __init__(self, content: bytes | mmap, at: int) -> None:
        self._content, self.at = content, at

    def fields(self, depth: int = 0) -> dict[tuple[int, int], Any]:
        """The fields by number and type: integers of 32 bits, and structures. Other types are passed over."""
        found, field = dict[tuple[int, int], Any](), 0
        while kind := (head := self._byte()) & 15:
            field = (field + (head >> 4) if head >> 4 else _signed(self._number())) & 0xFFFF
            value = self._value(kind, depth)
            if kind in (I32, STRUCT):
                if (field, kind) in found:  # libraries differ in which of them they take
                    raise ValueError(f"a page's header has field {field} twice")
                found[field, kind] = value
        return found

    def _value(self, kind: int, depth: int, listed: bool = False) -> Any:
        if kind in BOOLS:
            self.at += listed  # of a field, the type is the value
        elif kind == BYTE:
            self.at += 1
        elif kind in INTEGERS:
            return _signed(self._number())
        elif kind == DOUBLE:
            self.at += 8
        elif kind == BINARY:
            size = self._number()
            self.at += size
        elif kind in LISTS and depth < DEEPEST:
            head = self._byte()
            count = self._number() if head >> 4 == 15 else head >> 4
            if count > len(self._content) - self.at:  # each has a byte or more
                raise IndexError
            for _ in range(count):
                self._value(head & 15, depth + 1, listed=True)
        elif kind == STRUCT and depth < DEEPEST:
            return self.fields(depth + 1)
        else:
            raise ValueError(f"a page's header has a field of type {kind} at byte {self.at}")
        return None

    def _byte(self) -> int:
        self.at += 1
        return self._content[self.at - 1]

    def _number(self) -> int:
        """Seven bits a byte, the lowest first."""
        value = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError(f"a page's header has a number without end at byte {self.at}")


def _signed(number: int) -> int:
    return number >> 1 ^ -(number & 1)

"""Megatron's .bin/.idx: written as specified, read only when whole."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm.data.tokens import megatron as formats
from llm.data.tokens.megatron import TokenWriter, read_index, token_dtype
from llm.errors import DamagedFile, InputError


def write(prefix: Path, documents: list[list[int]], dtype: str = "uint16") -> Path:
    with TokenWriter.open(prefix, dtype) as writer:
        for document in documents:
            writer.add(np.array(document))
    return prefix


def test_the_bytes_are_megatrons(tmp_path: Path):
    prefix = write(tmp_path / "a", [[1, 2, 3], [65535], [7, 8]])
    assert (tmp_path / "a.bin").read_bytes() == struct.pack("<6H", 1, 2, 3, 65535, 7, 8)
    assert (tmp_path / "a.idx").read_bytes() == (
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, 8, 3, 4)
        + struct.pack("<3i", 3, 1, 2)
        + struct.pack("<3q", 0, 6, 8)
        + struct.pack("<4q", 0, 1, 2, 3)
    )
    index = read_index(prefix)
    assert (index.dtype, index.tokens, index.bounds.size - 1) == ("uint16", 6, 3)
    assert index.lengths.tolist() == [3, 1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]


def test_int32_and_many_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(formats, "CHUNK", 4)
    documents = [[i, 70_000][: 1 + i % 2] for i in range(23)]
    index = read_index(write(tmp_path / "a", documents, "int32"))
    assert (index.dtype, index.bounds.size - 1) == ("int32", 23)
    flat = [token for document in documents for token in document]
    assert np.fromfile(tmp_path / "a.bin", "<i4").tolist() == flat
    offsets = np.frombuffer((tmp_path / "a.idx").read_bytes()[34 + 4 * 23 :], "<i8", 23)
    assert offsets.tolist() == [4 * sum(map(len, documents[:i])) for i in range(23)]


def test_the_dtype_holds_every_id():
    assert [token_dtype(n) for n in (257, 65536, 65537)] == ["uint16", "uint16", "int32"]


def test_a_failed_write_leaves_nothing(tmp_path: Path):
    with pytest.raises(ValueError, match="do not fit"):  # noqa: SIM117
        with TokenWriter.open(tmp_path / "a", "uint16") as writer:
            writer.add(np.array([65536]))
    with pytest.raises(InputError, match="0 tokens"):  # noqa: SIM117
        with TokenWriter.open(tmp_path / "a", "uint16") as writer:
            writer.add(np.array([], dtype=np.int64))
    assert list(tmp_path.iterdir()) == []


def header(magic=formats.MAGIC, version=1, code=8, sequences=2, boundaries=3) -> bytes:
    return formats.HEADER.pack(magic, version, code, sequences, boundaries)


GOOD = struct.pack("<2i2q3q", 2, 1, 0, 4, 0, 1, 2)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (b"", "cannot be read at byte 0: it ends there, truncated"),
        (header()[:20], "cannot be read at byte 18: it ends there, truncated"),
        (header() + GOOD[:-1], "has 81 bytes, which is not what its 2 sequences and 3 boundaries take"),
        (header() + GOOD + b"x", "has 83 bytes, which is not what"),
        (header(magic=b"PK\x03\x04     ") + GOOD, "does not begin with MMIDIDX"),
        (header(version=2) + GOOD, "the version at byte 9 is 2, expected 1"),
        (header(code=6) + GOOD, r"the dtype code at byte 17 is 6, expected 1 \(uint8\), 8 \(uint16\), 4 \(int32\)"),
        (header(sequences=2**63) + GOOD, "holds no document"),
        (header(sequences=2**62) + GOOD, "which is not what its 4611686018427387904 sequences"),
        (header(boundaries=2**64 - 1) + GOOD, "holds no document"),
        (header(boundaries=2**61) + GOOD, "which is not what its 2 sequences and 2305843009213693952 boundaries"),
        (header(sequences=0, boundaries=0), "holds no document: 0 sequences and 0 boundaries at byte 18"),
        (header() + struct.pack("<2i2q3q", -1, 4, 0, -2, 0, 1, 2), "last sequence has 4 tokens from byte -2 on"),
        (header() + struct.pack("<2i2q3q", -1, 3, 0, 0, 0, 1, 2), "sequence 0, at byte 34, has -1 tokens"),
        (header() + struct.pack("<2i2q3q", 4, -1, 0, 8, 0, 1, 2), "the last sequence has -1 tokens"),
        (header() + struct.pack("<2i2q3q", 2, 1, 0, -4, 0, 1, 2), "the last sequence has 1 tokens from byte -4 on"),
        (
            header() + struct.pack("<2i2q3q", 2, 2, 0, 2, 0, 1, 2),
            "the offset of sequence 1, at byte 50, is 2, expected 4",
        ),
        (
            header() + struct.pack("<2i2q3q", 1, 1, 0, 4, 0, 1, 2),
            "is 4, expected 2: the sequences overlap or leave gaps",
        ),
        (header() + struct.pack("<2i2q3q", 2, 1, 2, 4, 0, 1, 2), "the first offset at byte 42 is 2, expected 0"),
        (header() + struct.pack("<2i2q3q", 2, 1, 0, 4, 0, 2, 1), "the last boundary at byte 74 is 1, expected 2"),
        (header() + struct.pack("<2i2q3q", 2, 1, 0, 4, 0, 3, 2), "the document boundary at byte 74 is 2, expected at"),
        (header() + struct.pack("<2i2q3q", 2, 1, 0, 4, 1, 1, 2), "the first boundary at byte 58 is 1, expected 0"),
    ],
)
def test_a_damaged_index_is_refused(tmp_path: Path, index: bytes, message: str):
    write(tmp_path / "a", [[1, 2], [3]])
    assert (tmp_path / "a.idx").read_bytes() == header() + GOOD
    (tmp_path / "a.idx").write_bytes(index)
    with pytest.raises(DamagedFile, match=r"a\.idx: .*" + message):
        read_index(tmp_path / "a")


@pytest.mark.parametrize("tokens", [[2, 2], [1, 1], [2**31 - 1, 1]])
def test_an_index_that_is_sound_but_of_another_file_is_refused(tmp_path: Path, tokens: list[int]):
    write(tmp_path / "a", [[1, 2], [3]])
    (tmp_path / "a.idx").write_bytes(header() + struct.pack("<2i2q3q", *tokens, 0, 2 * tokens[0], 0, 1, 2))
    with pytest.raises(DamagedFile, match=rf"a\.bin: has 6 bytes, expected {2 * sum(tokens)} "):
        read_index(tmp_path / "a")


def test_damage_is_found_in_every_block_of_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(formats, "CHUNK", 4)
    write(tmp_path / "a", [[i] for i in range(23)])
    good = (tmp_path / "a.idx").read_bytes()
    for at in range(23):  # a length that hides a gap, an offset, a boundary
        for offset, kind, change in ((34 + 4 * at, "i", 1), (34 + 92 + 8 * at, "q", 2), (34 + 276 + 8 * at, "q", 25)):
            raw = bytearray(good)
            value = struct.unpack_from(f"<{kind}", raw, offset)[0]
            struct.pack_into(f"<{kind}", raw, offset, value + change)
            (tmp_path / "a.idx").write_bytes(raw)
            with pytest.raises(DamagedFile):
                read_index(tmp_path / "a")


def test_missing_and_truncated_files_are_refused(tmp_path: Path):
    prefix = write(tmp_path / "a", [[1, 2], [3]])
    (tmp_path / "a.bin").write_bytes(b"12345")
    with pytest.raises(DamagedFile, match=r"a\.bin: has 5 bytes, expected 6 \(3 tokens of 2 bytes\)"):
        read_index(prefix)
    (tmp_path / "a.bin").unlink()
    with pytest.raises(DamagedFile, match=r"a\.bin: cannot be opened: No such file"):
        read_index(prefix)


@given(data=st.data())
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_byte_sequence_confuses_the_reader(tmp_path: Path, data: st.DataObject):
    """Whatever the .idx holds, it is refused with InputError or describes the .bin file exactly."""
    write(tmp_path / "a", [[1, 2, 3], [4], [5, 6]])
    raw = bytearray((tmp_path / "a.idx").read_bytes())
    for _ in range(data.draw(st.integers(0, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(0, len(raw)) | st.just(len(raw)))]
    raw += data.draw(st.binary(max_size=16) | st.just(b""))
    (tmp_path / "a.idx").write_bytes(raw)
    try:
        index = read_index(tmp_path / "a")
    except InputError:
        return
    assert index.tokens * np.dtype(index.dtype).itemsize == 12
    assert int(index.lengths.sum()) == index.tokens


def test_many_documents_at_once_are_as_one_by_one(tmp_path: Path):
    documents = [[1, 2, 3], [], [65535], [7, 8]]
    write(tmp_path / "a", [[*document, 300] for document in documents])
    with TokenWriter.open(tmp_path / "b", "uint16") as writer:
        writer.add_documents([], 300)
        writer.add_documents([np.array(document, np.uint32) for document in documents[:3]], 300)
        writer.add_documents([np.array(documents[3], np.uint32)], 300)
        assert (writer.tokens, writer.documents) == (10, 4)
        with pytest.raises(ValueError, match="do not fit"):
            writer.add_documents([np.array([65536], np.uint32)], 300)
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"b.{suffix}").read_bytes() == (tmp_path / f"a.{suffix}").read_bytes()


def test_files_are_appended(tmp_path: Path):
    whole = [[1, 2, 3], [4], [5, 6], [7]]
    write(tmp_path / "whole", whole)
    write(tmp_path / "a", whole[:1])
    write(tmp_path / "b", whole[1:3])
    with TokenWriter.open(tmp_path / "joined", "uint16") as writer:
        writer.append(tmp_path / "a")
        writer.append(tmp_path / "b")
        writer.add(np.array(whole[3]))
        assert (writer.tokens, writer.documents) == (7, 4)
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"joined.{suffix}").read_bytes() == (tmp_path / f"whole.{suffix}").read_bytes()
    with (
        pytest.raises(DamagedFile, match="ids of uint16, expected int32"),
        TokenWriter.open(tmp_path / "c", "int32") as other,
    ):
        other.append(tmp_path / "a")

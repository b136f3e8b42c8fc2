"""Every form of a corpus gives the same documents; a damaged file is named, or read as far as it means something."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from formats import COMPRESSIONS, FORMS, jsonl, text_key
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm.data.corpus import TextCorpus, read_corpus, texts
from llm.data.corpus.pieces import PIECE
from llm.errors import InputError

DOCUMENTS = [f"document {i}, naïve 日本 🎉\n\x00" + "word " * (i % 7) for i in range(40)]
ANY_TEXT = st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=8)
QUICK = settings(
    deadline=None,
    max_examples=8,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def read(path: Path, content: bytes) -> list[str]:
    path.write_bytes(content)
    return list(read_corpus(str(path), text_key(path.name)))


@pytest.mark.parametrize("name", FORMS)
@given(documents=ANY_TEXT)
@QUICK
def test_every_form_gives_back_the_documents(tmp_path: Path, name: str, documents: list[str]):
    assert read(tmp_path / name, FORMS[name](documents)) == documents


@pytest.mark.parametrize("name", ["c.ndjson", "d.json", "e.json", "f.json"])
@given(documents=ANY_TEXT, size=st.integers(1, 40))
@QUICK
def test_json_is_read_a_little_at_a_time(tmp_path: Path, name: str, documents: list[str], size: int):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "PIECE", size)
        assert read(tmp_path / name, FORMS[name](documents)) == documents


@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
@QUICK
def test_a_txt_is_one_document_as_it_is(tmp_path: Path, text: str):
    expected = [text.removeprefix("\ufeff")] if text != "\ufeff" else []
    for suffix, compress in {"": bytes, **COMPRESSIONS}.items():
        if expected:
            assert read(tmp_path / f"a.txt{suffix}", compress(text.encode())) == expected


@pytest.mark.parametrize("name", ["a.txt", "d.json", "a.jsonl", "a.parquet", "a.arrow"])
def test_long_documents_are_joined_again(tmp_path: Path, name: str):
    documents = ["x" * 600_000, "a line of é words\n" * 50_000, "no space" + "語" * 300_000]
    if name == "a.txt":
        assert read(tmp_path / name, "".join(documents).encode()) == ["".join(documents)]
    else:
        assert read(tmp_path / name, FORMS[name](documents)) == documents
    for document in TextCorpus(str(tmp_path / name)).documents():
        assert max(map(len, document)) <= PIECE


def test_the_work_on_a_json_value_is_linear_in_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    read_at_once = list[int]()

    class Counting(json.JSONDecoder):
        def raw_decode(self, text: str, at: int = 0) -> tuple[object, int]:
            read_at_once.append(len(text) - at)
            return super().raw_decode(text, at)

    monkeypatch.setattr(texts, "DECODER", Counting())
    monkeypatch.setattr(texts, "PIECE", 100)
    content = FORMS["d.json"](["x" * 100_000])
    assert read(tmp_path / "d.json", content) == ["x" * 100_000]
    assert sum(read_at_once) < 4 * len(content)


@pytest.mark.parametrize("name", ["a.txt", *FORMS])
@given(data=st.data())
@QUICK
def test_a_damaged_file_is_named(tmp_path: Path, name: str, data: st.DataObject):
    raw = bytearray(FORMS[name](DOCUMENTS) if name in FORMS else DOCUMENTS[0].encode())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at:] = data.draw(
            st.sampled_from([b"", bytes(raw[at + 1 :]), bytes([raw[at] ^ 255]) + raw[at + 1 :], b"\xff\0" + raw[at:]])
        )
        raw = raw or bytearray(b"\xff")
    message = name
    try:
        read(tmp_path / name, bytes(raw))
    except InputError as error:
        message = str(error)
    assert name in message


@pytest.mark.parametrize("suffix", COMPRESSIONS)
@given(share=st.floats(0.01, 0.99))
@QUICK
def test_a_compressed_file_cut_short_is_an_error(tmp_path: Path, suffix: str, share: float):
    whole = COMPRESSIONS[suffix](jsonl(DOCUMENTS))
    for before in (b"", whole):
        content = before + whole[: max(1, int(share * len(whole)))]
        if not (suffix == ".bz2" and before and len(content) - len(before) < 4):  # which bz2 takes for padding
            with pytest.raises(InputError, match="cannot be read"):
                read(tmp_path / f"a.jsonl{suffix}", content)


def test_a_zstd_window_of_2_gib(tmp_path: Path):
    """A frame by hand (RFC 8878): no size, no checksum, the largest window of `zstd --long=31`, one raw block."""
    text = jsonl(DOCUMENTS)
    block = (1 | len(text) << 3).to_bytes(3, "little") + text
    assert read(tmp_path / "a.jsonl.zst", b"\x28\xb5\x2f\xfd" + bytes([0, 31 - 10 << 3]) + block) == DOCUMENTS

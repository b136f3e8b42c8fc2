from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from minhash import shingles_of, signature

from llm.crawl._native import Signer
from llm.crawl.counts import Counts
from llm.crawl.dedup import signatures
from llm.crawl.dedup.signatures import Array, Shape, SignatureFile, open_signatures, write_signatures
from llm.errors import InputError

SHAPE = Shape(shingle_words=3, bands=4, rows=2)
WORDS = st.sampled_from(
    ["a", "the", "snow-white", "don't", "3.14", "Straße", "1,000", "這是", "日本。", "ไทย", "!", "(x)"]
)
TEXT = st.one_of(st.text(max_size=60), st.lists(WORDS, max_size=40).map(" ".join))


@given(text=TEXT, size=st.integers(1, 6), bands=st.integers(1, 5), rows=st.integers(1, 5))
def test_signatures_are_those_computed_slowly(text: str, size: int, bands: int, rows: int) -> None:
    signer = Signer(size, bands, rows)
    assert signer.shingles(text).tolist() == shingles_of(text, size)
    assert signer.sign(["other", text])[1].tolist() == signature(text, size, bands, rows)


def test_case_signs_and_spaces_do_not_make_another_document(tmp_path: Path) -> None:
    texts = ["Hello,  World: it's me!", "hello world\n(it's me)", "hello word it's me", "...", "!!!", ""]
    file = written(tmp_path, texts)
    hashes = dict(pairs(file, -1))
    assert hashes[0] == hashes[1]
    assert len(set(hashes.values())) == 5


def test_two_characters_of_a_script_without_spaces_are_two_words() -> None:
    assert len(Signer(1, 1, 1).shingles("這是一本書 and ไทย")) == 5 + 1 + 3


def test_the_minimum_of_a_row_is_shared_as_often_as_shingles_are() -> None:
    """Over pairs of texts the number of equal rows has the mean and the variance of independent throws."""
    draw = random.Random(1)
    rows, similarity, found = 256, 0.6, list[int]()
    for i in range(100):
        common, own = [[f"{i}{kind}{draw.random()}" for _ in range(n)] for kind, n in (("c", 150), ("o", 100))]
        one, other = (Signer(1, rows, 1).sign([" ".join(common + part)])[0] for part in (own[:50], own[50:]))
        found.append(int((one == other)[2:].sum()))
    assert np.mean(found) == pytest.approx(rows * similarity, rel=0.02)
    assert np.var(found) == pytest.approx(rows * similarity * (1 - similarity), rel=0.5)


def test_a_file_holds_each_band_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signatures, "BLOCK", 4)
    texts = [f"text {i % 5} of several words {i % 3}" for i in range(19)]
    file = written(tmp_path, texts)
    expected = np.array([signature(text, 3, 4, 2) for text in texts], np.uint64)
    assert sum(file.blocks) == 19 and len(file.blocks) > 2
    assert file.ids().tolist() == [10 * i for i in range(19)]
    assert file.witnesses().tolist() == expected[:, 0].tolist()
    for band in range(-1, 4):
        found = dict(pairs(file, band))
        assert [found[i] for i in range(19)] == expected[:, band + 2].tolist()
        for run in file.runs(band, 0):
            hashes = np.fromfile(file.path, signatures.PAIR, run.count, offset=run.offset)["hash"]
            assert (np.diff(hashes.astype(object)) >= 0).all()
    size = file.path.stat().st_size
    assert 0 < size - 19 * (16 + 12 * 5) < 200  # the bytes of a document that docs/corpus.md gives


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "gone", "checksum"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    path = written(tmp_path, ["one text", "another"]).path
    content = bytearray(path.read_bytes())
    content[{"flip": 9, "checksum": -1}.get(damage, 0)] ^= damage in ("flip", "checksum")
    path.write_bytes(content[: {"cut": -7, "empty": 0}.get(damage, len(content))])
    if damage == "gone":
        path.unlink()
    with pytest.raises(InputError, match=rf"{path} .*run its stage again"):
        open_signatures(path, SHAPE)


def test_a_file_of_another_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected .*'bands': 5"):
        open_signatures(written(tmp_path, ["one text"]).path, Shape(3, 5, 2))


def written(folder: Path, texts: list[str]) -> SignatureFile:
    def batches() -> Iterator[tuple[Array, list[str]]]:
        for i in range(0, len(texts), 2):
            some = texts[i : i + 2]
            yield np.arange(i, i + len(some)) * 10, some

    path = folder / "00000.signatures"
    write_signatures(path, SHAPE, batches(), Counts())
    return open_signatures(path, SHAPE)


def pairs(file: SignatureFile, band: int) -> Iterator[tuple[int, int]]:
    """(document, hash)"""
    for run in file.runs(band, 0):
        for hashed, document in np.fromfile(run.path, signatures.PAIR, run.count, offset=run.offset).tolist():
            yield run.base + document, hashed

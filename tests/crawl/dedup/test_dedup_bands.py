from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from minhash import clusters, signature

from llm.crawl._native import join, merge
from llm.crawl.counts import Counts
from llm.crawl.dedup import bands, signatures
from llm.crawl.dedup.bands import join_bands
from llm.crawl.dedup.signatures import PAIR, Array, Shape, SignatureFile, open_signatures, write_signatures
from llm.errors import InputError

SHAPE = Shape(shingle_words=2, bands=3, rows=2)
PARTS = st.lists(st.lists(st.lists(st.sampled_from("abcde"), max_size=9).map(" ".join), max_size=9), max_size=6)


def written(folder: Path, parts: Sequence[Sequence[str]]) -> list[SignatureFile]:
    files, first = list[SignatureFile](), 0
    for i, texts in enumerate(parts):
        path = folder / f"{i}.signatures"
        write_signatures(path, SHAPE, iter([(np.arange(first, first + len(texts)), list(texts))]), Counts())
        files.append(open_signatures(path, SHAPE))
        first += len(texts)
    return files


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
@given(parts=PARTS, memory=st.sampled_from([1, 100, 4096, 1 << 20]), block=st.sampled_from([2, 1 << 18]))
def test_clusters_are_the_connected_components(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: list[list[str]], memory: int, block: int
) -> None:
    monkeypatch.setattr(signatures, "BLOCK", block)
    monkeypatch.setattr(bands, "LEAST", 36)
    (runs := tmp_path / "runs").mkdir(exist_ok=True)
    texts = [text for part in parts for text in part]
    signed = [signature(text, 2, 3, 2) for text in texts]
    roots, sizes, exact = join_bands(written(tmp_path, parts), memory, runs)
    assert roots.tolist() == clusters(signed)
    assert sizes.tolist() == [roots.tolist().count(i) for i in range(len(texts))]
    same = [any(signed[i][1] == other[1] for other in signed[:i]) for i in range(len(texts))]
    assert np.unpackbits(exact)[: len(texts)].tolist() == same
    assert not list(runs.iterdir())


def test_a_few_kilobytes_merge_many_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """300 runs of 40 pairs, 12 bytes each, in 4 kB: two at a time are merged through files, in nine passes."""
    draw = np.random.default_rng(1)
    parts = [[f"{n} alike" for n in draw.integers(0, 8000, 40)] for _ in range(300)]
    files = written(tmp_path, parts)
    (runs := tmp_path / "runs").mkdir()
    seen = list[int]()

    def watched(group: list[Iterator[Array]], count: int, write: Callable[[Any], object]) -> None:
        seen.append((len(group) + 1) * count * PAIR.itemsize)
        merge(group, count, write)

    monkeypatch.setattr(bands, "merge", watched)
    few, many = join_bands(files, 4096, runs), join_bands(files, 1 << 30, runs)
    assert len(seen) == (150 + 75 + 38 + 19 + 10 + 5 + 3 + 2) * 4
    assert max(seen) <= 4096
    for one, other in zip(few, many, strict=True):
        assert one.tolist() == other.tolist()
    assert len(set(few[0].tolist())) < 8000


def test_clusters_do_not_depend_on_how_documents_lie_in_parts(tmp_path: Path) -> None:
    texts = [f"{i % 7} {i % 5} {i % 3}" for i in range(60)]
    found = list[list[int]]()
    for size in (60, 7, 1):
        (folder := tmp_path / str(size)).mkdir()
        parts = [texts[i : i + size] for i in range(0, 60, size)]
        found.append(join_bands(written(folder, parts), 1 << 20, folder)[0].tolist())
    assert found[0] == found[1] == found[2]
    assert 1 < len(set(found[0])) < 60


def test_a_file_that_is_cut_while_it_is_merged_is_named(tmp_path: Path) -> None:
    file = written(tmp_path, [["a b", "c d"]])[0]
    with file.path.open("r+b") as opened:
        opened.truncate(40)
    with pytest.raises(InputError, match=str(file.path)):
        join_bands([file], 1 << 20, tmp_path)


def test_an_error_of_the_disk_reaches_the_caller() -> None:
    def full(_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    with pytest.raises(OSError, match="full"):
        merge([iter([np.array([(1, 0)], PAIR)])], 100, full)


@pytest.mark.parametrize("pairs", [[(1, 7)], [(2, 0), (1, 1)]])
def test_runs_that_make_no_sense_are_refused(pairs: list[tuple[int, int]]) -> None:
    with pytest.raises((ValueError, IndexError), match=r"not in order|there is not"):
        join([iter([np.array(pairs, PAIR)])], np.arange(2, dtype=np.uint32))
    with pytest.raises(TypeError, match="12 bytes"):
        join([iter([np.arange(2)])], np.arange(2, dtype=np.uint32))


def test_too_many_documents_are_refused_before_memory_is_taken(tmp_path: Path) -> None:
    file = SignatureFile(tmp_path / "none", SHAPE, (1 << 32,))
    with pytest.raises(InputError, match="4294967296 documents"):
        join_bands([file], 1 << 20, tmp_path)

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from llm.crawl.counts import Counts
from llm.crawl.dedup import clusters
from llm.crawl.dedup.clusters import read_dropped, split_of_cluster, write_clusters
from llm.errors import InputError

IDS = np.array([3, 5, 8, 1 << 33, (1 << 33) + 1, (1 << 33) + 7], np.int64)
ROOTS = np.array([0, 1, 0, 0, 1, 5], np.uint32)
SIZES = np.array([3, 2, 0, 0, 0, 1], np.uint32)
EXACT = np.packbits([0, 0, 1, 0, 0, 0])


def written(folder: Path) -> tuple[Path, Counts]:
    path, counts = folder / "clusters.parquet", Counts()
    write_clusters(path, IDS, ROOTS, SIZES, EXACT, counts)
    return path, counts


def test_the_file_has_the_clusters_of_two_and_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = written(tmp_path)
    rows = pq.read_table(whole[0]).to_pylist()
    assert [tuple(row.values()) for row in rows] == [
        (3, 3, 3, False), (5, 5, 2, False), (8, 3, 3, True), (1 << 33, 3, 3, False), ((1 << 33) + 1, 5, 2, False),
    ]  # fmt: skip
    assert whole[1].histograms["cluster_size"] == {"1": 1, "2": 1, "4": 1}


def test_all_but_the_first_of_a_cluster_are_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = written(tmp_path)
    assert read_dropped(path, IDS) == {8: "exact", 1 << 33: "near", (1 << 33) + 1: "near"}
    assert read_dropped(path, IDS[:3]) == {8: "exact"}
    assert read_dropped(path, IDS[:0]) == read_dropped(path, IDS[5:]) == {}


def test_many_documents_go_through_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "ROWS", 8)
    draw = np.random.default_rng(1)
    roots = np.minimum(np.arange(100), draw.integers(0, 100, 100)).astype(np.uint32)
    roots = roots[roots[roots[roots[roots[roots[roots]]]]]]
    exact = draw.integers(0, 2, 100).astype(np.uint8)
    ids, sizes = np.arange(100) * 3, np.bincount(roots, minlength=100)
    write_clusters(tmp_path / "x", ids, roots, sizes, np.packbits(exact), Counts())
    expected = {3 * i: "exact" if exact[i] else "near" for i in range(100) if roots[i] != i}
    assert read_dropped(tmp_path / "x", ids) == expected
    assert pq.ParquetFile(tmp_path / "x").num_row_groups > 5


def test_no_damage_of_the_rows_goes_unseen(tmp_path: Path) -> None:
    path, _ = written(tmp_path)
    whole, expected, found = path.read_bytes(), read_dropped(path, IDS), 0
    group = pq.ParquetFile(path).metadata.row_group(0)
    for place in range(4, 4 + sum(group.column(i).total_compressed_size for i in range(4))):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            assert read_dropped(path, IDS) == expected  # a byte of no meaning
        except InputError as error:
            found += str(path) in str(error)
    assert found > 100


def test_clusters_are_split_by_the_hash_of_their_root() -> None:
    splits = [split_of_cluster(root, 0.1) for root in range(10_000)]
    assert 900 < splits.count("validation") < 1100
    assert all(split_of_cluster(i, 0.2) == "validation" for i, split in enumerate(splits) if split == "validation")
    assert {split_of_cluster(i, 0.0) for i in range(100)} == {"train"}
    with pytest.raises(InputError, match="fraction"):
        split_of_cluster(1, 1.5)

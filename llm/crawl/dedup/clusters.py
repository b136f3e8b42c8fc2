"""The file of the clusters: of each document that has duplicates, the cluster's root, its size, and how it is alike."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from llm.crawl.counts import Counts
from llm.crawl.dedup.signatures import Array, SignatureFile, groups_with
from llm.crawl.documents import opened
from llm.errors import InputError, require
from llm.files import complete_file

SCHEMA = pa.schema((("id", pa.int64()), ("root", pa.int64()), ("size", pa.uint32()), ("exact", pa.bool_())))
ENCODING = {"id": "DELTA_BINARY_PACKED", "root": "DELTA_BINARY_PACKED"}
ROWS = 1 << 18  # documents at a time: a multiple of eight


def read_ids(files: Sequence[SignatureFile]) -> Array:
    """The ids of all documents; raises InputError unless they ascend."""
    ids, end = np.empty(sum(file.size for file in files), np.int64), 0
    for file in files:
        end += file.size
        ids[end - file.size : end] = file.ids()
    for start in range(0, len(ids), ROWS):
        some = ids[start : start + ROWS + 1]
        wrong = np.flatnonzero(some[1:] <= some[:-1])
        if len(wrong):
            one, other = some[wrong[0] : wrong[0] + 2]
            raise InputError(f"document {other} follows {one}; expected ids that ascend: run the stages before again")
    return ids


def write_clusters(path: Path, ids: Array, roots: Array, sizes: Array, exact: Array, counts: Counts) -> None:
    """Write id, root and size, ordered by id, of the documents in clusters of two and more; count clusters by size.

    exact: whether a document before has the same words. The pages carry checksums.
    """
    options: dict[str, Any] = {"compression": "zstd", "write_page_checksum": True, "use_dictionary": False}
    with complete_file(path) as file, pq.ParquetWriter(file, SCHEMA, column_encoding=ENCODING, **options) as writer:
        for start in range(0, len(ids), ROWS):
            root = roots[start : start + ROWS]
            size = sizes[root]
            rows = np.flatnonzero(size > 1)
            same = np.unpackbits(exact[start // 8 : (start + ROWS) // 8])[rows].astype(bool)
            columns = ids[start + rows], ids[root[rows]], size[rows], same
            writer.write_batch(pa.record_batch([pa.array(column) for column in columns], SCHEMA))
            _count_sizes(sizes[start : start + ROWS], counts)


def _count_sizes(sizes: Array, counts: Counts) -> None:
    """Add clusters to the histogram `cluster_size`, by the power of two at or above their size."""
    powers = np.bincount(np.ceil(np.log2(sizes[sizes > 0])).astype(int))
    for power, count in enumerate(powers.tolist()):
        if count:
            counts.count("cluster_size", str(1 << power), count)


def read_dropped(path: Path, ids: Array) -> dict[int, str]:
    """Of these documents, whose ids ascend, those that are not the first of their cluster: "exact" or "near".

    Raises InputError where the file is damaged.
    """
    dropped = dict[int, str]()
    with opened(path) as file:
        for group in groups_with(file, ids):
            table = file.read_row_group(group, use_threads=False)
            found, roots, exact = (table[name].to_numpy() for name in ("id", "root", "exact"))
            rows = np.flatnonzero((found != roots) & np.isin(found, ids))
            dropped |= zip(found[rows].tolist(), np.where(exact[rows], "exact", "near").tolist(), strict=True)
    return dropped


def split_of_cluster(root: int, fraction: float) -> str:
    """ "validation" for that fraction of the clusters, "train" for the others, by the hash of the root's id."""
    require(0 <= fraction <= 1, f"the fraction for validation is {fraction}; expected 0 to 1")
    place = xxhash.xxh3_64_intdigest(root.to_bytes(8, "little", signed=True))
    return "validation" if place < fraction * 2**64 else "train"

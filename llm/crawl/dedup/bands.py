"""Joins the documents that share a hash, band by band: the runs on disk are merged, in bounded memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llm.crawl._native import flatten, join_runs, merge_runs
from llm.crawl.dedup.signatures import PAIR, Array, SignatureFile
from llm.errors import InputError, require

OPEN = 512  # runs that are merged at a time, at most: each is an open file
LEAST, MOST = 64 << 10, 1 << 20  # bytes that are read of a run at once, where memory allows
DOCUMENTS = 1 << 32  # that numbers of four bytes can tell apart
CHUNK = 1 << 20  # documents, a multiple of eight

Run = tuple[str, int, int, int]


def join_bands(files: Sequence[SignatureFile], memory: int, folder: Path) -> tuple[Array, Array, Array]:
    """Of each document, in the order of the files: its root, the smallest of its cluster; the cluster's size, at its
    root; and, eight to a byte, whether a smaller one has the same words.

    memory: bytes for the merge, beside 8 of each document. folder: for the runs of a merge in several passes.
    Raises InputError.
    """
    documents = sum(file.size for file in files)
    require(documents < DOCUMENTS, f"{documents} documents; {DOCUMENTS - 1} can be clustered: deduplicate parts of them")
    roots = np.arange(documents, dtype=np.uint32)
    exact = np.empty(0, np.uint8)
    for band in range(-1, files[0].shape.bands if files else 0):
        runs, base = list[Run](), 0
        for file in files:
            runs += file.runs(band, base)
            base += file.size
        try:
            _join(runs, roots, memory, folder)
        except RuntimeError as error:
            raise InputError(f"band {band} of the signatures: {error}; run the signatures again") from error
        if band < 0:
            flatten(roots)
            exact = np.concatenate([exact, *map(_joined, *_chunks(roots))])
    return roots, flatten(roots), exact


def _chunks(roots: Array) -> tuple[list[Array], range]:
    starts = range(0, len(roots), CHUNK)
    return [roots[start : start + CHUNK] for start in starts], starts


def _joined(roots: Array, start: int) -> Array:
    return np.packbits(roots != np.arange(start, start + len(roots), dtype=np.uint32))


def _join(runs: list[Run], roots: Array, memory: int, folder: Path) -> None:
    at_once = max(2, min(OPEN, memory // LEAST - 1))
    buffer = max(PAIR.itemsize, min(MOST, memory // (min(at_once, len(runs)) + 1)))
    made = list[Path]()
    while len(runs) > at_once:
        groups = [runs[start : start + at_once] for start in range(0, len(runs), at_once)]
        paths = [folder / f"{len(runs)}-{i}.run" for i in range(len(groups))]
        for group, path in zip(groups, paths, strict=True):
            merge_runs(group, buffer, str(path))
        runs = [(str(path), 0, sum(run[2] for run in group), 0) for group, path in zip(groups, paths, strict=True)]
        _remove(made)
        made = paths
    join_runs(runs, buffer, roots)
    _remove(made)


def _remove(paths: list[Path]) -> None:
    for path in paths:
        path.unlink()

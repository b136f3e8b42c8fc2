"""Joins the documents that share a hash, band by band: the runs on disk are merged, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from llm.crawl._native import flatten, join, merge
from llm.crawl.dedup.signatures import PAIR, Array, Run, SignatureFile
from llm.errors import InputError, require

OPEN = 512  # runs that are merged at a time, at most: each is an open file
LEAST, MOST = 64 << 10, 1 << 20  # bytes that are read of a run at once, where memory allows
DOCUMENTS = 1 << 32  # that numbers of four bytes can tell apart
CHUNK = 1 << 20  # documents, a multiple of eight


def join_bands(files: Sequence[SignatureFile], memory: int, folder: Path) -> tuple[Array, Array, Array]:
    """Of each document, in the order of the files: its root, the smallest of its cluster; the cluster's size, at its
    root; and, eight to a byte, whether a smaller one has the same words.

    memory: bytes for the merge, beside 8 of each document. folder: for the runs of a merge in several passes.
    Raises InputError.
    """
    documents = sum(file.size for file in files)
    require(documents < DOCUMENTS, f"{documents} documents; expected at most {DOCUMENTS - 1}: deduplicate in parts")
    roots, exact = np.arange(documents, dtype=np.uint32), np.empty(0, np.uint8)
    for band in range(-1, files[0].shape.bands if files else 0):
        runs, base = list[Run](), 0
        for file in files:
            runs += file.runs(band, base)
            base += file.size
        _join(runs, roots, memory, folder)
        if band < 0:
            flatten(roots)
            exact = np.concatenate([exact, *(_joined(roots, start) for start in range(0, documents, CHUNK))])
    return roots, flatten(roots), exact


def _joined(roots: Array, start: int) -> Array:
    some = roots[start : start + CHUNK]
    return np.packbits(some != np.arange(start, start + len(some), dtype=np.uint32))


def _join(runs: list[Run], roots: Array, memory: int, folder: Path) -> None:
    at_once = max(2, min(OPEN, memory // LEAST - 1))
    size = max(1, min(MOST, memory // (min(at_once, len(runs)) + 1)) // PAIR.itemsize)
    made = list[Path]()
    while len(runs) > at_once:
        groups = [runs[start : start + at_once] for start in range(0, len(runs), at_once)]
        paths = [folder / f"{len(runs)}-{i}.run" for i in range(len(groups))]
        for group, path in zip(groups, paths, strict=True):
            with path.open("xb", buffering=0) as file:
                merge([_pairs(run, size) for run in group], size, file.write)
        runs = [Run(path, 0, sum(run.count for run in group), 0) for group, path in zip(groups, paths, strict=True)]
        _remove(made)
        made = paths
    join([_pairs(run, size) for run in runs], roots)
    _remove(made)


def _pairs(run: Run, size: int) -> Iterator[Array]:
    """The pairs of a run, `size` at a time."""
    left = run.count
    with run.path.open("rb", buffering=0) as file:
        file.seek(run.offset)
        while left:
            pairs = np.fromfile(file, PAIR, min(size, left))
            if not len(pairs):
                raise InputError(f"{run.path} ends too early: it was cut after it was found whole; run its stage again")
            left -= len(pairs)
            pairs["document"] += run.base
            yield pairs


def _remove(paths: list[Path]) -> None:
    for path in paths:
        path.unlink()

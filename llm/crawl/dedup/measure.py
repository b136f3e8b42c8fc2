"""Recall and precision of the clusters, against exact Jaccard similarities of a sample."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from llm.crawl.dedup.curve import curve, midpoint, probability
from llm.crawl.dedup.signatures import Array, Shape, SignatureFile, groups_with, opened

BINS = 10  # of the similarity, from 0 to 1
GROUP = 10  # documents of a group whose pairs are compared
TEXT = 256 << 20  # bytes of shingles that are kept, at most

Pair = tuple[int, int]


def measure(files: Sequence[SignatureFile], parts: Sequence[Path], ids: Array, roots: Array, sample: int) -> dict[str, Any]:
    """How many pairs of a similarity lie in one cluster, as the S-curve expects and as found; and how alike are what
    was dropped and what was kept in its place. `sample`: documents that are compared, at most, for each of the two.

    Pairs are found by their witness, which is no hash of a band: they share it with the probability of their similarity
    s, so that each counts for 1 / s of them.
    """
    shape = files[0].shape
    recall, precision = list(_witnessed(files, len(ids), sample)), list(_dropped(roots, sample // 2))
    shingles = _shingles(parts, ids, sorted({one for pair in recall + precision for one in pair}), shape)

    def similar(pairs: Sequence[Pair]) -> Iterator[tuple[Pair, float]]:
        for one, other in pairs:
            if one in shingles and other in shingles:
                yield (one, other), jaccard(shingles[one], shingles[other])

    bins = [{"from": i / BINS, "pairs": 0, "expected": 0.0, "found": 0.0, "weight": 0.0} for i in range(BINS)]
    for (one, other), similarity in similar(recall):
        if similarity:  # a witness is half a hash: it may be shared by chance
            found = bins[min(BINS - 1, int(similarity * BINS))]
            found["pairs"] += 1
            found["weight"] += 1 / similarity
            found["expected"] += probability(similarity, shape) / similarity
            found["found"] += (roots[one] == roots[other]) / similarity
    for one in bins:
        weight = one.pop("weight") or 1
        one["expected"], one["found"] = one["expected"] / weight, one["found"] / weight
    alike = [similarity for _, similarity in similar(precision)]
    histogram = np.histogram(alike, BINS, (0, 1))[0].tolist()
    return {"curve": curve(shape), "midpoint": midpoint(shape), "recall": bins, "dropped": histogram}


def jaccard(one: Array, other: Array) -> float:
    """The share of what either of two sets, each sorted, has that both have."""
    common = len(np.intersect1d(one, other, assume_unique=True))
    return common / (len(one) + len(other) - common)


def _witnessed(files: Sequence[SignatureFile], documents: int, sample: int) -> Iterator[Pair]:
    """Pairs that share a witness, among the share of all witnesses that about `sample` documents have."""
    limit = np.uint64(min(2**64 - 1, 2**64 * sample // max(1, documents)))
    witnesses, numbers, base = list[Array](), list[Array](), 0
    for file in files:
        column = file.witnesses()
        chosen = np.flatnonzero(column < limit)
        witnesses.append(column[chosen])
        numbers.append(chosen + base)
        base += file.size
    groups = defaultdict[int, list[int]](list)
    for witness, number in zip(np.concatenate(witnesses).tolist(), np.concatenate(numbers).tolist(), strict=True):
        groups[witness].append(number)
    for group in groups.values():
        yield from combinations(group[:GROUP], 2)


def _dropped(roots: Array, sample: int) -> Iterator[Pair]:
    """Dropped documents, evenly spread, each with the one that is kept."""
    dropped = np.flatnonzero(roots != np.arange(len(roots), dtype=roots.dtype))
    for number in dropped[:: max(1, -(-len(dropped) // max(1, sample)))].tolist():
        yield number, int(roots[number])


def _shingles(parts: Sequence[Path], ids: Array, numbers: Sequence[int], shape: Shape) -> dict[int, Array]:
    """The set of shingles of each of these documents, sorted, until TEXT bytes are reached."""
    wanted = dict(zip(ids[numbers].tolist(), numbers, strict=True))
    order, signer, size, sets = np.asarray(sorted(wanted)), shape.signer(), 0, dict[int, Array]()
    for part in parts:
        with opened(part) as file:
            for group in groups_with(file, order):
                table = file.read_row_group(group, columns=["id", "text"], use_threads=False)
                for row in np.flatnonzero(np.isin(table["id"].to_numpy(), order)).tolist():
                    found = np.unique(signer.shingles(table["text"][row].as_py().lower()))
                    size += found.nbytes
                    if size > TEXT:
                        return sets
                    sets[wanted[table["id"][row].as_py()]] = found
    return sets

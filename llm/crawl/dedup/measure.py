"""Recall and precision of the clusters, against exact Jaccard similarities of a sample."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from llm.crawl.dedup.curve import curve, midpoint, probability
from llm.crawl.dedup.signatures import Array, Shape, SignatureFile, groups_with
from llm.crawl.documents import opened

BINS = 10  # of the similarity, from 0 to 1
GROUP = 10  # documents of a group whose pairs are compared
TEXT = 256 << 20  # bytes of shingles that are kept, at most

Pair = tuple[int, int]


def measure(
    files: Sequence[SignatureFile], parts: Sequence[Path], ids: Array, roots: Array, sample: int
) -> dict[str, Any]:
    """How many pairs of a similarity lie in one cluster, as the S-curve expects and as found; and how alike are what
    was dropped and what was kept in its place. `sample`: documents that are compared, about and at most, for each.

    Pairs are found by their witness, which no band has seen: they share it with the probability of their similarity.
    """
    shape = files[0].shape
    recall, precision = list(_witnessed(files, len(ids), sample)), list(_dropped(roots, sample // 2))
    sets = _shingles(parts, ids, sorted({one for pair in recall + precision for one in pair}), shape)
    bins, dropped = [list[tuple[float, bool]]() for _ in range(BINS)], [0] * BINS
    for one, other in recall:
        if one in sets and other in sets:
            similarity = jaccard(sets[one], sets[other])
            bins[_bin(similarity)].append((probability(similarity, shape), bool(roots[one] == roots[other])))
    for one, other in precision:
        if one in sets and other in sets:
            dropped[_bin(jaccard(sets[one], sets[other]))] += 1
    rows = list[dict[str, float]]()
    for i, pairs in enumerate(bins):
        expected, found = np.mean(pairs or [(0, 0)], axis=0).tolist()
        rows.append({"from": i / BINS, "pairs": len(pairs), "expected": expected, "found": found})
    return {"curve": curve(shape), "midpoint": midpoint(shape), "recall": rows, "dropped": dropped}


def _bin(similarity: float) -> int:
    return min(BINS - 1, int(similarity * BINS))


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
    some = np.arange(0, len(roots), max(1, len(roots) // (16 * sample + 1)))  # not all: there may be billions
    dropped = some[roots[some] != some]
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
                table = table.filter(np.isin(table["id"].to_numpy(), order, assume_unique=True))
                for one, text in zip(table["id"].to_pylist(), table["text"].to_pylist(), strict=True):
                    found = np.sort(signer.shingles(text.lower()))
                    found = found[np.append(True, found[1:] != found[:-1])]  # np.unique takes three times as long
                    size += found.nbytes
                    if size > TEXT:
                        return sets
                    sets[wanted[one]] = found
    return sets

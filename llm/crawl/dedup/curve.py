"""The S-curve of the bands: how likely two documents share a band, by their Jaccard similarity."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm.crawl.dedup.signatures import Shape


def probability(similarity: float, shape: Shape) -> float:
    """That all rows of at least one band are equal: of each row it is the similarity."""
    return 1 - (1 - similarity**shape.rows) ** shape.bands


def midpoint(shape: Shape) -> float:
    """The similarity at which half of all pairs are found."""
    return (1 - 0.5 ** (1 / shape.bands)) ** (1 / shape.rows)


def curve(shape: Shape, steps: int = 100) -> list[tuple[float, float]]:
    """Similarities from 0 to 1, and the probability of each: what is drawn."""
    return [(i / steps, probability(i / steps, shape)) for i in range(steps + 1)]


def table(measured: Mapping[str, Any]) -> str:
    """What llm.crawl.dedup.measure has found, as text."""
    lines = [f"half of the pairs of Jaccard similarity {measured['midpoint']:.2f} share a band; of a sample:"]
    lines += ["similarity from   pairs   expected in one cluster    found   dropped documents so like what is kept"]
    for row, dropped in zip(measured["recall"], measured["dropped"], strict=True):
        found = f"{row['expected']:23.1%}  {row['found']:7.1%}" if row["pairs"] else f"{'-':>23}  {'-':>7}"
        lines.append(f"{row['from']:15.1f} {row['pairs']:7,}   {found} {dropped:9,}")
    return "\n".join(lines)

"""The S-curve of the bands: how likely two documents share a band, by their Jaccard similarity."""

from __future__ import annotations

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

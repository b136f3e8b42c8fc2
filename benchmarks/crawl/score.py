"""Recall and precision of each stage, against what was planted."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from benchmarks.crawl.noise import BOILERPLATE, WORDS, Planted
from benchmarks.report import NONE
from llm.crawl.documents import Document

SHINGLE = 5  # words
ALIKE = 0.5  # Jaccard similarity of two documents of which one may be dropped
PROSE = ("book/", "handbook/en-US/", "docstrings/")  # what no rule should remove; a reference's pages may be lists
Texts = Mapping[str, str]
"""By URL."""


@dataclass(frozen=True)
class Score:
    """recall, precision: None where it has no meaning."""

    what: str
    count: int
    """Of the pages that were planted for it."""
    recall: float | None
    precision: float | None = None

    def row(self) -> tuple[str, ...]:
        shares = (NONE if share is None else f"{share:.1%}" for share in (self.recall, self.precision))
        return (self.what, f"{self.count}", *shares)


def counted(text: str) -> Counter[str]:
    return Counter(WORDS.findall(text.lower()))


def overlap(found: str, wanted: str) -> tuple[float, float]:
    """Recall and precision of the words of a text, with their counts."""
    found_words, wanted_words = counted(found), counted(wanted)
    both = (found_words & wanted_words).total()
    return both / max(1, wanted_words.total()), both / max(1, found_words.total())


def extraction(truth: Sequence[Planted], texts: Texts) -> Iterator[Score]:
    """Words of the main part that were found, and words found that are of it; a page that is missing counts as 0."""
    groups: dict[str, list[Planted]] = {}
    for planted in truth:
        if planted.kind == "page":
            groups.setdefault(f"words of the {planted.name.split('/')[0]}", []).append(planted)
        elif planted.kind == "charset":
            name = f"words of other charsets, declared {planted.detail.partition('declared ')[2]}"
            groups.setdefault(name, []).append(planted)
    for name, group in sorted(groups.items()):
        found = [overlap(texts.get(planted.url, ""), planted.text) for planted in group]
        yield Score(name, len(group), mean(recall for recall, _ in found), mean(precision for _, precision in found))
    pages = [texts[planted.url] for planted in truth if planted.kind == "page" and planted.url in texts]
    left = mean(any(sentence in text for sentence in BOILERPLATE) for text in pages)
    yield Score("pages without boilerplate", len(pages), 1 - left)


def damage(truth: Sequence[Planted], texts: Texts, counted: int) -> Iterator[Score]:
    """counted: places that the stage reports as damaged."""
    cut = [planted for planted in truth if planted.kind == "truncated"]
    whole = [planted for planted in truth if planted.kind in ("page", "copy", "charset")]
    yield Score(
        "truncated records reported", len(cut), min(1.0, counted / len(cut)), min(1.0, len(cut) / (counted or 1))
    )
    yield Score("records beside them read", len(whole), mean(planted.url in texts for planted in whole))


def languages(truth: Sequence[Planted], texts: Texts, identify: Callable[[str], str]) -> Iterator[Score]:
    """Pages of each language that `identify` calls so, and pages called so that are of it."""
    pages = [(p.language, texts[p.url]) for p in truth if p.kind in ("page", "charset") and p.url in texts]
    pairs = Counter((language, identify(text)) for language, text in pages)
    for language, count in Counter(language for language, _ in pages).most_common():
        right = pairs[language, language]
        called = sum(n for (_, guess), n in pairs.items() if guess == language)
        yield Score(f"language {language}", count, right / count, right / max(1, called))


def filters(truth: Sequence[Planted], before: Texts, after: Texts) -> Iterator[Score]:
    """Spam that is removed, and what is removed that is spam and not prose, in English."""
    spam = [planted for planted in truth if planted.kind == "spam"]
    prose = [p for p in truth if p.kind == "page" and p.name.startswith(PROSE) and p.url in before]
    gone = [planted for planted in spam if planted.url not in after]
    lost = sum(planted.url not in after for planted in prose)
    yield Score("spam", len(spam), len(gone) / len(spam), len(gone) / max(1, len(gone) + lost))
    for kind in sorted({planted.detail for planted in spam}):
        group = [planted for planted in spam if planted.detail == kind]
        yield Score(f"spam: {kind}", len(group), mean(planted.url not in after for planted in group))
    for name in sorted({p.name.split("/")[0] for p in truth if p.kind == "page"}):
        group = [p for p in truth if p.kind == "page" and p.language == "en" and p.name.split("/")[0] == name]
        group = [p for p in group if p.url in before]
        if group:
            yield Score(f"kept: {name}, English", len(group), mean(p.url in after for p in group))


def shingles(text: str) -> set[tuple[str, ...]]:
    words = WORDS.findall(text.lower())
    return {tuple(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))}


def jaccard(a: str, b: str) -> float:
    first, second = shingles(a), shingles(b)
    return len(first & second) / (len(first | second) or 1)


def duplicates(
    truth: Sequence[Planted],
    documents: Iterable[Document],
    roots: Mapping[int, int],
    expected: Callable[[float], float],
) -> Iterator[Score]:
    """Copies that are in the cluster of what they are copies of, and dropped documents that are like another there.

    documents: what went into the stage. roots: of each id that is in a cluster. expected: the S-curve.
    """
    by_url = {document.url: document for document in documents}
    by_id = {document.id: document for document in by_url.values()}
    originals = {planted.name: planted.url for planted in truth if planted.kind == "page"}
    pairs: dict[str, list[tuple[Document, Document]]] = {}
    for planted in truth:
        original = originals.get(planted.original, "")
        if planted.kind == "copy" and planted.url in by_url and original in by_url:
            pairs.setdefault(planted.detail, []).append((by_url[planted.url], by_url[original]))
    for detail, group in sorted(pairs.items(), key=lambda item: float(item[0].rstrip("%"))):
        likeness = [jaccard(a.text, b.text) for a, b in group]
        found = mean(roots.get(a.id, a.id) == roots.get(b.id, b.id) for a, b in group)
        said = f"Jaccard {mean(likeness):.2f}, expected {mean(map(expected, likeness)):.0%}"
        yield Score(f"copies with {detail} of the words replaced ({said})", len(group), found)
    dropped = [id for id, root in roots.items() if id != root]
    members: dict[int, list[int]] = {}
    for id, root in roots.items():
        members.setdefault(root, []).append(id)
    right = [
        any(jaccard(by_id[id].text, by_id[other].text) >= ALIKE for other in members[roots[id]] if other != id)
        for id in dropped
    ]
    yield Score(
        f"dropped documents with a like one (Jaccard of {ALIKE} or more)", len(dropped), None, mean(right or [1])
    )

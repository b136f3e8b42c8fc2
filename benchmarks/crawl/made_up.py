"""Made-up documents, each a function of its number, one in ten a copy of an earlier one with some words replaced."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from random import Random

import numpy as np

from llm.crawl.counts import Counts
from llm.crawl.documents import Document
from llm.crawl.settings import CorpusConfig
from llm.crawl.stages import work_of
from llm.crawl.tasks import Task, Work

PART = 25_000  # documents of a file: 100 MB of text
WORDS = 600  # of a document: 4 kB
VOCABULARY = 50_000
COPIES = 10  # one in so many is a copy
EDITS = (0.0, 0.005, 0.01, 0.02, 0.05, 0.1)  # shares of a copy's words that are replaced, in turn


@cache
def vocabulary() -> np.ndarray:
    rng = Random(1)  # noqa: S311
    letters = "eeeetttaaooiinnsshhrrddllcumwfgypbvkjxqz"
    return np.array(["".join(rng.choices(letters, k=rng.randint(2, 10))) for _ in range(VOCABULARY)], object)


def original_of(document: int) -> int:
    """An earlier document that this one is a copy of, and that is none itself; or this one."""
    if document % COPIES or not document:
        return document
    drawn = document * 2_654_435_761 % 2**32
    return drawn % (document // COPIES) * COPIES + 1 + drawn % (COPIES - 1)


def edit_of(document: int) -> float:
    return EDITS[document // COPIES % len(EDITS)]


def text_of(document: int) -> str:
    original = original_of(document)
    drawn = np.random.default_rng((1, original)).random(WORDS)
    words = (VOCABULARY * drawn * drawn * drawn).astype(int)  # few are frequent, as in a language
    if original != document:
        rng = np.random.default_rng((2, document))
        places = rng.choice(WORDS, round(edit_of(document) * WORDS), replace=False)
        words[places] = rng.integers(VOCABULARY, size=len(places))
    return " ".join(vocabulary()[words].tolist())


@dataclass(frozen=True)
class Size:
    documents: int


class Texts:
    """Writes the documents where the filters would."""

    name, version = "filter", 1

    def __init__(self, documents: int) -> None:
        self.settings = Size(documents)

    def run(self, task: Task, counts: Counts) -> Iterator[Document]:
        first = task.number * PART
        for row in range(min(PART, self.settings.documents - first)):
            text = text_of(first + row)
            counts.documents_in += 1
            counts.bytes_in += len(text)
            yield Document(task.number << 32 | row, text, "", task.source, row)


def works(documents: int, config: CorpusConfig, stage: str) -> Work:
    return Texts(documents) if stage == "filter" else work_of(config, stage)

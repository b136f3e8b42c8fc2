"""The stage `filter`: asks the rules, one after another, which documents stay."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

from llm.crawl.counts import Counts
from llm.crawl.documents import Document, read_documents, size_of
from llm.crawl.filter import c4, fineweb, gopher, pii
from llm.crawl.filter.contamination import Contamination
from llm.crawl.filter.language import Language
from llm.crawl.filter.lines import Lines
from llm.crawl.filter.page import Page, Tokenizer
from llm.crawl.filter.quality import Quality
from llm.crawl.filter.settings import FilterConfig, LengthRule
from llm.crawl.filter.urls import Urls
from llm.crawl.tasks import Task
from llm.data.corpus.files import list_files
from llm.files import sha256_of

Rule = Callable[[Page], str]
"""Why a document is refused, "" if it stays; it may change the document's text."""


@dataclass(frozen=True)
class Identity:
    """What the output of the stage depends on."""

    config: FilterConfig
    files: dict[str, str]
    """SHA-256 of each file that the rules read."""


class Filter:
    """See llm.crawl.tasks.Stage."""

    name = "filter"
    version = 1

    def __init__(self, config: FilterConfig, tokenizer: Tokenizer | None = None) -> None:
        """Read what the rules need. Raises InputError where a file or a package is missing."""
        self._config, self._tokenizer = config, tokenizer or Tokenizer()
        self._rules = {name: self._rule(name) for name in config.rules}
        self.settings = Identity(config, _digests(config))

    def _rule(self, name: str) -> Rule:
        config = getattr(self._config, name)
        functions = {
            "length": _length, "gopher_repetition": gopher.repetition, "gopher_quality": gopher.quality,
            "c4": c4.clean, "fineweb": fineweb.lists, "pii": pii.mask,
        }  # fmt: skip
        if name in functions:
            return partial(functions[name], config=config)
        objects = {
            "url": Urls, "language": Language, "contamination": Contamination, "quality": Quality, "lines": Lines,
        }  # fmt: skip
        return objects[name](config)

    def run(self, task: Task, counts: Counts) -> Iterator[Document]:
        """The documents of a task's files that stay."""
        return self.apply(chain.from_iterable(map(read_documents, task.inputs)), counts)

    def apply(self, documents: Iterable[Document], counts: Counts) -> Iterator[Document]:
        """Those of the documents of one task that stay."""
        if "lines" in self._rules:
            self._rules["lines"] = self._rule("lines")  # knows the lines of one task
        for document in documents:
            counts.documents_in += 1
            counts.bytes_in += size_of(document.text)
            if not self.refusal(document, counts):
                counts.count("length", str(1 << max(0, len(document.text) - 1).bit_length()))
                yield document

    def refusal(self, document: Document, counts: Counts) -> str:
        """Ask the rules about one document, whose text and language they may set: the rule and reason, or ""."""
        page = Page(document, self._config, counts, self._tokenizer)
        for name, rule in self._rules.items():
            if reason := rule(page):
                counts.remove(f"{name}.{reason}", document)
                return f"{name}.{reason}"
        return ""


def _length(page: Page, config: LengthRule) -> str:
    return "too_long" if len(page.text) > config.max_characters else ""


def _digests(config: FilterConfig) -> dict[str, str]:
    """Of the files of the rules that are asked."""
    used = {
        "url": [config.url.domains, config.url.urls, config.url.words, config.url.parts, config.url.soft_words],
        "contamination": config.contamination.files,
        "quality": [config.quality.good, config.quality.bad],
    }
    digests = dict[str, str]()
    for source in sorted(source for rule in config.rules for source in used.get(rule, ()) if source):
        for path in [Path(source)] if Path(source).is_file() else list_files(source)[0]:
            digests[str(path)] = sha256_of(path)
    return digests

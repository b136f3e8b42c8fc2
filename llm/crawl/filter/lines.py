"""Lines that have come before in a task, such as menus and legal notices of one site."""

from __future__ import annotations

import xxhash

from llm.crawl.filter.page import Page
from llm.crawl.filter.settings import LinesRule


class Lines:
    """The lines of one task so far: 100 bytes of memory for each different one."""

    def __init__(self, config: LinesRule) -> None:
        self._least = config.min_characters
        self._seen = set[int]()

    def __call__(self, page: Page) -> str:
        """Leave lines out of a text; "empty" if nothing remains."""
        kept = [line for line in page.text.split("\n") if self._is_new(line)]
        page.change("\n".join(kept))
        return "" if page.text.strip() else "empty"

    def _is_new(self, line: str) -> bool:
        key = line.strip()
        if len(key) < max(1, self._least):
            return True
        digest, before = xxhash.xxh3_64_intdigest(key.encode()), len(self._seen)
        self._seen.add(digest)
        return len(self._seen) > before

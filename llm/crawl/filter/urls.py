"""Rules about the URL of a document: lists of the user's, as RefinedWeb and FineWeb use them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from llm.crawl.filter.page import Page
from llm.crawl.filter.settings import UrlRule
from llm.errors import InputError

OTHER = re.compile(r"[^a-z0-9]+")


class Urls:
    """The lists, read once."""

    def __init__(self, config: UrlRule) -> None:
        """Raises InputError where a list cannot be read, or publicsuffixlist is missing."""
        self._most = config.max_soft_words
        self._domains, self._urls = _entries(config.domains), _entries(config.urls)
        plain = (
            {OTHER.sub("", entry.lower()) for entry in _entries(path)} for path in (config.words, config.soft_words)
        )
        self._words, self._soft_words = plain
        self._suffixes = _suffixes() if self._domains else None
        parts = sorted({OTHER.sub("", entry.lower()) for entry in _entries(config.parts)} - {""})
        self._parts = re.compile("|".join(parts)) if parts else None

    def __call__(self, page: Page) -> str:
        """Why a URL is refused; "": it is not."""
        url = page.document.url
        if not url:
            return ""
        try:
            host = (urlsplit(url if "//" in url else f"//{url}").hostname or "").rstrip(".")
        except ValueError:  # a broken IPv6 address
            host = ""
        if self._suffixes and self._suffixes.privatesuffix(host) in self._domains:
            return "domain"
        if host in self._domains:
            return "host"
        if url in self._urls:
            return "url"
        lower = url.lower()
        words = set(OTHER.split(lower))
        if words & self._words:
            return "word"
        if len(words & self._soft_words) > self._most:
            return "soft_words"
        return "part" if self._parts and self._parts.search(OTHER.sub("", lower)) else ""


def _suffixes() -> Any:
    """The public suffix list that the package brings along, the registries' part: all of blogspot.com is one domain."""
    try:
        from publicsuffixlist import PublicSuffixList
    except ImportError as error:
        raise InputError(f"filter.url.domains is given: pip install 'ingot[crawl]' ({error})") from error
    return PublicSuffixList(only_icann=True)


def _entries(path: str) -> set[str]:
    """The lines of a list, without comments; none of ""."""
    if not path:
        return set()
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}, a list of filter.url, cannot be read: {error}") from error
    return {line.strip() for line in lines if line.strip() and not line.startswith("#")}

